//! Refusals in the log: the first of its kind at once, the rest counted and told together.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use tracing::{info, warn};

use crate::service::Name;
use crate::verify::{Reason, Refusal};

/// Time after which counts are told.
const PERIOD: Duration = Duration::from_secs(60);

/// Kinds that are told apart within a period; more are counted under their reason alone.
const MAX_KINDS: usize = 64;

/// What was refused since the last telling.
pub struct Refusals {
    counts: HashMap<(Reason, Option<Name>), u64>,
    strangers: u64,
    since: Instant,
}

impl Refusals {
    /// Starts counting.
    pub fn new(now: Instant) -> Self {
        Self { counts: HashMap::new(), strangers: 0, since: now }
    }

    /// Counts a refusal. One that the operator could do something about is told if it is the first of its kind.
    pub fn count(&mut self, refusal: &Refusal) {
        let Some(explanation) = refusal.reason.explanation() else {
            self.strangers = self.strangers.saturating_add(1);
            return;
        };
        let has_room = self.counts.len() < MAX_KINDS;
        let kind = (refusal.reason, refusal.user.clone().filter(|_| has_room));
        let count = self.counts.entry(kind).or_default();
        if *count == 0 {
            let user = refusal.user.as_ref().map(tracing::field::display);
            let source = refusal.source.map(tracing::field::display);
            warn!(reason = refusal.reason.as_str(), user, source, "refused: {explanation}");
        }
        *count = count.saturating_add(1);
    }

    /// Tells what came more than once, if the period is over.
    pub fn tell(&mut self, now: Instant) {
        let since = now.duration_since(self.since);
        if since < PERIOD {
            return;
        }
        for ((reason, user), count) in self.counts.drain().filter(|(_, count)| *count > 1) {
            let user = user.as_ref().map(tracing::field::display);
            info!(reason = reason.as_str(), user, count, since = format!("{}s", since.as_secs()), "refused");
        }
        tracing::debug!(count = self.strangers, since = format!("{}s", since.as_secs()), "SYNs of strangers");
        self.strangers = 0;
        self.since = now;
    }
}
