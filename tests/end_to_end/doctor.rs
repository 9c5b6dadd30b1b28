//! `knockq doctor`: each check fails where something is wrong, and passes where it is not.

use std::fs;
use std::net::{TcpListener, UdpSocket};
use std::time::{Duration, Instant};

use nfq::Queue;
use nix::sys::signal::{Signal, kill};
use serde_json::Value;

use crate::lab::{Daemon, FAMILIES, Family, Lab, eventually, succeeds};

/// What doctor found: check, state, message, hint.
pub(crate) struct Findings(Vec<[String; 4]>);

impl Lab {
    pub(crate) fn doctor(&self) -> Findings {
        let config = self.config().display().to_string();
        let output = self.knockq(&self.server, &["doctor", "--json", "--config", &config]);
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
        let findings: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
        let text = |finding: &Value, key: &str| finding[key].as_str().unwrap_or_default().to_owned();
        let findings: Vec<[String; 4]> = findings
            .iter()
            .map(|finding| ["check", "state", "message", "hint"].map(|key| text(finding, key)))
            .collect();
        let has_problem = findings.iter().any(|[_, state, ..]| state == "problem");
        assert_eq!(output.status.code(), Some(i32::from(has_problem)), "{findings:?}");
        Findings(findings)
    }
}

impl Findings {
    /// There is a line of this check with this state that says all of this; whatever is not right has a hint.
    #[track_caller]
    pub(crate) fn has(&self, check: &str, state: &str, said: &[&str]) {
        assert!(self.finds(check, state, said), "no {state} {check} {said:?}: {:#?}", self.0);
    }

    /// Whether there is one.
    pub(crate) fn finds(&self, check: &str, state: &str, said: &[&str]) -> bool {
        let is_it = |[of, how, message, hint]: &&[String; 4]| {
            of == check && how == state && said.iter().all(|text| format!("{message}\n{hint}").contains(text))
        };
        let found = self.0.iter().find(is_it);
        found.inspect(|found| assert_eq!(found[3].is_empty(), state == "ok", "{found:?}")).is_some()
    }

    /// All lines of this check are so.
    #[track_caller]
    fn all(&self, check: &str, state: &str) {
        let of: Vec<_> = self.0.iter().filter(|finding| finding[0] == check).collect();
        assert!(!of.is_empty() && of.iter().all(|finding| finding[1] == state), "{check}: {of:?}");
    }

    /// What is said of a port behind the gate, over one family.
    fn firewall(&self, port: &str, family: Family) -> &str {
        let [both, one] =
            [format!("{port}:"), format!("{port} over IP{}", if family == Family::V4 { "v4" } else { "v6" })];
        let of = |finding: &&[String; 4]| {
            finding[0] == "firewall" && [&both, &one].iter().any(|start| finding[2].starts_with(*start))
        };
        self.0.iter().find(of).map_or("ok", |finding| &finding[1])
    }
}

#[test]
fn doctor_tells_whether_the_gate_stands_whether_the_daemon_reads_its_queue_and_what_the_next_boot_begins_with() {
    let lab = Lab::new();
    let before = lab.doctor();
    for check in ["configuration", "store", "kernel"] {
        before.has(check, "ok", &[]);
    }
    before.has("include-file", "problem", &["knockq.nft: is not that of this configuration", "start it"]);
    before.has("table", "problem", &["there is no table inet knockq", "systemctl start knockq"]);
    before.has("queue", "problem", &["queue 4097: nobody reads it", "journalctl -u knockq"]);

    let daemon = lab.start();
    let ready = lab.doctor();
    ready.has("table", "ok", &["loaded, and that of this configuration"]);
    ready.has("queue", "ok", &["the daemon reads it, process", "(knockq-gate)"]);
    ready.has("include-file", "ok", &["knockq.nft: is up to date"]);

    lab.set("trusted = [\"192.0.2.0/24\"]");
    let changed = lab.doctor();
    changed.has("table", "problem", &["not that of this configuration", "systemctl reload knockq"]);
    changed.has(
        "include-file",
        "problem",
        &["knockq.nft: is not that of this configuration", "systemctl reload knockq"],
    );
    let mut daemon = daemon;
    daemon.signal(Signal::SIGHUP);
    daemon.wait_for("engine: reloaded");
    let reloaded = lab.doctor();
    reloaded.has("table", "ok", &[]);
    reloaded.has("include-file", "ok", &[]);

    // A reload that changes nothing of the table writes the file too.
    let file = lab.config().with_file_name("knockq.nft");
    for (reloads, (said, damage)) in (1..)
        .zip([("knockq.nft: is not that of this configuration", "echo by hand >"), ("knockq.nft: No such file", "rm ")])
    {
        lab.server.sh(&format!("{damage}{}", file.display()));
        lab.doctor().has("include-file", "problem", &[said, "systemctl reload knockq"]);
        daemon.signal(Signal::SIGHUP);
        eventually("the reload", || daemon.log().matches("engine: reloaded").count() > reloads);
        lab.doctor().has("include-file", "ok", &[]);
    }
}

