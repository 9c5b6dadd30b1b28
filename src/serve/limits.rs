//! What the gate does at most, whatever the engine asks: the child `configuration` makes it of the files, and root hands it over as
//! text before the first packet comes, and at each reload.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use ipnet::IpNet;

use super::sandbox::Identity;
use crate::nft::SetName;
use crate::service::{Answer, Port};

/// The limits. As text, a line for each: `port once tcp/25 60`, `from 192.0.2.0/24`, `set inet filter alice`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Whom the gate becomes.
    pub identity: Identity,
    /// Number of the queue.
    pub queue: u16,
    /// The gate owns the table where the kernel allows it: it is not one that others load.
    pub owns_table: bool,
    /// What every packet of the queue gets.
    pub answer: Answer,
    /// Doors that may be opened in a minute at most.
    pub grants_per_minute: u32,
    /// For how many seconds a port may be opened at most; for one connection, or for any number.
    pub ports: BTreeMap<(Port, bool), u32>,
    /// Where whoever is let in may come from: what any user's `from` lists; `None` if some user may come from anywhere.
    pub from: Option<BTreeSet<IpNet>>,
    /// The administrator's sets that may have sources.
    pub sets: BTreeSet<SetName>,
    /// Connections from before their port was guarded, which live on: the client's end, and ours.
    pub sessions: BTreeSet<(SocketAddr, SocketAddr)>,
}

/// No line of [`Limits`].
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("`{0}` is no limit")]
pub struct NoLimit(String);

impl Limits {
    /// For how many seconds this port may be opened to this source; 0 if it may not.
    pub fn seconds(&self, source: IpAddr, port: Port, once: bool) -> u32 {
        let may_come = self.from.as_ref().is_none_or(|from| from.iter().any(|network| network.contains(&source)));
        self.ports.get(&(port, once)).copied().filter(|_| may_come).unwrap_or(0)
    }
}

impl fmt::Display for Limits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Identity { uid, gid } = self.identity;
        let answer = if self.answer == Answer::Reset { "reset" } else { "drop" };
        writeln!(f, "account {uid} {gid}\nqueue {}\nanswer {answer}\nrate {}", self.queue, self.grants_per_minute)?;
        if self.owns_table {
            writeln!(f, "owns")?;
        }
        for ((port, once), seconds) in &self.ports {
            writeln!(f, "{} {port} {seconds}", if *once { "once" } else { "port" })?;
        }
        match &self.from {
            Some(from) => from.iter().try_for_each(|network| writeln!(f, "from {network}"))?,
            None => writeln!(f, "from any")?,
        }
        self.sets.iter().try_for_each(|set| writeln!(f, "set {set}"))?;
        self.sessions.iter().try_for_each(|(client, server)| writeln!(f, "session {client} {server}"))
    }
}

impl FromStr for Limits {
    type Err = NoLimit;

    /// Whatever is not said allows nothing.
    fn from_str(text: &str) -> Result<Self, NoLimit> {
        let (ports, from) = (BTreeMap::new(), Some(BTreeSet::new()));
        let (sets, sessions) = (BTreeSet::new(), BTreeSet::new());
        let identity = Identity { uid: u32::MAX, gid: u32::MAX }; // no account: then it stays root, which is proved not to be
        let (queue, owns_table, answer, grants_per_minute) = (0, false, Answer::Drop, 0);
        let mut limits = Self { identity, queue, owns_table, answer, grants_per_minute, ports, from, sets, sessions };
        for line in text.lines() {
            limits.read(line).ok_or_else(|| NoLimit(line.to_owned()))?;
        }
        Ok(limits)
    }
}

impl Limits {
    fn read(&mut self, line: &str) -> Option<()> {
        let (name, value) = line.split_once(' ').unwrap_or((line, ""));
        let pair = value.split_once(' ');
        match (name, pair) {
            ("account", Some((uid, gid))) => {
                self.identity = Identity { uid: uid.parse().ok()?, gid: gid.parse().ok()? };
            }
            ("queue", None) => self.queue = value.parse().ok()?,
            ("answer", None) => self.answer = if value == "reset" { Answer::Reset } else { Answer::Drop },
            ("rate", None) => self.grants_per_minute = value.parse().ok()?,
            ("owns", None) if value.is_empty() => self.owns_table = true,
            ("port" | "once", Some((port, seconds))) => {
                self.ports.insert((port.parse().ok()?, name == "once"), seconds.parse().ok()?);
            }
            ("from", None) if value == "any" => self.from = None,
            ("from", None) => {
                let network = value.parse().ok()?;
                self.from.as_mut()?.insert(network);
            }
            ("set", Some(_)) => {
                self.sets.insert(value.parse().ok()?);
            }
            ("session", Some((client, server))) => {
                self.sessions.insert((client.parse().ok()?, server.parse().ok()?));
            }
            _ => return None,
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::{Answer, BTreeMap, Identity, Limits};

    fn limits() -> Limits {
        Limits {
            identity: Identity { uid: 1, gid: 2 },
            queue: 4097,
            owns_table: true,
            answer: Answer::Reset,
            grants_per_minute: 600,
            ports: BTreeMap::from([(("tcp/22".parse().unwrap(), false), 30), (("udp/25".parse().unwrap(), true), 60)]),
            from: Some(["192.0.2.0/24".parse().unwrap(), "2001:db8::/64".parse().unwrap()].into()),
            sets: ["inet filter alice".parse().unwrap()].into(),
            sessions: [("[2001:db8::1]:40000".parse().unwrap(), "[2001:db8::2]:22".parse().unwrap())].into(),
        }
    }

    #[test]
    fn limits_survive_the_way_and_what_is_none_is_refused() {
        let (some, any) = (limits(), Limits { from: None, owns_table: false, answer: Answer::Drop, ..limits() });
        for limits in [some, any] {
            assert_eq!(limits.to_string().parse(), Ok(limits));
        }
        for line in [
            "",
            "port tcp/22",
            "port tcp 22",
            "from",
            "from x",
            "set a b",
            "session 192.0.2.1:9",
            "queue 65536",
            "owns it",
            "else",
        ] {
            let text = format!("{}{line}\n", limits());
            assert_eq!(text.parse::<Limits>().unwrap_err().to_string(), format!("`{line}` is no limit"));
        }
    }

    #[test]
    fn nothing_is_opened_beyond_the_limits_or_without_any() {
        let seconds = |limits: &Limits, source: &str, port: &str, once| {
            limits.seconds(source.parse().unwrap(), port.parse().unwrap(), once)
        };
        let limits = limits();
        for (source, other) in [("192.0.2.1", "198.51.100.1"), ("2001:db8::1", "2001:db9::1")] {
            assert_eq!(seconds(&limits, source, "tcp/22", false), 30);
            assert_eq!(seconds(&limits, source, "udp/25", true), 60);
            assert_eq!(seconds(&Limits { from: None, ..limits.clone() }, other, "tcp/22", false), 30);
            for (source, port, once) in [
                (other, "tcp/22", false),
                (source, "tcp/22", true),
                (source, "udp/22", false),
                (source, "udp/25", false),
                (source, "tcp/25", true),
            ] {
                assert_eq!(seconds(&limits, source, port, once), 0, "{source} {port} {once}");
            }
            assert_eq!(seconds(&"".parse().unwrap(), source, "tcp/22", false), 0);
        }
    }
}
