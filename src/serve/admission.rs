//! What of the engine's commands the gate carries out: those within the limits, and no more doors than the rate allows.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::commands::Command;
use super::limits::Limits;
use super::rate::Rate;
use crate::nft::{Door, Element, Member};

/// Doors that are remembered at most: what open4, open6, once4 and once6 hold.
const MAX_DOORS: usize = 4 * 65_535;

/// An element may have so much more time than was paid for: the engine rounds to whole seconds.
const TOLERANCE: Duration = Duration::from_secs(1);

/// Milliseconds that a command takes to come here, mostly far fewer.
const ON_THE_WAY: u128 = 20;

/// The limits, and what was paid for: each door that opens, or stays open for longer, takes one out of the rate.
pub struct Admission {
    limits: Limits,
    /// What comes into force when the engine has its new settings. Until then either holds.
    next: Option<Limits>,
    /// Strangers' packets are taken. Before, none can have told the engine what to ask.
    is_open: bool,
    rate: Rate,
    opened: BTreeMap<Door, Paid>,
}

/// Until when a door may stand without being paid for again.
struct Paid {
    until: Instant,
    /// It was paid for, and the kernel has not taken it yet: what it refuses may be asked for again.
    is_unused: bool,
    /// Until when it has stood open by what the kernel has taken; `None` if it has not yet.
    taken_until: Option<Instant>,
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
        self.rate.change(limits.grants_per_minute.max(self.limits.grants_per_minute));
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

    /// For how long what a command asks for may be so; `None` if it is not carried out: the rate is exceeded, or there is no door
    /// for whom it would put into a set. What is asked for too long, as by an engine or a gate that was held up, gets less.
    ///
    /// # Errors
    /// When it is nothing that any limit names.
    pub fn admits(&mut self, command: &Command, now: Instant) -> Result<Option<Duration>, NotPermitted> {
        const ALWAYS: Result<Option<Duration>, NotPermitted> = Ok(Some(Duration::MAX));
        match command {
            Command::Put(Element::Opens(door), time, _) => self.admits_door(*door, *time, true, now),
            Command::Put(Element::Lasts(door), time, _) => self.admits_door(*door, *time, false, now),
            Command::Put(element @ Element::Member(member), time, _) if self.may_touch(element) => {
                Ok(self.let_in(member, now).map(|most| most.min(*time)))
            }
            Command::Delete(element) | Command::Ask(element, _) if self.may_touch(element) => ALWAYS,
            // Free, for no packet has been taken yet: nobody can have taken the engine over.
            Command::Known(Element::Opens(door), time) if !self.is_open => {
                let until = now.checked_add(*time).ok_or(NotPermitted)?;
                if self.seconds(door) > 0 && self.opened.len() < MAX_DOORS {
                    self.opened
                        .insert(*door, Paid { until, is_unused: false, taken_until: Some(until), is_told: true });
                }
                ALWAYS // what is not noted is paid for when it is put
            }
            Command::Next | Command::Forget | Command::Count => ALWAYS,
            _ => Err(NotPermitted),
        }
    }

    /// A door for one connection is paid for each time that it opens, any other for its time.
    fn admits_door(
        &mut self,
        door: Door,
        time: Duration,
        begins: bool,
        now: Instant,
    ) -> Result<Option<Duration>, NotPermitted> {
        let most = Duration::from_secs(self.seconds(&door).into());
        let before = self.opened.get(&door).map(|opened| (opened.until, opened.is_unused));
        let taken_until = self.opened.get(&door).and_then(|opened| opened.taken_until);
        // More than may be now, if that was paid for under limits of before.
        let paid = before.map_or(Duration::ZERO, |(until, _)| until.saturating_duration_since(now));
        if most.max(paid).is_zero() {
            return Err(NotPermitted);
        }
        let time = time.min(most.max(paid + TOLERANCE));
        let until = now.checked_add(time).ok_or(NotPermitted)?;
        if before.is_some_and(|(end, is_unused)| until <= end + TOLERANCE && (!door.once || !begins || is_unused)) {
            return Ok(Some(time));
        }
        let time = whole_seconds(time).min(most.max(paid));
        let has_room = before.is_some() || self.opened.len() < MAX_DOORS;
        if most.is_zero() || !has_room || !self.rate.take(now) {
            return Ok(None);
        }
        let until = before.map_or(now + time, |(end, _)| end.max(now + time));
        self.opened.insert(door, Paid { until, is_unused: true, taken_until, is_told: false });
        Ok(Some(time))
    }

