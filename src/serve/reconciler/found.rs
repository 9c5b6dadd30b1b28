//! What is found in the kernel, which others may have put there, beside what the ledger says.

use std::time::Instant;

use tracing::warn;

use super::Reconciler;
use crate::nft::{Comment, Door, Element, ElementError, Lister, Open, OpenDoor};
use crate::serve::ledger::Hold;

/// What to do about doors that were saved.
const SAVING: &str = "save all tables but knockq's: docs/guide-server.md#saving-the-firewall";

impl Reconciler {
    /// Somebody else has loaded doors. What one for a connection was opened for may have come.
    pub(super) fn mark_loaded<'a>(&mut self, loaded: impl IntoIterator<Item = &'a Door>, now: Instant) {
        let mut over = 0_usize;
        for door in loaded {
            if door.once {
                self.ledger.spend(door);
            }
            self.ledger.mark(door);
            over += usize::from(!self.ledger.is_held(door, now));
        }
        if over > 0 {
            warn!(doors = over, hint = SAVING, "shut: somebody else has loaded doors whose grants are over");
        }
    }

    /// Compares the elements that say that they are the daemon's with the ledger, which `adopts` the grants of a daemon of before.
    pub(super) fn compare(&mut self, adopts: bool) -> Result<(), ElementError> {
        let old_count = adopts && self.policy.old_count;
        let mut wrong = Vec::new();
        let now = Instant::now(); // none must have more time than the kernel gives it, and listing thousands takes a while
        let [open, live] = self.gate.listed()?;
        let open = open.into_iter().map(|open| (open, false));
        for (OpenDoor { what: door, comment, left }, spent) in open.chain(live.into_iter().map(|live| (live, true))) {
            let Some(said) = comment else { continue }; // what somebody opened by hand is not ours to shut
            let counts_until = said.counts_until(left, old_count, self.ledger.boot(), now);
            let Comment { user, service, bound, end } = said;
            if let Some(until) = counts_until.filter(|_| adopts) {
                let members = self.members_of(&user, &door);
                let kill = self.kills(&service);
                let (token, asked, waits) = (None, None, false);
                let hold = Hold { user, service, until, bound, token, kill, spent, members, asked, waits };
                // Who may be there no more leaves the sets with the door, below.
                hold.members.iter().for_each(|member| self.ledger.mark_member(member.clone()));
                self.ledger.adopt(door, hold);
            }
            // One for one connection is never added again: it may be spent by now.
            let says_its_end = end.is_some() || door.once;
            if counts_until.is_none() || !says_its_end || !self.ledger.is_held(&door, now) {
                wrong.push(door);
            }
        }
        self.mark_loaded(&wrong, now);
        self.compare_members(adopts, now);
        Ok(())
    }

    /// The same for who is in the administrator's sets. Whoever a door for one connection has let in is there until it would end.
    fn compare_members(&mut self, adopts: bool, now: Instant) {
        let (policy, old_count) = (self.policy.clone(), adopts && self.policy.old_count);
        for set in policy.sets() {
            let listed = match self.gate.members(set) {
                Ok(listed) => listed,
                Err(error) => {
                    let is_told = matches!(error, ElementError::NoSet) || self.gate.check().is_err();
                    if !is_told && self.not_added.is_first() {
                        warn!(%set, "who is in a set of yours is not known: {error}");
                    }
                    continue;
                }
            };
            for Open { what: member, comment, left } in listed {
                let Some(said) = comment else { continue };
                let until = said.counts_until(left, old_count, self.ledger.boot(), now);
                let until = until.filter(|_| policy.adds(&said.user, &said.service, set));
                let is_known = !adopts || self.ledger.desired(&Element::Member(member.clone()), now).is_some();
                let opening = policy.services.get(&said.service).filter(|opening| opening.once);
                let port = member.port.or_else(|| opening?.ports.first().copied());
                match (until, port.filter(|_| opening.is_some())) {
                    (Some(_), _) if is_known => {}
                    (Some(until), Some(port)) => {
                        let door = Door { source: member.source, port, once: true };
                        let Comment { user, service, bound, .. } = said;
                        let (token, asked, members) = (None, None, vec![member]);
                        let (kill, spent, waits) = (false, true, false);
                        let hold = Hold { user, service, until, bound, token, kill, spent, members, asked, waits };
                        self.ledger.adopt(door, hold);
                    }
                    _ => self.ledger.mark_member(member),
                }
            }
        }
    }
}