#[test]
fn doctor_names_a_gate_that_is_on_trial_with_the_command_that_keeps_it() {
    let lab = Lab::new();
    let daemon = Daemon::spawn_with(&lab, &["--try", "1h"], &[]);
    eventually("the daemon", || daemon.log().contains("knockq: ready"));
    lab.doctor().has("trial", "note", &["the gate is on trial: in ", "knockq confirm"]);
    let config = lab.config().display().to_string();
    lab.control(&["confirm", "--config", &config]);
    assert!(lab.doctor().0.iter().all(|finding| finding[0] != "trial"));
}

#[test]
fn doctor_sees_a_table_that_was_changed_by_hand_and_one_that_others_have_not_loaded() {
    let lab = Lab::new();
    lab.set("ruleset = \"external\"");
    lab.doctor().has("table", "problem", &["there is no table", "/etc/nftables.conf"]);
    lab.load_include_file();
    lab.doctor().has("table", "ok", &[]);
    let right = lab.server.nft(&["list", "ruleset"]);
    assert_eq!(lab.server.nft(&["list", "ruleset"]), right, "looking changes nothing");
    for edit in ["insert rule inet knockq gate accept", "add table inet knockq { flags dormant; }"] {
        lab.server.nft(&[edit]);
        lab.doctor().has("table", "problem", &["one of them was changed", "knockq ruleset --output"]);
        lab.server.nft(&["delete table inet knockq"]);
        lab.load_include_file();
        lab.doctor().has("table", "ok", &[]);
    }
    lab.set("trusted = [\"192.0.2.0/24\"]");
    lab.doctor().has("include-file", "problem", &["not that of this configuration", "knockq ruleset --output"]);
    lab.load_include_file();
    lab.doctor().has("include-file", "ok", &[]);
}

#[test]
fn doctor_names_another_program_that_reads_the_queue() {
    let lab = Lab::new();
    lab.doctor().has("queue", "problem", &["nobody reads it"]);
    lab.server.enter(|| {
        let mut queue = Queue::open().unwrap();
        queue.bind(4097).unwrap();
        lab.doctor().has("queue", "problem", &["queue 4097: already bound by", "`queue = N`"]);
    });
}

#[test]
fn doctor_sees_listeners_on_knock_ports_and_knock_ports_among_those_of_own_connections() {
    let lab = Lab::new();
    let own = lab.server.enter(|| ["127.0.0.1:20007", "[::1]:20007"].map(|own| TcpListener::bind(own).unwrap()));
    lab.doctor().has("knock-ports", "ok", &["20000-21023"]);
    drop(own);
    for address in ["0.0.0.0:20005", "[::]:20006", "10.77.1.1:20007", "[fd77:1::1]:20007"] {
        let listener = lab.server.enter(|| TcpListener::bind(address).unwrap());
        let port = address.rsplit(':').next().unwrap();
        lab.doctor().has("knock-ports", "problem", &[&format!("knock port tcp/{port}: somebody listens"), "ss -ltnp"]);
        drop(listener);
    }
    // Only SYNs are taken there.
    let _udp = lab.server.enter(|| UdpSocket::bind("0.0.0.0:20005").unwrap());
    lab.doctor().has("knock-ports", "ok", &[]);

    lab.doctor().has("ephemeral-ports", "ok", &[]);
    lab.server.sysctl("net/ipv4/ip_local_port_range", "15000 61000");
    lab.doctor().has("ephemeral-ports", "problem", &["knock port 20000 lies inside", "ip_local_reserved_ports"]);
    lab.server.sysctl("net/ipv4/ip_local_reserved_ports", "8080,20000-21023");
    lab.doctor().has("ephemeral-ports", "ok", &[]);
    lab.server.sysctl("net/ipv4/ip_local_reserved_ports", "20001-21023");
    let remedy = "ip_local_reserved_ports=20001-21023,20000-21023; "; // what was reserved stays so
    lab.doctor().has("ephemeral-ports", "problem", &["knock port 20000", remedy]);
}