    /// For how many seconds a door may be open at most.
    fn seconds(&self, Door { source, port, once }: &Door) -> u32 {
        self.all_limits().map(|limits| limits.seconds(*source, *port, *once)).max().unwrap_or(0)
    }

    /// For how long a source may be in a set of the administrator's: as long as a door that has opened for it, at this port if the
    /// set has ports.
    fn let_in(&self, Member { source, port, .. }: &Member, now: Instant) -> Option<Duration> {
        let doors = self.opened.range(Door::first_of(*source)..).take_while(|(door, _)| door.source == *source);
        let doors = doors.filter(|(door, _)| port.is_none_or(|port| port == door.port));
        let until = doors.filter_map(|(_, opened)| opened.taken_until).filter(|until| *until > now).max()?;
        Some(until.saturating_duration_since(now) + TOLERANCE)
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

    /// The kernel has taken a door that was admitted; whether nobody was told of it yet.
    pub fn opens(&mut self, door: &Door) -> bool {
        self.opened.get_mut(door).is_some_and(|opened| {
            (opened.is_unused, opened.taken_until) = (false, Some(opened.until));
            !std::mem::replace(&mut opened.is_told, true)
        })
    }

    /// Forgets doors whose time is over.
    pub fn forget(&mut self, now: Instant) {
        self.opened.retain(|_, opened| opened.until > now);
    }
}

/// To the second that was asked for, which began on the way here.
fn whole_seconds(time: Duration) -> Duration {
    let begun = time.as_millis() % 1000 >= 1000 - ON_THE_WAY;
    if begun { Duration::from_secs(time.as_secs() + 1) } else { time }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop_assert, prop_oneof, proptest};

    use super::{Admission, Command, Door, Duration, Element, Instant, Limits, Member, NotPermitted, TOLERANCE};
    use crate::nft::{Comment, Query};

    /// Doors a minute.
    const RATE: u32 = 5;

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

    /// For how many seconds it may be, if it is carried out.
    fn admitted(gate: &mut Admission, command: &Command, now: Instant) -> Result<Option<u64>, NotPermitted> {
        gate.admits(command, now).map(|time| time.map(|time| time.as_secs()))
    }

    #[test]
    fn what_is_beyond_the_limits_is_refused_and_a_reload_changes_them() {
        let now = Instant::now();
        for (source, other) in [("192.0.2.1", "198.51.100.1"), ("2001:db8::1", "2001:db9::1")] {
            let mut gate = Admission::new(limits(), now);
            let ssh = door(source, "tcp/22", false);
            let good = put(Element::Opens(ssh), 60);
            let foreign = Element::Opens(door(other, "tcp/22", false));
            assert!(
                gate.admits(&Command::Known(foreign.clone(), Duration::from_secs(60)), now).is_ok(),
                "but not noted"
            );
            gate.enforce();
            for seconds in [0, 1, 60] {
                for command in [
                    put(foreign.clone(), seconds),
                    put(Element::Opens(door(source, "tcp/22", true)), seconds),
                    put(Element::Opens(door(source, "udp/22", false)), seconds),
                    put(Element::Opens(door(source, "tcp/80", false)), seconds),
                    put(Element::Lasts(door(other, "tcp/25", true)), seconds),
                    put(member(source, "inet filter others"), seconds),
                    Command::Delete(member(source, "inet filter others")),
                    Command::Ask(member(source, "inet filter others"), Query::Layout),
                    Command::Known(Element::Opens(ssh), Duration::from_secs(seconds)),
                ] {
                    assert_eq!(gate.admits(&command, now), Err(NotPermitted), "{command:?}");
                }
            }
            let mine = put(member(source, "inet filter mine"), 60);
            assert_eq!(gate.admits(&mine, now), Ok(None), "there is no door");
            assert_eq!(
                admitted(&mut gate, &put(Element::Opens(ssh), 3600), now),
                Ok(Some(60)),
                "no longer than it may"
            );
            assert_eq!(gate.admits(&mine, now), Ok(None), "it was paid for, and is not open");
            assert!(gate.opens(&ssh) && !gate.opens(&ssh), "told once");
            assert_eq!(admitted(&mut gate, &mine, now), Ok(Some(60)));
            let port = |port: &str| {
                let set = "inet filter mine".parse().unwrap();
                Element::Member(Member { set, source: source.parse().unwrap(), port: Some(port.parse().unwrap()) })
            };
            assert_eq!(admitted(&mut gate, &put(port("tcp/22"), 60), now), Ok(Some(60)));
            assert_eq!(gate.admits(&put(port("tcp/3306"), 60), now), Ok(None), "another port");

            gate.prepare("rate 5\nfrom any\nport tcp/80 9\n".parse().unwrap());
            let later = now + Duration::from_secs(30);
            let next = put(Element::Opens(door(other, "tcp/80", false)), 9);
            assert_eq!(admitted(&mut gate, &good, later), Ok(Some(60)), "either holds");
            assert_eq!(admitted(&mut gate, &next, later), Ok(Some(9)), "either holds");
            gate.enforce();
            let later = later + Duration::from_secs(9);
            assert_eq!(admitted(&mut gate, &next, later), Ok(Some(9)));
            assert_eq!(admitted(&mut gate, &good, later), Ok(Some(52)), "what was paid for, and a second");
            let other_ssh = put(Element::Opens(door(other, "tcp/22", false)), 1);
            assert_eq!(gate.admits(&other_ssh, later), Err(NotPermitted));
        }
    }

