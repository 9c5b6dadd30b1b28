//! Connections that end because their door has shut, or was revoked.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use tracing::{info, warn};

use super::book::{Book, Grant};
use super::control::Selection;
use super::repeats::Tally;
use crate::nft::{self, Door, Doors, ElementError, Ending};
use crate::service::{Name, Port, Transport};

/// Doors that are remembered when they have shut: their connections may live, and `revoke --kill` can name their user.
const REMEMBERED: usize = 16_384;

/// And how many of them are left when they were more.
const KEPT: usize = REMEMBERED * 3 / 4;

/// How long: conntrack forgets a connection that is silent for five days, and addresses come to belong to others.
const AGE: Duration = Duration::from_hours(7 * 24);

/// Time between two looks at all connections at least, and so many times as long as the last one took.
const PAUSE: Duration = Duration::from_secs(3);
const SHARE: u32 = 10;

/// Doors that have shut, who had opened them, and what is to end there.
#[derive(Default)]
pub struct Connections {
    /// Networks that the gate lets in, door or not: their connections do not end.
    trusted: Vec<IpNet>,
    /// When each shut last.
    past: HashMap<(Door, Name), Instant>,
    /// Doors that have shut, whose connections are to end with the next look.
    due: HashSet<Door>,
    /// When that may be; `None` for now.
    resumes: Option<Instant>,
    /// Doors whose connections could not be ended for good, since the start, and since that was told last.
    failed: u64,
    not_ended: Tally,
}

impl Connections {
    /// Connections from these networks are none that a door let in, whoever has knocked with such an address.
    pub fn spare(&mut self, trusted: &[IpNet]) {
        self.trusted = trusted.to_vec();
    }

    /// Doors have shut, or some who held them open have gone: connections are to end where the service says so.
    pub fn after(&mut self, closed: &[(Door, Grant)], now: Instant) {
        if closed.is_empty() {
            return;
        }
        self.due.extend(closed.iter().filter(|(_, grant)| grant.kill).map(|(door, _)| of_connections(door)));
        self.past.extend(closed.iter().map(|(door, grant)| ((of_connections(door), grant.user.clone()), now)));
        self.forget(now);
    }

    /// Forgets doors that shut long ago, and the oldest of too many.
    fn forget(&mut self, now: Instant) {
        self.past.retain(|_, shut| now.duration_since(*shut) < AGE);
        if self.past.len() > REMEMBERED {
            let mut times: Vec<Instant> = self.past.values().copied().collect();
            // More than there need be, so that this is not done for each.
            let surplus = self.past.len().saturating_sub(KEPT);
            let (before, &mut first_kept, _) = times.select_nth_unstable(surplus);
            // Many may have shut at one time: some of these go.
            let mut surplus = before.iter().filter(|shut| **shut == first_kept).count();
            self.past.retain(|_, shut| {
                let goes = *shut < first_kept || (*shut == first_kept && surplus > 0);
                surplus = surplus.saturating_sub((goes && *shut == first_kept).into());
                !goes
            });
        }
    }

    /// A door opens: where there are no connections, what was ended may begin again from either side.
    pub fn begin(&mut self, door: &Door, doors: &mut Doors) {
        if door.port.transport != Transport::Udp {
            return;
        }
        match doors.forget_ended(door) {
            Ok(()) | Err(ElementError::Full) => {} // what is to be deleted is added first: it is not there
            Err(error) if self.not_ended.is_first() => {
                warn!(source = %door.source, port = %door.port, "the server may not speak first: {error}");
            }
            Err(_) => {}
        }
    }

    /// Ends what is to end, but for doors that somebody holds open again. It takes a look at all connections of a family, so
    /// all that shuts meanwhile waits for the next one.
    pub fn end_due(&mut self, book: &Book, doors: &mut Doors) {
        if self.is_time(Instant::now()) {
            self.end_all_due(book, doors);
        }
    }

    fn is_time(&self, now: Instant) -> bool {
        !self.due.is_empty() && self.resumes.is_none_or(|resumes| resumes <= now)
    }

    /// A look has taken this time.
    fn rest(&mut self, begun: Instant, ended: Instant) {
        self.resumes = Some(ended + PAUSE.max(ended.duration_since(begun) * SHARE));
    }

    /// The same, now. What could not be looked at is due again.
    pub fn end_all_due(&mut self, book: &Book, doors: &mut Doors) -> Ending {
        let due = std::mem::take(&mut self.due);
        let ending = self.end(due.clone(), None, book, doors);
        if ending.unlisted.is_some() {
            self.due.extend(due.into_iter().take(REMEMBERED));
        }
        ending
    }

    /// Ends what lives of those who were revoked: through doors that shut now or before, but for doors that others hold open.
    /// A source that was named loses all its connections to guarded ports. Tells what may live on.
    pub fn of(
        &mut self,
        selection: &Selection,
        struck: &[(Door, Grant)],
        guarded: &HashSet<Port>,
        book: &Book,
        doors: &mut Doors,
    ) -> Ending {
        self.forget(Instant::now());
        let struck = struck.iter().map(|(door, _)| of_connections(door));
        let past = self.past.keys().filter(|(_, user)| selection.is_of(user)).map(|(door, _)| *door);
        let meant = struck.chain(past).chain(self.due.iter().copied()).collect();
        let named = selection.network().map(|network| (network, guarded));
        let ending = self.end(meant, named, book, doors);
        if ending.unlisted.is_none() {
            self.due.clear();
        }
        ending
    }