#[test]
fn doctor_sees_guarded_ports_where_no_service_listens_or_only_for_this_host() {
    let lab = Lab::network();
    lab.configure("[services.all]\nports = [\"tcp/22\", \"udp/5000\"]\n");
    let none = lab.doctor();
    none.has("listener", "problem", &["tcp/22: no service listens", "start the service"]);
    none.has("listener", "problem", &["udp/5000: no service listens"]);
    for own in ["127.0.0.1", "[::1]"] {
        let _listeners = listeners(&lab, own);
        let own = own.trim_matches(['[', ']']);
        let alone = lab.doctor();
        for port in ["tcp/22", "udp/5000"] {
            alone.has("listener", "problem", &[&format!("{port}: a service listens on {own} alone")]);
        }
    }
    for address in ["0.0.0.0", "10.77.2.1", "[::]", "[fd77:1::1]"] {
        let _listeners = listeners(&lab, address);
        lab.doctor().all("listener", "ok");
    }
}

/// Who listens on both ports of this address. A process that another test is just starting may hold the last ones for a moment.
fn listeners(lab: &Lab, address: &str) -> (TcpListener, UdpSocket) {
    let bind = || TcpListener::bind(format!("{address}:22")).ok().zip(UdpSocket::bind(format!("{address}:5000")).ok());
    let mut bound = None;
    eventually("both ports", || {
        bound = lab.server.enter(bind);
        bound.is_some()
    });
    bound.unwrap()
}

