//! Asking the kernel what is in a set, and what a set is. It needs CAP_NET_ADMIN; understanding the answers does not, so that one
//! process can ask and hand them on unread, and another understand them ([`super::lister`]).

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP};
use netlink_packet_netfilter::nftables::{
    NfTablesMessage, SetAttribute, SetElementList, SetElementMessage, SetMessage,
};
use netlink_sys::Socket;

use super::elements::{Element, ElementError, Place, append, receive, socket};

/// What is asked about a set.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Query {
    /// Its elements.
    Elements,
    /// What its keys are, and its flags.
    Layout,
}

/// A question to the kernel, and its answers. A socket of its own keeps them from those of others.
pub struct Listing(Socket);

impl Listing {
    /// Asks about the set that such an element is in.
    ///
    /// # Errors
    /// The kernel's. That there is no such set is an answer.
    pub fn of(element: &Element, query: Query) -> Result<Self, ElementError> {
        let Place { family, table, set } = element.place();
        let (message, flags) = match query {
            Query::Elements => {
                let attributes = vec![SetElementList::Table(table.to_owned()), SetElementList::Set(set.to_owned())];
                (NfTablesMessage::GetSetElement(SetElementMessage { attributes }), NLM_F_DUMP)
            }
            Query::Layout => {
                let attributes = vec![SetAttribute::Table(table.to_owned()), SetAttribute::Name(set.to_owned())];
                (NfTablesMessage::GetSet(SetMessage { attributes }), NLM_F_ACK)
            }
        };
        let mut request = Vec::new();
        append(&mut request, family, message.into(), flags);
        let (socket, _) = socket()?;
        socket.send(&request, 0)?;
        Ok(Self(socket))
    }

    /// The next answer: the kernel goes on with the listing when a part of it is taken.
    ///
    /// # Errors
    /// The kernel's.
    pub fn answer(&mut self) -> Result<Vec<u8>, ElementError> {
        receive(&self.0)?.ok_or(ElementError::NoAnswer)
    }
}
