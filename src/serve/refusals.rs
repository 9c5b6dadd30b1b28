//! Refusals in the log: the first of its kind at once, the rest counted and told together; never more than a few lines a
//! second, whatever comes.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use tracing::field::display;
use tracing::{debug, info, warn};

use super::clock::unix_now;
use crate::service::Name;
use crate::verify::{Floor, Reason, Refusal, Withdrawal};

/// Time after which counts are told.
const PERIOD: Duration = Duration::from_secs(60);

/// Sources that are told apart within a period: enough to see what is wrong with somebody's, too few for an observer who
/// copies a knock to many. More are counted under their reason and user.
const MAX_SOURCES: usize = 8;

/// Kinds that are told apart within a period; more are counted under their reason alone.
const MAX_KINDS: usize = 64;

/// Time after which another first one, another count, or another withdrawal is told.
const PAUSE: Duration = Duration::from_millis(500);

/// Withdrawals that wait for their lines; more are counted.
const MAX_WAITING: usize = 64;

/// What was refused since the last telling.
pub struct Refusals {
    floor: Floor,
    counts: HashMap<Kind, Count>,
    strangers: u64,
    since: Instant,
    /// Counts of the period before, to be told one after the other.
    over: VecDeque<(Kind, u64, Duration)>,
    first: Pace,
    count: Pace,
    /// Grants that were taken back. Each has a line, as it had one when it was made, whatever else there is to tell.
    withdrawn: VecDeque<Withdrawal>,
    withdrawal: Pace,
    /// Those that there was no room for.
    untold: u64,
    /// Whose window was narrowed when that was told last.
    narrowed: HashSet<Name>,
}

/// What is told together.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Kind {
    reason: Reason,
    user: Option<Name>,
    source: Option<IpAddr>,
}

/// How often, and what the first was like.
#[derive(Clone, Copy)]
struct Count {
    count: u64,
    is_told: bool,
    source: Option<IpAddr>,
}

/// Lines with a pause between them.
#[derive(Default)]
struct Pace(Option<Instant>);

impl Pace {
    /// Whether it is time for another.
    fn is_time(&mut self, now: Instant) -> bool {
        let is_time = self.0.is_none_or(|last| now.duration_since(last) >= PAUSE);
        if is_time {
            self.0 = Some(now);
        }
        is_time
    }
}

impl Refusals {
    /// Starts counting where no token up to this floor is taken.
    pub fn new(now: Instant, floor: Floor) -> Self {
        Self {
            floor,
            counts: HashMap::new(),
            strangers: 0,
            since: now,
            over: VecDeque::new(),
            first: Pace::default(),
            count: Pace::default(),
            withdrawn: VecDeque::new(),
            withdrawal: Pace::default(),
            untold: 0,
            narrowed: HashSet::new(),
        }
    }

    /// Counts a refusal. One that the operator could do something about is told if it is the first of its kind.
    pub fn count(&mut self, refusal: &Refusal, now: Instant) {
        if refusal.reason.explanation().is_none() {
            self.strangers = self.strangers.saturating_add(1);
            return;
        }
        let mut kind = Kind { reason: refusal.reason, user: refusal.user.clone(), source: refusal.source };
        let source = kind.source;
        if self.counts.len() >= MAX_SOURCES && !self.counts.contains_key(&kind) {
            kind.source = None;
        }
        if self.counts.len() >= MAX_KINDS && !self.counts.contains_key(&kind) {
            kind.user = None;
        }
        let first = Count { count: 0, is_told: false, source };
        let count = self.counts.entry(kind.clone()).or_insert(first);
        count.count = count.count.saturating_add(1);
        if !count.is_told && self.first.is_time(now) {
            count.is_told = true;
            tell_first(&kind, count, self.floor);
        }
    }

    /// Notes a grant that is taken back.
    pub fn withdrawn(&mut self, withdrawal: Withdrawal, now: Instant) {
        if self.withdrawn.len() < MAX_WAITING {
            self.withdrawn.push_back(withdrawal);
        } else {
            self.untold = self.untold.saturating_add(1);
        }
        self.tell_withdrawal(now);
    }

    fn tell_withdrawal(&mut self, now: Instant) {
        let is_there = !self.withdrawn.is_empty() || self.untold > 0;
        if !is_there || !self.withdrawal.is_time(now) {
            return;
        }
        let (reason, hint) = (Reason::SpentTwice, Reason::SpentTwice.explanation());
        if let Some(Withdrawal { user, service, source, elsewhere, .. }) = self.withdrawn.pop_front() {
            let service = service.as_ref().map(display);
            warn!(%reason, %user, service, %source, %elsewhere, hint, "withdrawn");
        } else {
            let count = std::mem::take(&mut self.untold);
            warn!(%reason, count, hint, "withdrawn");
        }
    }

