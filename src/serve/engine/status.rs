//! What there is to tell of all.

use std::collections::BTreeMap;
use std::time::Instant;

use super::Process;
use crate::serve::clock::unix_now;
use crate::serve::report::{ClockHealth, Queue, Status, Syns, Table, TableMode};
use crate::verify::Reason;

impl Process {
    pub(super) fn status(&mut self) -> Status {
        let (now, unix_now) = (Instant::now(), unix_now());
        let mode = if self.reconciler.owns_table() { TableMode::Managed } else { TableMode::External };
        let table = Table {
            mode,
            right: self.reload.look.is_none(),
            owned: self.reconciler.is_ours_alone(),
            trial_seconds_left: self.trial.map(|end| end.saturating_duration_since(now).as_secs()),
        };
        let queue = self.queues.as_ref().and_then(|queues| Queue::read(queues, self.outline.queue));
        let packets: BTreeMap<_, _> = self.figures.packets().collect();
        let (jumps, last_jump) = self.figures.jumps();
        let narrowed = self.verifier.narrowed(unix_now).cloned().collect();
        let floor = self.verifier.effective_floor();
        let over_rate = packets.get(&Reason::OverRate).copied().unwrap_or(0);
        let (doors, seen, dropped_by_relay) = self.reconciler.doors(over_rate);
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_seconds: now.duration_since(self.started).as_secs(),
            users: self.outline.users,
            services: self.outline.services,
            reloaded: self.reload.last,
            table,
            syns: Syns {
                seen,
                queue: queue.map(|_| self.outline.queue),
                waiting: queue.map(|queue| queue.waiting),
                dropped_by_kernel: queue.map(|queue| queue.dropped),
                dropped_by_relay,
            },
            packets,
            doors,
            knocks: self.figures.knocks(),
            store: self.figures.store(floor, !self.reload.waits_for_disk, unix_now),
            clock: ClockHealth { synchronized: false, jumps, last_jump, narrowed },
            is_cut: false,
        }
    }
}
