//! Refusals in the log: the first of its kind at once, the rest counted and told together; never more than a few lines a
//! second, whatever comes.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use tracing::{debug, info, warn};

use crate::service::Name;
use crate::verify::{Reason, Refusal, Withdrawal};

/// Time after which counts are told.
const PERIOD: Duration = Duration::from_secs(60);

/// Kinds that are told apart within a period; more are counted under their reason alone.
const MAX_KINDS: usize = 64;

/// Time after which another first one, or another count, is told.
const PAUSE: Duration = Duration::from_millis(500);

/// What was refused since the last telling.
pub struct Refusals {
    counts: HashMap<Kind, Count>,
    strangers: u64,
    since: Instant,
    /// Counts of the period before, to be told one after the other.
    over: VecDeque<(Kind, u64, Duration)>,
    first: Pace,
    count: Pace,
}

/// What is told together.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Kind {
    reason: Reason,
    user: Option<Name>,
}

/// How often, and what the first was like.
#[derive(Clone, Copy)]
struct Count {
    count: u64,
    is_told: bool,
    source: Option<IpAddr>,
    /// Where a token that is taken back came from then.
    elsewhere: Option<IpAddr>,
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
    /// Starts counting.
    pub fn new(now: Instant) -> Self {
        Self {
            counts: HashMap::new(),
            strangers: 0,
            since: now,
            over: VecDeque::new(),
            first: Pace::default(),
            count: Pace::default(),
        }
    }

    /// Counts a refusal. One that the operator could do something about is told if it is the first of its kind.
    pub fn count(&mut self, refusal: &Refusal, now: Instant) {
        if refusal.reason.explanation().is_none() {
            self.strangers = self.strangers.saturating_add(1);
            return;
        }
        self.add(Kind { reason: refusal.reason, user: refusal.user.clone() }, refusal.source, None, now);
    }

    /// Counts a grant that is taken back.
    pub fn count_withdrawal(&mut self, withdrawal: &Withdrawal, now: Instant) {
        let kind = Kind { reason: Reason::SpentTwice, user: Some(withdrawal.user.clone()) };
        self.add(kind, Some(withdrawal.source), Some(withdrawal.elsewhere), now);
    }

    fn add(&mut self, mut kind: Kind, source: Option<IpAddr>, elsewhere: Option<IpAddr>, now: Instant) {
        if self.counts.len() >= MAX_KINDS && !self.counts.contains_key(&kind) {
            kind.user = None;
        }
        let first = Count { count: 0, is_told: false, source, elsewhere };
        let count = self.counts.entry(kind.clone()).or_insert(first);
        count.count = count.count.saturating_add(1);
        if !count.is_told && self.first.is_time(now) {
            count.is_told = true;
            tell_first(&kind, count);
        }
    }

    /// Tells what is still to be told of this period, or of the one before; call it a few times a second.
    pub fn tell(&mut self, now: Instant) {
        if let Some((kind, count)) = self.counts.iter_mut().find(|(_, count)| !count.is_told)
            && self.first.is_time(now)
        {
            count.is_told = true;
            tell_first(kind, count);
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

fn tell_first(Kind { reason, user }: &Kind, Count { source, elsewhere, .. }: &Count) {
    let hint = reason.explanation();
    match (user, source, elsewhere) {
        (Some(user), Some(source), Some(elsewhere)) => {
            warn!(%reason, %user, %source, %elsewhere, hint, "withdrawn");
        }
        (Some(user), Some(source), None) => warn!(%reason, %user, %source, hint, "refused"),
        (None, Some(source), _) => warn!(%reason, %source, hint, "refused"),
        _ => warn!(%reason, hint, "refused"),
    }
}

fn tell_count((Kind { reason, user }, count, since): (Kind, u64, Duration)) {
    let since = format!("{}s", since.as_secs());
    match user {
        Some(user) => info!(%reason, %user, count, %since, "refused"),
        None => info!(%reason, count, %since, "refused"),
    }
}
