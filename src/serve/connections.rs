//! Connections that end because their door has shut, or was revoked.

use std::collections::{HashSet, VecDeque};
use std::time::Instant;

use tracing::{info, warn};

use super::book::{Book, Grant};
use super::control::Selection;
use crate::nft::{Door, Doors, ElementError, Flows};
use crate::service::{Name, Port};

/// Doors that are remembered when they have shut: their connections may live, and `revoke --kill` can name their user.
const REMEMBERED: usize = 16_384;

/// Doors that have shut, and who had opened them, the last one last.
#[derive(Default)]
pub struct Connections {
    past: VecDeque<(Door, Name)>,
}

impl Connections {
    /// Doors have shut, or some who held them open have gone: connections end where the service says so, unless others still
    /// hold the door open.
    pub fn after(&mut self, closed: &[(Door, Grant)], book: &Book, doors: &mut Doors) {
        let now = Instant::now();
        let is_to_end = |(door, grant): &&(Door, Grant)| grant.kill && book.longest(door, now).is_none();
        let to_end: HashSet<Door> = closed.iter().filter(is_to_end).map(|(door, _)| of_connections(door)).collect();
        self.past.extend(closed.iter().map(|(door, grant)| (of_connections(door), grant.user.clone())));
        let surplus = self.past.len().saturating_sub(REMEMBERED);
        self.past.drain(..surplus);
        if !to_end.is_empty() {
            end(doors, |door| to_end.contains(door));
        }
    }

    /// Ends what lives of those who were revoked: through doors that shut now or before, but for doors that others hold open.
    /// A source that was named loses all its connections to guarded ports.
    pub fn of(
        &self,
        selection: &Selection,
        struck: &[(Door, Grant)],
        guarded: &HashSet<Port>,
        book: &Book,
        doors: &mut Doors,
    ) {
        let now = Instant::now();
        let is_held =
            |door: &Door| [false, true].iter().any(|&once| book.longest(&Door { once, ..*door }, now).is_some());
        let struck = struck.iter().map(|(door, _)| of_connections(door));
        let past = self.past.iter().filter(|(_, user)| selection.is_of(user)).map(|(door, _)| *door);
        let meant: HashSet<Door> = struck.chain(past).filter(|door| !is_held(door)).collect();
        let comes_from = |door: &Door| selection.is_source(door.source) && guarded.contains(&door.port);
        end(doors, |door| meant.contains(door) || comes_from(door));
    }
}

/// The door as conntrack's entries name it.
const fn of_connections(door: &Door) -> Door {
    Door { once: false, ..*door }
}

/// Has conntrack forget connections, and keeps them from beginning again.
fn end(doors: &mut Doors, is_meant: impl Fn(&Door) -> bool) {
    match try_to_end(doors, is_meant) {
        Ok(0) => {}
        Ok(connections) => info!(connections, "ended"),
        Err(error) => warn!("connections live on: {error}"),
    }
}

fn try_to_end(doors: &mut Doors, is_meant: impl Fn(&Door) -> bool) -> Result<usize, ElementError> {
    let mut connections = Flows::new()?;
    let flows = connections.find(is_meant)?;
    let through: HashSet<Door> = flows.iter().map(|flow| flow.door).collect();
    through.iter().try_for_each(|door| doors.keep_ended(door))?;
    let mut ended = 0;
    for flow in flows {
        ended += usize::from(connections.forget(flow)?);
    }
    Ok(ended)
}