    /// What is asked, how long after the one before, and whether the kernel takes it.
    fn asked() -> impl Strategy<Value = (Command, u64, bool)> {
        let source = prop_oneof![Just("192.0.2.1"), Just("192.0.2.2"), Just("2001:db8::1"), Just("198.51.100.1")];
        let element = (source, 0..5_u8).prop_map(|(source, kind)| match kind {
            0 => Element::Opens(door(source, "tcp/22", false)),
            1 => Element::Opens(door(source, "tcp/25", true)),
            2 => Element::Lasts(door(source, "tcp/25", true)),
            3 => Element::Opens(door(source, "tcp/80", false)),
            _ => member(source, "inet filter mine"),
        });
        let command = (element, 0..=90_u64, 0..3_u8).prop_map(|(element, seconds, kind)| match kind {
            0 => Command::Delete(element),
            _ => put(element, seconds),
        });
        (command, 0..20_u64, any::<bool>())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]

        /// However it asks: no more doors begin to stand, or stand for longer, than the rate pays for; none that is not
        /// configured; and nobody is in a set of the administrator's for longer than in a door that has opened.
        #[test]
        fn an_owned_engine_opens_no_more_than_the_rate_allows(asked in proptest::collection::vec(asked(), 1..60)) {
            let (mut gate, start) = (Admission::new(limits(), Instant::now()), Instant::now());
            gate.enforce();
            let (mut now, mut paid) = (start, 0_u32);
            let mut covered: BTreeMap<Door, Instant> = BTreeMap::new();
            let mut taken: BTreeMap<Door, Instant> = BTreeMap::new();
            let mut unused: BTreeSet<Door> = BTreeSet::new();
            for (command, pause, is_taken) in asked {
                now += Duration::from_secs(pause);
                gate.forget(now);
                let Command::Put(element, _, _) = &command else {
                    prop_assert!(gate.admits(&command, now) == Ok(Some(Duration::MAX)));
                    continue;
                };
                let admitted = gate.admits(&command, now);
                let Ok(Some(time)) = admitted else {
                    let is_near = |source: &std::net::IpAddr| source.to_string() != "198.51.100.1";
                    let (Element::Opens(Door { source, port, .. }) | Element::Lasts(Door { source, port, .. })) = element else {
                        prop_assert!(admitted == Ok(None));
                        continue;
                    };
                    prop_assert!((admitted == Ok(None)) == (is_near(source) && port.number != 80));
                    continue;
                };
                let until = now + time;
                match element {
                    Element::Member(member) => {
                        let doors = taken.iter().filter(|(door, _)| door.source == member.source);
                        let most = doors.map(|(_, end)| *end).max();
                        prop_assert!(most.is_some_and(|most| until <= most + TOLERANCE), "{member:?}");
                    }
                    Element::Opens(door) | Element::Lasts(door) => {
                        prop_assert!(door.source.to_string() != "198.51.100.1" && door.port.number != 80);
                        let begins = matches!(element, Element::Opens(_));
                        let is_covered = covered.get(door).is_some_and(|end| until <= *end + TOLERANCE);
                        if !is_covered || (door.once && begins && !unused.contains(door)) {
                            paid += 1;
                            let most = if door.once { 30 } else { 60 };
                            prop_assert!(time <= Duration::from_secs(most));
                            let end = covered.get(door).map_or(until, |end| until.max(*end));
                            covered.insert(*door, end);
                            unused.insert(*door);
                        }
                        if begins && is_taken {
                            gate.opens(door);
                            taken.insert(*door, covered[door]);
                            unused.remove(door);
                        }
                    }
                }
                let minutes = now.duration_since(start).as_secs_f64() / 60.0;
                prop_assert!(f64::from(paid) <= f64::from(RATE) * (1.0 + minutes) + 1e-9, "{paid} in {minutes} min");
            }
        }
    }
}
