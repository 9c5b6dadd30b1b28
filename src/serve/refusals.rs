//! Refusals in the log: the first of its kind at once, the rest counted and told together.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use tracing::{debug, info, warn};

use crate::service::Name;
use crate::verify::{Reason, Refusal};

/// Time after which counts are told.
const PERIOD: Duration = Duration::from_secs(60);

/// Kinds that are told apart within a period; more are counted under their reason alone.
const MAX_KINDS: usize = 64;

/// What was refused since the last telling.
pub struct Refusals {
    counts: HashMap<Kind, u64>,
    strangers: u64,
    since: Instant,
}

/// What is told together.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Kind {
    reason: Reason,
    of: Option<(Name, IpAddr)>,
}

impl Refusals {
    /// Starts counting.
    pub fn new(now: Instant) -> Self {
        Self { counts: HashMap::new(), strangers: 0, since: now }
    }

    /// Counts a refusal. One that the operator could do something about is told if it is the first of its kind.
    pub fn count(&mut self, refusal: &Refusal) {
        let Some(hint) = refusal.reason.explanation() else {
            self.strangers = self.strangers.saturating_add(1);
            return;
        };
        let mut kind = Kind { reason: refusal.reason, of: refusal.user.clone().zip(refusal.source) };
        if self.counts.len() >= MAX_KINDS && !self.counts.contains_key(&kind) {
            kind.of = None;
        }
        let count = self.counts.entry(kind.clone()).or_default();
        *count = count.saturating_add(1);
        match (*count, kind.of) {
            (1, Some((user, source))) => warn!(reason = %kind.reason, %user, %source, hint, "refused"),
            (1, None) => warn!(reason = %kind.reason, hint, "refused"),
            _ => {}
        }
    }

    /// Tells what came more than once, if the period is over.
    pub fn tell(&mut self, now: Instant) {
        let since = now.duration_since(self.since);
        if since < PERIOD {
            return;
        }
        let since = format!("{}s", since.as_secs());
        for (Kind { reason, of }, count) in self.counts.drain().filter(|(_, count)| *count > 1) {
            match of {
                Some((user, source)) => info!(%reason, %user, %source, count, %since, "refused"),
                None => info!(%reason, count, %since, "refused"),
            }
        }
        debug!(count = self.strangers, %since, "SYNs of strangers");
        self.strangers = 0;
        self.since = now;
    }
}
