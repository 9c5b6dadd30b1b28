//! Understanding what the kernel answers about sets, whoever asks it ([`super::listing`]).

use std::io;

use netlink_packet_core::{NLM_F_DUMP_INTR, NLMSG_DONE, NetlinkBuffer};

use super::attributes::{FAMILY_HEADER, MESSAGE_HEADER, messages};
use super::elements::{Door, Element, ElementError, read, refused};
use super::list::{self, Open, OpenDoor};
use super::listing::{Listing, Query};
use super::sets::{Layout, Member, SetError, SetName};

/// Times that a listing is begun again when others change tables meanwhile.
const RETRIES: usize = 20;

/// Whoever can have the kernel asked.
pub trait Lister {
    /// Asks about the set that such an element is in.
    ///
    /// # Errors
    /// As [`Listing::of`].
    fn ask(&mut self, element: &Element, query: Query) -> Result<(), ElementError>;

    /// The next answer.
    ///
    /// # Errors
    /// As [`Listing::answer`].
    fn next(&mut self) -> Result<Vec<u8>, ElementError>;

    /// The elements of a set, once more if others change tables meanwhile: then some may be missing.
    ///
    /// # Errors
    /// [`ElementError::NoSet`], and the kernel's.
    fn elements<T>(&mut self, of: &Element, read: impl Fn(&[u8]) -> Vec<T>) -> Result<Vec<T>, ElementError> {
        let mut listed = Vec::new();
        for _ in 0..RETRIES {
            listed.clear();
            let mut is_whole = true;
            self.ask(of, Query::Elements)?;
            while !take(&self.next()?, |message, is_interrupted| {
                is_whole &= !is_interrupted;
                listed.extend(read(message));
            })? {}
            if is_whole {
                break;
            }
        }
        Ok(listed)
    }

    /// The doors that are open; and those for one connection that have let it in, or may yet, where it ends with them.
    ///
    /// # Errors
    /// As [`Lister::elements`]: there may be no table.
    fn listed(&mut self) -> Result<[Vec<OpenDoor>; 2], ElementError> {
        let mut listed = [Vec::new(), Vec::new()];
        for element in Element::one_of_each_set() {
            let (Element::Opens(Door { once, .. }) | Element::Lasts(Door { once, .. })) = element else { continue };
            let [open, live] = &mut listed;
            let to = if matches!(element, Element::Lasts(_)) { live } else { open };
            to.extend(self.elements(&element, |message| list::doors(message, once).collect())?);
        }
        Ok(listed)
    }

    /// All doors that are open, and what those for one connection have let in.
    ///
    /// # Errors
    /// As [`Lister::listed`].
    fn open_doors(&mut self) -> Result<Vec<OpenDoor>, ElementError> {
        self.listed().map(|listed| listed.concat())
    }

    /// Who is in a set of the administrator's.
    ///
    /// # Errors
    /// As [`Lister::elements`].
    fn members(&mut self, set: &SetName) -> Result<Vec<Open<Member>>, ElementError> {
        self.elements(&Element::in_set(set), |message| list::members(message, set).collect())
    }

    /// What a set of the administrator's takes.
    ///
    /// # Errors
    /// [`SetError`]: the set is not there, or cannot take a source.
    fn layout(&mut self, set: &SetName) -> Result<Layout, SetError> {
        let fail = |error| match error {
            ElementError::NoSet => SetError::Missing(set.clone()),
            error => SetError::Kernel(set.clone(), error),
        };
        self.ask(&Element::in_set(set), Query::Layout).map_err(fail)?;
        let mut layout = None;
        while !take(&self.next().map_err(fail)?, |message, _| layout = Some(set.layout(message))).map_err(fail)? {}
        layout.unwrap_or(Err(SetError::Missing(set.clone())))
    }
}

/// The kernel itself.
#[derive(Default)]
pub struct Kernel(Option<Listing>);

impl Lister for Kernel {
    fn ask(&mut self, element: &Element, query: Query) -> Result<(), ElementError> {
        self.0 = Some(Listing::of(element, query)?);
        Ok(())
    }

    fn next(&mut self) -> Result<Vec<u8>, ElementError> {
        self.0.as_mut().ok_or(ElementError::NoAnswer)?.answer()
    }
}

/// Takes what a datagram lists, with whether others have changed tables meanwhile; whether it was the last.
fn take(datagram: &[u8], mut take: impl FnMut(&[u8], bool)) -> Result<bool, ElementError> {
    for message in messages(datagram) {
        let Ok(header) = NetlinkBuffer::new_checked(message) else { continue };
        match (header.message_type(), read(message)) {
            (NLMSG_DONE, _) | (_, Some(Ok(()))) => return Ok(true),
            (_, Some(Err(error))) if error.kind() == io::ErrorKind::NotFound => return Err(ElementError::NoSet),
            (_, Some(Err(error))) => return Err(refused(error)),
            _ => take(
                message.get(MESSAGE_HEADER + FAMILY_HEADER..).unwrap_or_default(),
                header.flags() & NLM_F_DUMP_INTR != 0,
            ),
        }
    }
    Ok(false)
}
