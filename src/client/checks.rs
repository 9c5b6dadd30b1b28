//! What to look at, in this order, when a door stays shut: what is known to be wrong comes first.

use super::address::{is_global, is_nat64};
use super::aim::{Aim, Source};
use super::send::Sent;

/// One line for each.
pub fn checks(aim: &Aim, sent: &Sent) -> Vec<String> {
    let (known, others): (Vec<_>, Vec<_>) = all(aim, sent).into_iter().partition(|(is_known, _)| *is_known);
    known.into_iter().chain(others).map(|(_, text)| text).collect()
}

/// With whether something is known that makes it likely.
fn all(aim: &Aim, sent: &Sent) -> Vec<(bool, String)> {
    let window = aim.profile.window;
    let is_unsynchronized = sent.is_clock_unsynchronized;
    let clock =
        if is_unsynchronized { "this machine's clock is not synchronised, says its kernel" } else { "the clocks" };
    let knock_ports = &aim.profile.knock_ports;
    vec![
        (is_unsynchronized, format!("{clock}: both must agree to within {window} (timedatectl)")),
        address(aim, sent),
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
        (false, "the service must run, and the server's other firewall rules must allow it".to_owned()),
    ]
}

/// What the token holds for, against where the server may see the connection come from.
fn address(aim: &Aim, sent: &Sent) -> (bool, String) {
    let own = sent.source.ip();
    match sent.bound_to {
        Some(bound) if bound == own && (!is_global(&own) || is_nat64(&sent.server.ip())) => {
            (true, format!("the knock holds for {bound} alone, which a NAT on the way changes: --source with the public one"))
        }
        Some(bound) if matches!(aim.source, Source::Auto) && aim.profile.source == Some(bound) => {
            (false, format!("the knock holds for {bound} alone, as the profile says: does the server still see you there?"))
        }
        Some(bound) => (false, format!("the knock holds for {bound} alone: does the server see you there?")),
        None => (
            false,
            "the knock holds for no address: the server may demand one (--source), or a NAT may have given the connection \
             another address than the knock"
                .to_owned(),
        ),
    }
}