    /// Tells when wrong tags begin to abound for more users than these were.
    pub fn tell_narrowed<'a>(&mut self, narrowed: impl Iterator<Item = &'a Name>) {
        let narrowed: HashSet<Name> = narrowed.cloned().collect();
        if let Some(user) = narrowed.difference(&self.narrowed).next() {
            let users = narrowed.len();
            warn!(%user, users, "many wrong tags: for a minute only knocks with a clock within 5 s count for this user");
        }
        self.narrowed = narrowed;
    }

    /// Tells what is still to be told of this period, or of the one before; call it a few times a second.
    pub fn tell(&mut self, now: Instant) {
        self.tell_withdrawal(now);
        if let Some((kind, count)) = self.counts.iter_mut().find(|(_, count)| !count.is_told)
            && self.first.is_time(now)
        {
            count.is_told = true;
            tell_first(kind, count, self.floor);
        }
        let since = now.duration_since(self.since);
        if since >= PERIOD {
            let repeated = self.counts.drain().filter(|(_, count)| count.count > 1 || !count.is_told);
            self.over = repeated.map(|(kind, count)| (kind, count.count, since)).collect();
            debug!(count = self.strangers, ?since, "SYNs of strangers");
            (self.strangers, self.since) = (0, now);
        }
        if !self.over.is_empty() && self.count.is_time(now) {
            self.over.pop_front().into_iter().for_each(tell_count);
        }
    }
}

fn tell_first(Kind { reason, user, .. }: &Kind, Count { source, .. }: &Count, floor: Floor) {
    let shut = floor.shut(unix_now()).filter(|_| *reason == Reason::InDoubt).map(|shut| shut.to_string());
    let hint = shut.as_deref().or(reason.explanation());
    match (user, source) {
        (Some(user), Some(source)) => warn!(%reason, %user, %source, hint, "refused"),
        (None, Some(source)) => warn!(%reason, %source, hint, "refused"),
        _ => warn!(%reason, hint, "refused"),
    }
}

