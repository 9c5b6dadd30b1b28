//! Who is in the administrator's sets, and what these take.

use tracing::warn;

use super::Reconciler;
use crate::nft::{Door, Layout, Lister, Member, SetError, SetName};
use crate::service::Name;

/// What makes a set that sources can be added to.
const SETS_HINT: &str = "nft add set FAMILY TABLE SET '{ type ipv4_addr; flags timeout; }', or ipv6_addr";

impl Reconciler {
    /// Looks what the administrator's sets take; tells which are missing or cannot be used, before somebody knocks.
    pub(super) fn look_at_sets(&mut self) {
        self.layouts.clear();
        for set in self.policy.clone().sets() {
            if let Err(error) = self.layout(set)
                && self.gate.check().is_ok()
            {
                warn!(hint = SETS_HINT, "who knocks is not added: {error}");
            }
        }
    }

    fn layout(&mut self, set: &SetName) -> Result<Layout, SetError> {
        if let Some(layout) = self.layouts.get(set) {
            return Ok(*layout);
        }
        let layout = self.gate.layout(set)?;
        self.layouts.insert(set.clone(), layout);
        Ok(layout)
    }

    /// What a user's source is in the administrator's sets, as long as this door is open.
    pub(super) fn members_of(&mut self, user: &Name, door: &Door) -> Vec<Member> {
        let sets = self.policy.users.get(user).map(|allowance| allowance.add_to.clone()).unwrap_or_default();
        let mut members = Vec::new();
        for set in sets {
            match self.layout(&set) {
                Ok(layout) => members.extend(set.member(layout, door)),
                Err(error) if self.gate.check().is_ok() && self.not_added.is_first() => {
                    warn!(%user, source = %door.source, hint = SETS_HINT, "not added: {error}");
                }
                Err(_) => {}
            }
        }
        members
    }
}