    /// Ends connections that came in by such doors, and those of a network to such ports. Conntrack may not know those of UDP
    /// at the moment, which are no connections.
    fn end(
        &mut self,
        mut meant: HashSet<Door>,
        named: Option<(IpNet, &HashSet<Port>)>,
        book: &Book,
        doors: &mut Doors,
    ) -> Ending {
        let begun = Instant::now();
        let is_trusted = |door: &Door| self.trusted.iter().any(|network| network.contains(&door.source));
        meant.retain(|door| !is_held(book, door, begun) && !is_trusted(door));
        let is_named = |door: &Door| {
            named.is_some_and(|(network, ports)| network.contains(&door.source) && ports.contains(&door.port))
        };
        let is_meant = |door: &Door| meant.contains(door) || is_named(door);
        let named = named.map(|(network, _)| network.addr());
        let sources = || meant.iter().map(|door| door.source).chain(named);
        let families = [IpAddr::is_ipv4, IpAddr::is_ipv6].map(|is_of| sources().any(|source| is_of(&source)));
        let idle = meant.iter().filter(|door| door.port.transport == Transport::Udp).copied();
        let ending = nft::end(families, is_meant, is_trusted, idle, doors);
        self.rest(begun, Instant::now());
        self.tell(&ending);
        ending
    }

    fn tell(&mut self, ending: &Ending) {
        if ending.ended > 0 {
            info!(connections = ending.ended, "ended");
        }
        if let Some(cause) = &ending.unlisted
            && self.not_ended.is_first()
        {
            warn!("connections live on: {cause}");
        }
        self.failed = self.failed.saturating_add(ending.failed.len() as u64);
        for (Door { source, port, .. }, cause) in &ending.failed {
            if self.not_ended.is_first() {
                warn!(%source, %port, "connections are not ended for good: {cause}");
            }
        }
    }

    /// Doors whose connections could not be ended for good, since the start.
    pub const fn failed(&self) -> u64 {
        self.failed
    }

    /// What could not be ended, besides what was told.
    pub const fn not_ended(&mut self) -> &mut Tally {
        &mut self.not_ended
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

#[cfg(test)]
mod tests {
    use super::{AGE, Connections, Door, Duration, Grant, Instant, KEPT, REMEMBERED};

    fn closed(number: usize, user: &str, kill: bool, until: Instant) -> (Door, Grant) {
        let source = std::net::Ipv6Addr::from_bits(number as u128).into();
        let door = Door { source, port: "tcp/22".parse().unwrap(), once: true };
        let [user, service] = [user, "ssh"].map(|name| name.parse().unwrap());
        (door, Grant { user, service, until, bound: false, kill, members: Vec::new() })
    }

    #[test]
    fn a_door_that_shuts_again_and_again_is_remembered_once_for_each_user_and_for_a_week() {
        let (mut connections, start) = (Connections::default(), Instant::now());
        for (user, day) in [("alice", 0), ("bob", 0), ("alice", 1), ("alice", 2)] {
            let now = start + Duration::from_hours(24 * day);
            connections.after(&[closed(1, user, false, now)], now);
        }
        assert_eq!(connections.past.len(), 2);
        connections.forget(start + AGE);
        let left: Vec<&str> = connections.past.keys().map(|(_, user)| user.as_str()).collect();
        assert_eq!(left, ["alice"]);
        assert!(connections.due.is_empty(), "the service keeps them");
    }

    #[test]
    fn of_too_many_doors_the_oldest_are_forgotten_and_of_those_to_end_none() {
        let (mut connections, start) = (Connections::default(), Instant::now());
        for first in (0..=REMEMBERED).step_by(1024) {
            let now = start + Duration::from_millis(first as u64);
            let closed: Vec<_> =
                (first..REMEMBERED + 1).take(1024).map(|number| closed(number, "alice", true, now)).collect();
            connections.after(&closed, now);
        }
        let is_known = |number| {
            let (door, _) = closed(number, "alice", true, start);
            connections.past.keys().any(|(past, _)| *past == Door { once: false, ..door })
        };
        assert!(is_known(REMEMBERED) && !is_known(0));
        assert_eq!(connections.past.len(), KEPT);
        assert_eq!(connections.due.len(), REMEMBERED + 1);
        let at_once: Vec<_> = (0..=REMEMBERED).map(|number| closed(number, "bob", true, start)).collect();
        connections.after(&at_once, start + AGE);
        assert_eq!(connections.past.len(), KEPT, "also if all of them shut at one time");
    }

    #[test]
    fn looks_at_all_connections_leave_most_of_the_time_for_other_work() {
        let (mut connections, start) = (Connections::default(), Instant::now());
        connections.after(&[closed(1, "alice", true, start)], start);
        assert!(connections.is_time(start));
        for (took, pause) in [(1, 3000), (1000, 10_000)] {
            let took = Duration::from_millis(took);
            connections.rest(start, start + took);
            let end = start + took + Duration::from_millis(pause);
            assert!(!connections.is_time(end - Duration::from_millis(1)) && connections.is_time(end));
        }
    }
}