fn tell_count((Kind { reason, user, source }, count, since): (Kind, u64, Duration)) {
    let since = format!("{}s", since.as_secs());
    match (user, source) {
        (Some(user), Some(source)) => info!(%reason, %user, %source, count, %since, "refused"),
        (Some(user), None) => info!(%reason, %user, count, %since, "refused"),
        (None, Some(source)) => info!(%reason, %source, count, %since, "refused"),
        (None, None) => info!(%reason, count, %since, "refused"),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};
    use std::sync::{Arc, Mutex};

    use super::{Duration, Floor, Instant, IpAddr, MAX_SOURCES, PERIOD, Reason, Refusal, Refusals, Withdrawal};

    /// Time between two ticks of the engine's.
    const TICK: Duration = Duration::from_millis(250);

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// The lines that some work logs.
    fn lines(work: impl FnOnce(&mut Refusals, Instant)) -> Vec<String> {
        let (lines, now) = (Lines::default(), Instant::now());
        let writer = lines.clone();
        let subscriber = tracing_subscriber::fmt().with_ansi(false).without_time().with_writer(move || writer.clone());
        tracing::subscriber::with_default(subscriber.finish(), || work(&mut Refusals::new(now, Floor::default()), now));
        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    fn replay(user: &str, source: u8) -> Refusal {
        let source = Some(IpAddr::from([192, 0, 2, source]));
        Refusal { reason: Reason::Replayed, user: Some(user.parse().unwrap()), source }
    }

    #[test]
    fn refusals_of_one_kind_are_told_once_and_then_counted() {
        let lines = lines(|refusals, now| {
            (0..118).for_each(|_| refusals.count(&replay("alice", 1), now));
            refusals.tell(now + PERIOD);
            refusals.count(&replay("alice", 1), now + PERIOD + TICK);
            refusals.tell(now + 2 * PERIOD);
        });
        assert_eq!(lines.len(), 3, "{lines:?}");
        assert!(lines[0].contains("refused reason=replayed user=alice source=192.0.2.1 hint="), "{lines:?}");
        assert!(
            lines[1].ends_with("refused reason=replayed user=alice source=192.0.2.1 count=118 since=60s"),
            "{lines:?}"
        );
        assert!(lines[2].contains("refused reason=replayed user=alice source=192.0.2.1 hint="), "{lines:?}");
    }

    #[test]
    fn a_few_sources_are_told_apart_and_all_others_are_counted_together() {
        let lines = lines(|refusals, now| {
            (0..118).for_each(|source| refusals.count(&replay("alice", source), now));
            (0..=4 * 61).for_each(|tick| refusals.tell(now + TICK * tick));
        });
        let first = |line: &&String| line.contains("user=alice source=192.0.2.") && line.contains("hint=");
        assert_eq!(lines.iter().filter(first).count(), MAX_SOURCES + 1, "{lines:?}");
        assert!(lines.last().unwrap().ends_with("refused reason=replayed user=alice count=110 since=60s"), "{lines:?}");
        assert_eq!(lines.len(), MAX_SOURCES + 2, "{lines:?}");
    }

    #[test]
    fn many_kinds_at_once_are_told_a_few_a_second_and_none_is_forgotten() {
        let lines = lines(|refusals, now| {
            for tick in 0..4 * 60 {
                let now = now + TICK * tick;
                for user in 0..60 {
                    (0..2).for_each(|_| refusals.count(&replay(&format!("user{user}"), 1), now));
                }
                refusals.tell(now);
            }
            (4 * 60..4 * 120).for_each(|tick| refusals.tell(now + TICK * tick));
        });
        let of = |user: usize| lines.iter().filter(move |line| line.contains(&format!("user=user{user} ")));
        for user in 0..60 {
            assert_eq!(of(user).count(), 2, "the first and the count of {user}: {lines:?}");
        }
        assert_eq!(lines.len(), 2 * 60);
    }

    #[test]
    fn no_more_than_four_lines_a_second_come_of_any_refusals() {
        for second in [0, 60] {
            let lines = lines(|refusals, now| {
                (0..60).for_each(|user| refusals.count(&replay(&format!("user{user}"), 1), now));
                let from = now + Duration::from_secs(second);
                let ticks = (0..4).map(|tick| from + TICK * tick);
                ticks.for_each(|now| {
                    (0..60).for_each(|user| refusals.count(&replay(&format!("other{user}"), 1), now));
                    refusals.tell(now);
                });
            });
            assert!((2..=1 + 4).contains(&lines.len()), "{lines:?}");
        }
    }

    fn withdrawal(source: IpAddr, elsewhere: IpAddr) -> Withdrawal {
        let (user, service) = ("alice".parse().unwrap(), Some("ssh".parse().unwrap()));
        Withdrawal { user, service, source, elsewhere, ports: Vec::new(), token: 1 }
    }

    #[test]
    fn a_withdrawal_names_user_service_and_both_addresses_and_says_what_helps() {
        for [source, elsewhere] in [["192.0.2.1", "192.0.2.2"], ["2001:db8::1", "2001:db8::2"]] {
            let withdrawal = withdrawal(source.parse().unwrap(), elsewhere.parse().unwrap());
            let lines = lines(|refusals, now| refusals.withdrawn(withdrawal, now));
            let said = format!(
                "withdrawn reason=spent_twice user=alice service=ssh source={source} elsewhere={elsewhere} hint="
            );
            assert!(lines[0].contains(&said) && lines[0].contains("--source"), "{lines:?}");
        }
    }

    #[test]
    fn that_wrong_tags_abound_is_told_when_it_begins_for_a_user() {
        let [alice, mallory] = ["alice", "mallory"].map(|name| name.parse().unwrap());
        let lines = lines(|refusals, _| {
            for narrowed in [&[&mallory][..], &[&mallory], &[&mallory, &alice], &[&alice], &[], &[&mallory]] {
                refusals.tell_narrowed(narrowed.iter().copied());
            }
        });
        let told: Vec<&str> = lines.iter().filter_map(|line| line.split("this user ").nth(1)).collect();
        assert_eq!(told, ["user=mallory users=1", "user=alice users=2", "user=mallory users=1"], "{lines:?}");
    }

    #[test]
    fn each_withdrawal_has_its_line_whatever_else_is_told_and_no_more_than_two_come_in_a_second() {
        let lines = lines(|refusals, now| {
            (0..60).for_each(|user| refusals.count(&replay(&format!("user{user}"), 1), now));
            let [source, elsewhere] = [1, 2].map(|host| IpAddr::from([192, 0, 2, host]));
            (0..200).for_each(|_| refusals.withdrawn(withdrawal(source, elsewhere), now));
            (0..4 * 40).for_each(|tick| refusals.tell(now + TICK * tick));
        });
        let withdrawn: Vec<_> = lines.iter().filter(|line| line.contains("withdrawn")).collect();
        assert_eq!(
            withdrawn.iter().filter(|line| line.contains("user=alice service=ssh")).count(),
            65,
            "{withdrawn:?}"
        );
        assert!(withdrawn[65].contains("withdrawn reason=spent_twice count=135"), "{withdrawn:?}");
    }
}
