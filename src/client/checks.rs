//! What to look at, in this order, when a door stays shut: what is known to be wrong comes first.

use std::net::IpAddr;

use super::address::{is_global, is_nat64};
use super::aim::{Aim, Source};
use super::send::{Sent, SentToken};
use crate::config::Seconds;
use crate::crypto::KnockPorts;
use crate::crypto::knockknock::WINDOW;

/// The last thing in question, whatever was knocked with.
const SERVICE: &str = "the service must run, and the server's other firewall rules must allow it";

/// One line for each.
pub fn checks(aim: &Aim, sent: &Sent) -> Vec<String> {
    let all = match &sent.token {
        SentToken::Own { bound_to, is_clock_unsynchronized, knock_ports, window, .. } => {
            let address = address(aim, sent, *bound_to);
            of_own(aim, address, *is_clock_unsynchronized, knock_ports, *window)
        }
        SentToken::Knockknock { count, knock_port } => return of_knockknock(aim, *count, *knock_port),
    };
    let (known, others): (Vec<_>, Vec<_>) = all.into_iter().partition(|(is_known, _)| *is_known);
    known.into_iter().chain(others).map(|(_, text)| text).collect()
}

/// With whether something is known that makes it likely.
fn of_own(
    aim: &Aim,
    address: (bool, String),
    is_unsynchronized: bool,
    knock_ports: &KnockPorts,
    window: Seconds,
) -> Vec<(bool, String)> {
    let clock =
        if is_unsynchronized { "this machine's clock is not synchronised, says its kernel" } else { "the clocks" };
    vec![
        (is_unsynchronized, format!("{clock}: both must agree to within {window} (timedatectl)")),
        address,
        (false, format!("a firewall on the way may drop SYNs to the knock ports ({knock_ports}): try another network")),
        (
            false,
            "something on the way may rewrite sequence numbers or clear timestamps, as strict firewalls do".to_owned(),
        ),
        (false, format!("the profile of {} may be older than the server's settings: ask for it again", aim.host)),
        (
            false,
            "the daemon must run and know your key: its log says whom it refused, and why (journalctl -u knockq)"
                .to_owned(),
        ),
        (
            false,
            "the server may doubt its counter store, as after a loss of power, a restored backup or `knockq recover`: then \
             `knockq status` there says: no knocks are accepted until HH:MM:SS (counter store in doubt)"
                .to_owned(),
        ),
        (false, SERVICE.to_owned()),
    ]
}

/// Of all that may be wrong the count comes first: nothing else mends itself so little.
fn of_knockknock(aim: &Aim, count: u32, knock_port: u16) -> Vec<String> {
    let host = &aim.host;
    vec![
        format!(
            "the count: this knock's was {count}, and the server takes those from the one that it expects to {} more; \
             `knockq explain` on the server says which that is. If this one is behind, because something else knocks with this \
             profile: `counter = N` in the profile of {host} here. If it is further ahead, because knocks were lost: \
             `knockq user counter NAME N` there",
            WINDOW - 1
        ),
        format!("the knock port: it must be the one that the server has for you, and the profile says {knock_port}"),
        "a firewall on the way may drop SYNs with an acknowledgment number, or rewrite sequence numbers or IP \
         identifications: try another network"
            .to_owned(),
        "the daemon must run and know your keys: its log says whom it refused, and why (journalctl -u knockq)"
            .to_owned(),
        SERVICE.to_owned(),
    ]
}

/// What the token holds for, against where the server may see the connection come from.
fn address(aim: &Aim, sent: &Sent, bound_to: Option<IpAddr>) -> (bool, String) {
    let own = sent.source.ip();
    match bound_to {
        Some(bound) if bound == own && (!is_global(&own) || is_nat64(&sent.server.ip())) => {
            (true, format!("the knock holds for {bound} alone, which a NAT on the way changes: --source with the public one"))
        }
        Some(bound) if matches!(aim.source, Source::Auto) && aim.profile.source() == Some(bound) => {
            (false, format!("the knock holds for {bound} alone, as the profile says: does the server still see you there?"))
        }
        Some(bound) => (false, format!("the knock holds for {bound} alone: does the server see you there?")),
        None => (
            false,
            "the knock holds for no address: the server may demand one (--source), or a NAT may have given the connection \
             another address than the knock; or somebody on the way copies each knock to another address, at which the server \
             takes back what it opened (`withdrawn` in its log): bind the knock with --source ADDRESS, the one that the server \
             sees, or take another path"
                .to_owned(),
        ),
    }
}
