//! What the daemon hands over of refused packets, and what they were: for the process that asked, not for the daemon.

use std::collections::HashMap;

use ipnet::IpNet;

use super::report::{Knocks, RefusedPart};
use crate::packet::Syn;
use crate::service::Name;
pub use crate::verify::explain::{Cause, Finding};
use crate::verify::explain::{Past, Record, explain};
use crate::verify::{Reason, Registry};

/// Explains what came from a network, or all. `tell` is called before each user with their place.
pub fn findings(
    registry: &Registry,
    part: &RefusedPart,
    network: Option<IpNet>,
    tell: impl FnMut(usize),
) -> Vec<Finding> {
    let mut past: HashMap<Name, Past> = HashMap::new();
    for (user, n) in &part.accepted {
        past.entry(user.clone()).or_default().accepted = Some(*n);
    }
    for Knocks { user, granted, refused } in &part.knocks {
        let granted = granted.as_ref().map(|last| last.source);
        let refused = refused.as_ref().and_then(|last| last.source);
        past.entry(user.clone()).or_default().addresses.extend(granted.into_iter().chain(refused));
    }
    for record in part.records.iter().filter(|record| record.reason != Reason::Unknown) {
        if let (Some(user), Ok(syn)) = (&record.user, Syn::parse(&record.packet)) {
            past.entry(user.clone()).or_default().addresses.push(syn.source);
        }
    }
    let is_meant = |record: &&Record| {
        network.is_none_or(|network| Syn::parse(&record.packet).is_ok_and(|syn| network.contains(&syn.source)))
    };
    let records: Vec<Record> = part.records.iter().filter(is_meant).cloned().collect();
    let mut findings = explain(registry, &past, &records, tell);
    for Finding { at, causes, .. } in &mut findings {
        let in_doubt = causes.iter_mut().find(|cause| **cause == Cause::State { reason: Reason::InDoubt });
        if let (Some(cause), Some(shut)) = (in_doubt, part.floor.shut(*at)) {
            *cause = Cause::InDoubt(shut);
        }
    }
    findings
}

/// Findings that differ by their time alone are one, the last, with their number.
pub fn together(findings: Vec<Finding>) -> Vec<(Finding, u64)> {
    let mut all: Vec<(Finding, u64)> = Vec::new();
    let mut places = HashMap::new();
    for finding in findings {
        let kind = (finding.source, finding.user.clone(), finding.reason, format!("{:?}", finding.causes));
        let place = *places.entry(kind).or_insert(all.len());
        match all.get_mut(place) {
            Some((last, count)) => {
                last.at = finding.at.max(last.at);
                *count = count.saturating_add(1);
            }
            None => all.push((finding, 1)),
        }
    }
    all.sort_by_key(|(finding, _)| finding.at);
    all
}
