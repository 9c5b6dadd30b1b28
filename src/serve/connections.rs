//! Connections that end because their door has shut, or was revoked.

use std::collections::{HashSet, VecDeque};
use std::time::Instant;

use ipnet::IpNet;
use tracing::{info, warn};

use super::book::{Book, Grant};
use super::control::Selection;
use crate::nft::{Door, Doors, ElementError, Flows};
use crate::service::{Name, Port, Transport};

/// Doors that are remembered when they have shut: their connections may live, and `revoke --kill` can name their user.
const REMEMBERED: usize = 16_384;

/// Doors that have shut, and who had opened them, the last one last.
#[derive(Default)]
pub struct Connections {
    /// Networks that the gate lets in, door or not: their connections do not end.
    trusted: Vec<IpNet>,
    past: VecDeque<(Door, Name)>,
    /// Doors over UDP where the server may not speak first, until they open again.
    ended: HashSet<Door>,
}

impl Connections {
    /// Connections from these networks are none that a door let in, whoever has knocked with such an address.
    pub fn spare(&mut self, trusted: &[IpNet]) {
        self.trusted = trusted.to_vec();
    }

    /// Doors have shut, or some who held them open have gone: connections end where the service says so, unless others still
    /// hold the door open.
    pub fn after(&mut self, closed: &[(Door, Grant)], book: &Book, doors: &mut Doors) {
        let now = Instant::now();
        let is_to_end = |(door, grant): &&(Door, Grant)| grant.kill && !is_held(book, door, now);
        let to_end: HashSet<Door> = closed.iter().filter(is_to_end).map(|(door, _)| of_connections(door)).collect();
        self.past.extend(closed.iter().map(|(door, grant)| (of_connections(door), grant.user.clone())));
        let surplus = self.past.len().saturating_sub(REMEMBERED);
        self.past.drain(..surplus);
        if !to_end.is_empty() {
            self.end(doors, &to_end, |_| false);
        }
    }

    /// A door opens: what was ended there may begin again from either side, where there are no connections.
    pub fn begin(&mut self, door: &Door, doors: &mut Doors) {
        if self.ended.remove(&of_connections(door))
            && let Err(error) = doors.forget_ended(door)
        {
            warn!("the server cannot speak first to {} on {}: {error}", door.source, door.port);
        }
    }

    /// Ends what lives of those who were revoked: through doors that shut now or before, but for doors that others hold open.
    /// A source that was named loses all its connections to guarded ports.
    pub fn of(
        &mut self,
        selection: &Selection,
        struck: &[(Door, Grant)],
        guarded: &HashSet<Port>,
        book: &Book,
        doors: &mut Doors,
    ) {
        let now = Instant::now();
        let struck = struck.iter().map(|(door, _)| of_connections(door));
        let past = self.past.iter().filter(|(_, user)| selection.is_of(user)).map(|(door, _)| *door);
        let meant: HashSet<Door> = struck.chain(past).filter(|door| !is_held(book, door, now)).collect();
        self.end(doors, &meant, |door| selection.is_source(door.source) && guarded.contains(&door.port));
    }

    /// Has conntrack forget the connections that came in by such doors, and keeps them from beginning again. Conntrack may not
    /// know those of UDP at the moment, which are no connections.
    fn end(&mut self, doors: &mut Doors, meant: &HashSet<Door>, is_meant_too: impl Fn(&Door) -> bool) {
        let mut trouble = None;
        let is_spared = |door: &Door| self.trusted.iter().any(|network| network.contains(&door.source));
        let flows = Flows::new().map_err(ElementError::from).and_then(|mut connections| {
            let flows = connections.find(|door| (meant.contains(door) || is_meant_too(door)) && !is_spared(door))?;
            Ok((connections, flows))
        });
        let (mut connections, flows) = match flows {
            Ok(found) => found,
            Err(error) => return warn!("connections live on: {error}"),
        };
        let idle = meant.iter().filter(|door| door.port.transport == Transport::Udp && !is_spared(door)).copied();
        for door in flows.iter().map(|flow| flow.door).chain(idle).collect::<HashSet<Door>>() {
            if let Err(error) = doors.keep_ended(&door) {
                trouble.get_or_insert(error);
            } else if door.port.transport == Transport::Udp && self.ended.len() < REMEMBERED {
                self.ended.insert(door);
            }
        }
        let mut ended = 0_usize;
        for flow in flows {
            match connections.forget(flow) {
                Ok(was_there) => ended += usize::from(was_there),
                Err(error) => {
                    trouble.get_or_insert(error);
                }
            }
        }
        if ended > 0 {
            info!(connections = ended, "ended");
        }
        if let Some(error) = trouble {
            warn!("not all connections are ended for good: {error}");
        }
    }
}

/// Whether somebody holds a door open, for one connection or for all.
fn is_held(book: &Book, door: &Door, now: Instant) -> bool {
    [false, true].iter().any(|&once| book.longest(&Door { once, ..*door }, now).is_some())
}

/// The door as conntrack's entries name it.
const fn of_connections(door: &Door) -> Door {
    Door { once: false, ..*door }
}
