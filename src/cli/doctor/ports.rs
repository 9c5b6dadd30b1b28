//! Knock ports, where nobody must listen, and guarded ports, where somebody should.

use super::Finding;
use super::listing::Table;
use super::translation;
use crate::cli::inspect::{ephemeral_knock_port, reserved_port_list};
use crate::cli::sockets::{Listener, listeners};
use crate::config::ServerConfig;
use crate::service::{Port, Transport};

/// What is found of the ports themselves, whatever firewall is before them.
pub(super) fn all(config: &ServerConfig, tables: &[Table]) -> Vec<Finding> {
    let listeners = listeners();
    let mut findings = vec![knock_ports(config, &listeners), ephemeral(config)];
    let translations = translation::of(tables);
    findings.extend(config.ruleset().guarded.iter().map(|port| {
        let translation = translations.iter().find(|one| one.covers(*port));
        match translation {
            Some(one) if !one.is_to_this_host() => {
                Finding::ok("listener", format!("{port}: is passed on, {}", one.target))
            }
            Some(one) => guarded(Port { number: one.target_port().unwrap_or(port.number), ..*port }, &listeners),
            None => guarded(*port, &listeners),
        }
    }));
    findings
}

fn knock_ports(config: &ServerConfig, listeners: &[Listener]) -> Finding {
    const CHECK: &str = "knock-ports";
    let knock_ports = config.all_knock_ports();
    let is_hit = |listener: &&Listener| {
        let Port { transport, number } = listener.port;
        transport == Transport::Tcp && listener.is_reachable() && knock_ports.contains(number)
    };
    match listeners.iter().find(is_hit) {
        None => Finding::ok(CHECK, format!("nobody listens on the knock ports, {knock_ports}")),
        Some(Listener { port, address }) => {
            let message = format!("knock port {port}: somebody listens there, on {address}, and cannot be reached");
            let hint = format!(
                "see who, with `ss -ltnp sport = :{}`; move it, or choose other `knock_ports` and give users new profiles",
                port.number
            );
            Finding::problem(CHECK, message).hint(hint)
        }
    }
}

fn ephemeral(config: &ServerConfig) -> Finding {
    const CHECK: &str = "ephemeral-ports";
    match ephemeral_knock_port(config) {
        None => Finding::ok(CHECK, "the kernel gives no knock port to connections of this host's own"),
        Some(message) => Finding::problem(CHECK, format!("{message}: connections of this host's own may take it"))
            .hint(format!(
                "sysctl net.ipv4.ip_local_reserved_ports={}; for the next boot, the same in /etc/sysctl.d/knockq.conf",
                reserved_as_well(config)
            )),
    }
}

/// The knock ports, and what others had the kernel leave out before: the setting replaces the whole list.
fn reserved_as_well(config: &ServerConfig) -> String {
    let knock_ports = config.all_knock_ports().to_string().replace(' ', "");
    let reserved = reserved_port_list();
    if reserved.is_empty() { knock_ports } else { format!("{reserved},{knock_ports}") }
}

fn guarded(port: Port, listeners: &[Listener]) -> Finding {
    const CHECK: &str = "listener";
    let all: Vec<&Listener> = listeners.iter().filter(|listener| listener.port == port).collect();
    let addresses = || {
        let mut addresses: Vec<String> = all.iter().map(|listener| listener.address.to_string()).collect();
        addresses.sort_unstable();
        addresses.dedup();
        addresses.join(", ")
    };
    let hint = "start the service, or have it listen on an address that clients reach";
    if all.iter().any(|listener| listener.is_reachable()) {
        Finding::ok(CHECK, format!("{port}: a service listens, on {}", addresses()))
    } else if all.is_empty() {
        Finding::problem(CHECK, format!("{port}: no service listens, so its door leads nowhere")).hint(hint)
    } else {
        Finding::problem(
            CHECK,
            format!("{port}: a service listens on {} alone, where only this host reaches it", addresses()),
        )
        .hint(hint)
    }
}