/// Rulesets of others, and what doctor says of port 22 behind them over IPv4 and IPv6.
const OTHERS: [(&str, [&str; 2]); 22] = [
    ("", ["ok", "ok"]),
    (
        "table inet filter { chain input { type filter hook input priority 0; policy drop; \n ct state established,related accept
            iif lo accept \n meta l4proto { icmp, ipv6-icmp } accept \n ct state new tcp dport 22 accept\n } }",
        ["ok", "ok"],
    ),
    (
        "table inet filter { chain input { type filter hook input priority 0; policy drop; \n ct state established,related accept
            iif lo accept \n meta l4proto { icmp, ipv6-icmp } accept \n tcp dport { 25, 80-90 } accept\n } }",
        ["problem", "problem"],
    ),
    (
        "table ip filter { chain input { type filter hook input priority 0; tcp dport 22 reject with tcp reset\n } }",
        ["problem", "ok"],
    ),
    (
        "table ip6 raw { chain early { type filter hook prerouting priority raw; tcp dport 20-22 counter drop\n } }",
        ["ok", "problem"],
    ),
    (
        "table inet filter { chain let { accept\n }
            chain input { type filter hook input priority 0; policy drop;
            ct state vmap { established : accept, related : accept, invalid : drop }
            meta l4proto ipv6-icmp accept \n tcp dport vmap { 22 : jump let, 25 : drop }\n } }",
        ["ok", "ok"],
    ),
    (
        "table inet filter { chain others { tcp dport 25 accept\n }
            chain input { type filter hook input priority 0; policy drop; \n meta l4proto ipv6-icmp accept \n goto others\n } }",
        ["problem", "problem"],
    ),
    (
        "table inet filter { set open { type inet_service; flags interval; elements = { 20-30, 443 }\n }
            chain input { type filter hook input priority 0; policy drop; \n meta l4proto ipv6-icmp accept
            ct state established accept \n tcp dport @open accept\n } }",
        ["ok", "ok"],
    ),
    // As firewalld makes them: with the zone's services, and without.
    (
        "table inet firewalld { chain allow { tcp dport 22 accept\n }
            chain public { jump allow \n meta l4proto { icmp, ipv6-icmp } accept\n }
            chain zones { iifname \"eth1\" goto public \n goto public\n }
            chain filter_PREROUTING { type filter hook prerouting priority 10; \n icmpv6 type { nd-router-advert, nd-neighbor-solicit } accept
            meta nfproto ipv6 fib saddr . mark . iif oif missing drop\n }
            chain filter_INPUT { type filter hook input priority 10; \n ct state { established, related } accept
            ct status dnat accept \n iifname \"lo\" accept \n ct state invalid drop \n jump zones \n reject with icmpx type admin-prohibited\n } }",
        ["ok", "ok"],
    ),
    (
        "table inet firewalld { chain allow { tcp dport 443 accept\n }
            chain public { jump allow \n meta l4proto { icmp, ipv6-icmp } accept\n }
            chain zones { iifname \"eth1\" goto public \n goto public\n }
            chain filter_INPUT { type filter hook input priority 10; \n ct state { established, related } accept
            ct status dnat accept \n iifname \"lo\" accept \n ct state invalid drop \n jump zones \n reject with icmpx type admin-prohibited\n } }",
        ["problem", "problem"],
    ),
    // What is for others, as Docker has it; for this host by one of its addresses, of which alice uses the first; by all.
    (
        "table ip raw { chain PREROUTING { type filter hook prerouting priority raw; ip daddr 172.17.0.2 iifname != \"docker0\" drop
            ip daddr 224.0.0.0/4 drop \n ip daddr != 10.77.0.0/16 drop\n } }
         table ip6 raw { chain PREROUTING { type filter hook prerouting priority raw; ip6 daddr ::/0 tcp dport 22 drop\n } }",
        ["ok", "problem"],
    ),
    (
        "table inet filter { chain input { type filter hook input priority 0; ip daddr 10.77.2.1 tcp dport 22 drop
            ip6 daddr fd77:2::1 tcp dport 22 drop\n } }",
        ["unknown", "unknown"],
    ),
    // It depends on who connects, or on another program.
    (
        "table ip bans { set banned { type ipv4_addr; elements = { 192.0.2.1 }\n }
            chain input { type filter hook input priority -1; tcp dport 22 ip saddr @banned reject\n } }",
        ["unknown", "ok"],
    ),
    (
        "table ip bans { set banned { type ipv4_addr; flags timeout;\n }
            chain input { type filter hook input priority -1; tcp dport 22 ip saddr @banned reject\n } }",
        ["ok", "ok"],
    ),
    (
        "table inet filter { chain input { type filter hook input priority 0; tcp dport 22 limit rate over 10/second drop\n } }",
        ["unknown", "unknown"],
    ),
    (
        "table inet filter { chain input { type filter hook input priority 0; tcp dport 22 queue num 9 bypass\n } }",
        ["unknown", "unknown"],
    ),
    // Another chain at the same place may drop what one accepts.
    (
        "table inet one { chain input { type filter hook input priority 0; tcp dport 22 accept \n tcp dport 22 drop\n } }",
        ["ok", "ok"],
    ),
    (
        "table inet one { chain input { type filter hook input priority 0; tcp dport 22 accept\n } }
         table inet two { chain input { type filter hook input priority 1; tcp dport 22 drop\n } }",
        ["problem", "problem"],
    ),
    (
        "table inet filter { chain input { type filter hook input priority 0;
            tcp flags & (fin | syn | rst | ack) != syn ct state new drop \n iifname \"lo\" tcp dport 22 drop
            ip saddr 127.0.0.0/8 drop \n udp dport 22 drop \n icmp type echo-request drop \n ct state != new accept\n } }",
        ["ok", "ok"],
    ),
    (
        "table inet filter { chain input { type filter hook input priority 0; \n tcp flags & (fin | syn | rst | ack) == syn \
            iifname != \"lo\" log prefix \"accept or drop \" tcp dport != { 80, 443 } drop comment \"as ordered\"\n } }",
        ["problem", "problem"],
    ),
    (
        "table inet asleep { flags dormant; chain input { type filter hook input priority 0; policy drop;\n } }",
        ["ok", "ok"],
    ),
    (
        "table netdev early { chain ingress { type filter hook ingress device \"eth2\" priority 0; tcp dport 22 drop\n } }",
        ["unknown", "unknown"],
    ),
];

#[test]
fn what_doctor_says_of_other_tables_is_what_a_connection_meets() {
    let lab = Lab::new();
    let file = lab.directory.path.join("others.nft");
    for (ruleset, expected) in OTHERS {
        fs::write(&file, format!("flush ruleset\n{}\n", ruleset.replace("} }", "}\n}"))).unwrap();
        lab.server.nft(&["-f", file.to_str().unwrap()]);
        let found = lab.doctor();
        for (family, expected) in FAMILIES.into_iter().zip(expected) {
            assert_eq!(found.firewall("tcp/22", family), expected, "{ruleset}\n{:#?}", found.0);
            match expected {
                "ok" => drop(lab.alice.gets_in(family.server(), 22)),
                "problem" => assert!(!lab.alice.reaches(family.server(), 22), "{ruleset}"),
                _ => {}
            }
        }
    }
}

