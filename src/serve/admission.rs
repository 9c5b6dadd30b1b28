//! What of the engine's commands the gate carries out: those within the limits, and no more doors than the rate allows.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::commands::Command;
use super::limits::Limits;
use super::rate::Rate;
use crate::nft::{Door, Element, Member};

/// Doors that are remembered at most: what the kernel's four sets hold.
const MAX_DOORS: usize = 4 * 65_535;

/// An element may have so much more time than was paid for: the engine rounds to whole seconds.
const TOLERANCE: Duration = Duration::from_secs(1);

/// The limits, and what was paid for: each door that opens, or stays open for longer, takes one out of the rate.
pub struct Admission {
    limits: Limits,
    /// What comes into force when the engine has its new settings. Until then either holds.
    next: Option<Limits>,
    /// Strangers' packets are taken. Before, none can have told the engine what to ask.
    is_open: bool,
    rate: Rate,
    opened: BTreeMap<Door, Opened>,
}

/// Until when a door may stand without being paid for again.
struct Opened {
    until: Instant,
    /// Of a door for one connection: it was paid for, and has not let anybody in.
    is_unused: bool,
    is_told: bool,
}

/// No engine of ours would ask for this.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NotPermitted;

impl Admission {
    /// Nothing is open.
    pub fn new(limits: Limits, now: Instant) -> Self {
        let rate = Rate::new(limits.grants_per_minute, now);
        Self { limits, next: None, is_open: false, rate, opened: BTreeMap::new() }
    }

    /// What holds now.
    pub const fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Whether strangers' packets are taken.
    pub const fn is_open(&self) -> bool {
        self.is_open
    }

    /// From now on these hold too.
    pub fn prepare(&mut self, limits: Limits) {
        self.next = Some(limits);
    }

    /// From now on they alone hold, and strangers' packets are taken.
    pub fn enforce(&mut self) {
        if let Some(limits) = self.next.take() {
            self.rate.change(limits.grants_per_minute);
            self.limits = limits;
        }
        self.is_open = true;
    }

    /// Whether a command is carried out; `false` if it exceeds the rate.
    ///
    /// # Errors
    /// When it is beyond the limits.
    pub fn admits(&mut self, command: &Command, now: Instant) -> Result<bool, NotPermitted> {
        match command {
            Command::Put(Element::Opens(door), time, _) => self.admits_door(*door, *time, true, now),
            Command::Put(Element::Lasts(door), time, _) => self.admits_door(*door, *time, false, now),
            Command::Put(Element::Member(member), time, _) if self.is_let_in(member, *time, now) => Ok(true),
            Command::Delete(element) | Command::Ask(element, _) if self.may_touch(element) => Ok(true),
            Command::Known(Element::Opens(door), time) if !self.is_open && self.opened.len() < MAX_DOORS => {
                let until = now.checked_add(*time).ok_or(NotPermitted)?;
                self.opened.insert(*door, Opened { until, is_unused: false, is_told: true });
                Ok(true)
            }
            Command::Next | Command::Forget | Command::Count => Ok(true),
            _ => Err(NotPermitted),
        }
    }

    /// A door for one connection is paid for each time that it opens, any other for its time.
    fn admits_door(&mut self, door: Door, time: Duration, begins: bool, now: Instant) -> Result<bool, NotPermitted> {
        let until = now.checked_add(time).ok_or(NotPermitted)?;
        let before = self.opened.get_mut(&door);
        if let Some(opened) = before
            && until <= opened.until + TOLERANCE
            && (!door.once || !begins || opened.is_unused)
        {
            opened.is_unused &= !begins;
            return Ok(true);
        }
        let most = self.all_limits().map(|limits| limits.seconds(door.source, door.port, door.once)).max();
        if time > Duration::from_secs(most.unwrap_or(0).into()) {
            return Err(NotPermitted);
        }
        let has_room = self.opened.len() < MAX_DOORS || self.opened.contains_key(&door);
        let is_paid = has_room && self.rate.take(now);
        if is_paid {
            let until = self.opened.get(&door).map_or(until, |opened| opened.until.max(until));
            self.opened.insert(door, Opened { until, is_unused: !begins, is_told: false });
        }
        Ok(is_paid)
    }