#[test]
fn doctor_says_who_refuses_a_guarded_port_and_how_to_let_it_in() {
    let lab = Lab::new();
    lab.server.sh(
        "nft 'add table inet filter; add chain inet filter input { type filter hook input priority 0; policy drop; }'
         nft 'add rule inet filter input tcp dport 25 accept'",
    );
    let found = lab.doctor();
    for family in ["IPv4", "IPv6"] {
        let refused = format!("tcp/22 over {family}: chain inet filter input refuses it, by its policy");
        found.has("firewall", "problem", &[&refused, "nft insert rule inet filter input tcp dport 22 accept"]);
    }
    found.has("firewall", "ok", &["tcp/25: "]);
    lab.server.sh("nft insert rule inet filter input tcp dport 22 accept");
    lab.doctor().all("firewall", "ok");
}

#[test]
fn doctor_sees_ports_that_are_passed_on_without_being_guarded_and_those_that_lead_around_the_gate() {
    let lab = Lab::new();
    lab.doctor().all("published", "ok");
    lab.server.sh("nft 'add table inet nat; add chain inet nat pre { type nat hook prerouting priority dstnat; }'
         nft 'add rule inet nat pre tcp dport 8080 dnat ip to 10.77.2.2:80'
         nft 'add rule inet nat pre udp dport { 53, 5353 } dnat ip6 to [fd77:2::2]:53'");
    let found = lab.doctor();
    found.has(
        "published",
        "note",
        &["tcp/8080: is not guarded, and passed on: dnat ip to 10.77.2.2:80", "\"tcp/8080\""],
    );
    for port in ["udp/53", "udp/5353"] {
        found.has(
            "published",
            "note",
            &[&format!("{port}: is not guarded, and passed on: dnat ip6 to [fd77:2::2]:53")],
        );
    }
    lab.edit("knockq.toml", "\"tcp/25\"", "\"tcp/25\", \"tcp/8080\", \"udp/53\", \"udp/5353\"");
    let found = lab.doctor();
    found.all("published", "ok");
    found.has("listener", "ok", &["tcp/8080: is passed on, dnat ip to 10.77.2.2:80"]);

    // The gate looks at the port before it is translated.
    let _daemon = lab.start();
    lab.server.sh("nft 'add rule inet nat pre tcp dport 2222 redirect to :22; add rule inet nat pre tcp dport 8081 dnat ip to 10.77.2.2:80'");
    let found = lab.doctor();
    found.has(
        "published",
        "problem",
        &["tcp/2222: is not guarded, and leads to what a guarded port leads to", "\"tcp/2222\""],
    );
    found.has("published", "problem", &["tcp/8081: is not guarded, and leads to what a guarded port leads to"]);
    for family in FAMILIES {
        assert!(!lab.alice.reaches(family.server(), 22));
        drop(lab.alice.gets_in(family.server(), 2222));
    }
}

#[test]
fn doctor_follows_a_guarded_port_to_where_it_is_passed_on() {
    let lab = Lab::new();
    lab.edit("knockq.toml", "\"tcp/25\"", "\"tcp/8080\"");
    lab.server.sh("nft 'add table ip nat; add chain ip nat pre { type nat hook prerouting priority dstnat; }'
         nft 'add rule ip nat pre tcp dport 8080 dnat to 10.77.2.2:80'
         nft 'add table ip filter; add chain ip filter forward { type filter hook forward priority 0; policy drop; }'");
    let refused = ["tcp/8080 over IPv4: chain ip filter forward refuses it"];
    lab.doctor().has("firewall", "problem", &refused);
    lab.server.sh("nft add rule ip filter forward tcp dport 80 accept");
    lab.doctor().has("firewall", "ok", &["tcp/8080: "]);
    // As Docker does it: nobody gets to containers by their own address. Before the translation it is the host's.
    lab.server.sh("nft 'add table ip raw; add chain ip raw pre { type filter hook prerouting priority raw; }'
         nft 'add rule ip raw pre ip daddr 10.77.2.2 drop'");
    lab.doctor().has("firewall", "ok", &["tcp/8080: "]);
    lab.server.sh("nft 'add chain ip raw late { type filter hook prerouting priority dstnat + 1; }; add rule ip raw late ip daddr 10.77.2.2 drop'");
    lab.doctor().has("firewall", "unknown", &["tcp/8080 over IPv4: chain ip raw late", "try it"]);
}

#[test]
fn doctor_compares_the_answer_of_guarded_ports_with_that_of_closed_ones() {
    let lab = Lab::new();
    lab.doctor().has(
        "answer",
        "note",
        &["guarded ports are silent, but this host's closed ports answer with resets", "answer = \"reset\""],
    );
    lab.set("answer = \"reset\"");
    lab.doctor().has("answer", "ok", &["answer with resets, like"]);
    lab.server.sh(
        "nft 'add table inet filter; add chain inet filter input { type filter hook input priority 0; policy drop; }'
         nft 'add rule inet filter input tcp dport { 22, 25 } accept'",
    );
    lab.doctor().has("answer", "note", &["but this host's closed ports are silent", "answer = \"drop\""]);
    lab.edit("knockq.toml", "answer = \"reset\"", "answer = \"drop\"");
    lab.doctor().has("answer", "ok", &["are silent, like"]);
    lab.server.sh("nft add rule inet filter input reject with icmpx type admin-prohibited");
    lab.doctor().has("answer", "note", &["closed ports are rejected in another way"]);
    lab.server.sh("nft insert rule inet filter input ip saddr 192.0.2.0/24 drop");
    lab.doctor().has("answer", "unknown", &["depends on what is not known here", "nc -vzw3"]);
}

#[test]
fn doctor_sees_whether_the_sets_that_users_are_added_to_are_there() {
    let lab = Lab::new();
    assert!(lab.doctor().0.iter().all(|[check, ..]| check != "sets"), "nobody is added to any");
    lab.edit("users.d/alice.toml", "services", "add_to = [\"inet mine alice4\", \"inet mine alice6\"]\nservices");
    for (set, kind) in [("alice4", "ipv4_addr"), ("alice6", "ipv6_addr")] {
        lab.doctor().has("sets", "problem", &["alice.toml: add_to: ", set, "add set inet mine"]);
        lab.server.sh(&format!("nft 'add table inet mine; add set inet mine {set} {{ type {kind}; flags timeout; }}'"));
    }
    lab.doctor().has("sets", "ok", &[]);
}

#[test]
fn doctor_sees_a_store_that_is_not_safe_and_accounts_that_are_missing() {
    let lab = Lab::new();
    lab.doctor().has("accounts", "note", &["there is no user `knockq`, `knockq-gate`", "useradd"]);
    let passwd = lab.directory.path.join("passwd");
    let own = fs::read_to_string("/etc/passwd").unwrap();
    let accounts = "knockq:x:990:990::/:/bin/false\nknockq-gate:x:991:991::/:/bin/false\n";
    fs::write(&passwd, format!("{own}{accounts}")).unwrap();
    let found = lab.server.sh(&format!(
        "unshare -m sh -c 'mount --bind {} /etc/passwd; {} doctor --config {} || :'",
        passwd.display(),
        crate::lab::knockq().display(),
        lab.config().display()
    ));
    assert!(found.contains("ok       the daemon's two accounts are there\n"), "{found}");
    assert!(
        found.contains("problem  queue 4097: nobody reads it, so no knock opens a door\n         Hint: "),
        "{found}"
    );

    let store = lab.directory.path.join("state/counters.redb");
    lab.doctor().has("store", "ok", &["counters.redb: is whole"]);
    lab.server.sh(&format!("chmod 644 {}", store.display()));
    lab.doctor().has("store", "problem", &["must not be readable by others", "chmod 600"]);
    fs::remove_file(&store).unwrap();
    lab.doctor().has("store", "problem", &["the counter store is missing", "knockq recover"]);
}

#[test]
fn a_daemon_that_does_not_answer_holds_neither_doctor_nor_check_up() {
    let lab = Lab::new();
    let daemon = lab.start();
    let [_, _, (_, engine)] = daemon.processes();
    kill(engine, Signal::SIGSTOP).unwrap();
    let start = Instant::now();
    lab.doctor().has("store", "unknown", &["the daemon does not tell whether it is in doubt"]);
    let check = lab.knockq(&lab.server, &["check", "--config", &lab.config().display().to_string()]);
    kill(engine, Signal::SIGCONT).unwrap();
    succeeds(&check);
    assert!(String::from_utf8_lossy(&check.stderr).contains("the daemon does not tell whether it is in doubt"));
    assert!(start.elapsed() < Duration::from_secs(60));
    daemon.stop();
}