    /// Whether a source may be in a set of the administrator's: it has a door for as long.
    fn is_let_in(&self, member: &Member, time: Duration, now: Instant) -> bool {
        let doors = self.opened.range(Door::first_of(member.source)..);
        let mut doors = doors.take_while(|(door, _)| door.source == member.source);
        let has_door =
            now.checked_add(time).is_some_and(|until| doors.any(|(_, door)| until <= door.until + TOLERANCE));
        has_door && self.may_touch(&Element::Member(member.clone()))
    }

    /// Whether the set is ours, or the administrator lets the engine fill it.
    fn may_touch(&self, element: &Element) -> bool {
        match element {
            Element::Member(Member { set, .. }) => self.all_limits().any(|limits| limits.sets.contains(set)),
            Element::Opens(_) | Element::Lasts(_) => true,
        }
    }

    fn all_limits(&self) -> impl Iterator<Item = &Limits> {
        self.next.iter().chain([&self.limits])
    }

    /// Whether this door was paid for, and nobody was told yet.
    pub fn take_untold(&mut self, door: &Door) -> bool {
        self.opened.get_mut(door).is_some_and(|opened| !std::mem::replace(&mut opened.is_told, true))
    }

    /// Forgets doors whose time is over.
    pub fn forget(&mut self, now: Instant) {
        self.opened.retain(|_, opened| opened.until > now);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::{Just, ProptestConfig, Strategy, prop_assert, prop_oneof, proptest};

    use super::{Admission, Command, Door, Duration, Element, Instant, Limits, Member, NotPermitted, TOLERANCE};
    use crate::nft::{Comment, Query};

    /// Doors a minute.
    const RATE: usize = 5;

    fn limits() -> Limits {
        let ports = "port tcp/22 60\nonce tcp/25 30\nfrom 192.0.2.0/24\nfrom 2001:db8::/64\nset inet filter mine\n";
        format!("rate {RATE}\n{ports}").parse().unwrap()
    }

    fn door(source: &str, port: &str, once: bool) -> Door {
        Door { source: source.parse().unwrap(), port: port.parse().unwrap(), once }
    }

    fn member(source: &str, set: &str) -> Element {
        Element::Member(Member { set: set.parse().unwrap(), source: source.parse().unwrap(), port: None })
    }

    fn put(element: Element, seconds: u64) -> Command {
        Command::Put(element, Duration::from_secs(seconds), Comment::read("alice ssh 1 00000001").unwrap())
    }

    #[test]
    fn what_is_beyond_the_limits_is_refused_and_a_reload_changes_them() {
        let now = Instant::now();
        for (source, other) in [("192.0.2.1", "198.51.100.1"), ("2001:db8::1", "2001:db9::1")] {
            let mut gate = Admission::new(limits(), now);
            let good = put(Element::Opens(door(source, "tcp/22", false)), 60);
            assert_eq!(
                gate.admits(&Command::Known(Element::Opens(door(other, "tcp/1", false)), Duration::MAX), now),
                Err(NotPermitted)
            );
            gate.enforce();
            for command in [
                put(Element::Opens(door(source, "tcp/22", false)), 61),
                put(Element::Opens(door(source, "tcp/22", true)), 1),
                put(Element::Opens(door(source, "udp/22", false)), 1),
                put(Element::Opens(door(other, "tcp/22", false)), 1),
                put(Element::Lasts(door(source, "tcp/25", true)), 31),
                put(member(source, "inet filter mine"), 1),
                Command::Delete(member(source, "inet filter others")),
                Command::Ask(member(source, "inet filter others"), Query::Layout),
                Command::Known(Element::Opens(door(source, "tcp/22", false)), Duration::from_secs(1)),
            ] {
                assert_eq!(gate.admits(&command, now), Err(NotPermitted), "{command:?}");
            }
            assert_eq!(gate.admits(&good, now), Ok(true));
            assert_eq!(gate.admits(&put(member(source, "inet filter mine"), 60), now), Ok(true));
            assert_eq!(gate.admits(&put(member(source, "inet filter others"), 60), now), Err(NotPermitted));
            gate.prepare("rate 5\nfrom any\nport tcp/80 9\n".parse().unwrap());
            let later = now + Duration::from_secs(30);
            let next = put(Element::Opens(door(other, "tcp/80", false)), 9);
            assert_eq!([&good, &next].map(|command| gate.admits(command, later)), [Ok(true); 2], "either holds");
            gate.enforce();
            assert_eq!(gate.admits(&next, later + Duration::from_secs(9)), Ok(true));
            assert_eq!(gate.admits(&good, later + Duration::from_secs(9)), Err(NotPermitted));
            assert_eq!(
                gate.admits(&put(Element::Opens(door(source, "tcp/22", false)), 20), later),
                Ok(true),
                "paid for"
            );
        }
    }

    fn asked() -> impl Strategy<Value = (Command, u64)> {
        let source = prop_oneof![Just("192.0.2.1"), Just("192.0.2.2"), Just("2001:db8::1")];
        let element = (source, 0..4_u8).prop_map(|(source, kind)| match kind {
            0 => Element::Opens(door(source, "tcp/22", false)),
            1 => Element::Opens(door(source, "tcp/25", true)),
            2 => Element::Lasts(door(source, "tcp/25", true)),
            _ => member(source, "inet filter mine"),
        });
        let command = (element, 1..=60_u64, 0..3_u8).prop_map(|(element, seconds, kind)| match kind {
            0 => Command::Delete(element),
            _ => put(element, seconds),
        });
        (command, 0..20_u64)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// However it asks: no more doors begin to stand, or stand for longer, than the rate pays for; and nobody is in a set
        /// of the administrator's for longer than in a door.
        #[test]
        fn an_owned_engine_opens_no_more_than_the_rate_allows(asked in proptest::collection::vec(asked(), 1..60)) {
            let (mut gate, start) = (Admission::new(limits(), Instant::now()), Instant::now());
            gate.enforce();
            let (mut now, mut paid) = (start, Vec::new());
            let mut covered: BTreeMap<Door, Instant> = BTreeMap::new();
            let mut unused: BTreeSet<Door> = BTreeSet::new();
            for (command, pause) in asked {
                now += Duration::from_secs(pause);
                gate.forget(now);
                let Command::Put(element, time, _) = &command else {
                    prop_assert!(gate.admits(&command, now) == Ok(true));
                    continue;
                };
                let (until, admitted) = (now + *time, gate.admits(&command, now));
                match element {
                    Element::Member(member) => {
                        let most = covered.iter().filter(|(door, _)| door.source == member.source).map(|(_, end)| *end).max();
                        prop_assert!(admitted != Ok(true) || most.is_some_and(|most| until <= most + TOLERANCE));
                    }
                    Element::Opens(door) | Element::Lasts(door) if admitted == Ok(true) => {
                        let begins = matches!(element, Element::Opens(_));
                        let is_covered = covered.get(door).is_some_and(|end| until <= *end + TOLERANCE);
                        if !is_covered || (door.once && begins && !unused.contains(door)) {
                            paid.push(now);
                            let end = covered.get(door).map_or(until, |end| until.max(*end));
                            covered.insert(*door, end);
                            unused.insert(*door);
                        }
                        if begins {
                            unused.remove(door);
                        }
                    }
                    Element::Opens(_) | Element::Lasts(_) => {}
                }
                let minutes = now.duration_since(start).as_secs_f64() / 60.0;
                prop_assert!(paid.len() as f64 <= RATE as f64 * (1.0 + minutes) + 1e-9, "{} in {minutes} min", paid.len());
            }
        }
    }
}
