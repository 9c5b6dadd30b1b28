//! A client and a server in memory, with an injected clock: no kernel, no file, no socket.

#![allow(dead_code, reason = "each test uses its own part")]

use std::collections::HashMap;
use std::net::IpAddr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use knockq::crypto::{Binding, KnockKey, KnockPorts, KnockSecrets, PrivateKey, PublicKey, Side};
use knockq::packet::Flow;
use knockq::service::{Name, Port};
use knockq::verify::{
    Claim, CounterLog, Decision, Grant, Reason, Recorded, Refusal, Registry, Reservation, Secrets, Service,
    SourcePolicy, User, Verifier,
};

use crate::recorded::persona;

pub const NOW: u64 = 1_790_000_000;
pub const WINDOW: u64 = 60;

/// A user's side: its key, as the client derives it.
pub struct Client {
    pub key: KnockKey,
}

/// A server whose counter log is a map.
pub struct Server {
    pub verifier: Verifier,
    pub log: Memory,
    pub registry: Registry,
}

#[derive(Default, Clone)]
pub struct Memory {
    pub last: HashMap<PublicKey, u64>,
    pub is_full: bool,
}

impl CounterLog for Memory {
    type Error = &'static str;

    fn record<'a>(&mut self, batch: impl Iterator<Item = &'a Reservation>) -> Result<(), &'static str> {
        if self.is_full {
            return Err("disk full");
        }
        for reservation in batch {
            let last = self.last.entry(*reservation.client()).or_default();
            *last = (*last).max(reservation.n());
        }
        Ok(())
    }
}

/// How one knock ended.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    Granted(Grant),
    Refused(Reason),
    Withdrawn { source: IpAddr, elsewhere: IpAddr },
}

impl End {
    #[track_caller]
    pub fn grant(self) -> Grant {
        match self {
            Self::Granted(grant) => grant,
            other => panic!("not granted: {other:?}"),
        }
    }
}

pub fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub fn name(text: &str) -> Name {
    text.parse().unwrap()
}

/// The key pair of a number, the same in every run.
pub fn private_key(number: u64) -> PrivateKey {
    let bytes: Vec<u8> = [number, 1, 2, 3].iter().flat_map(|part| part.to_be_bytes()).collect();
    BASE64.encode(bytes).parse().unwrap()
}

pub fn service(text: &str, ports: &[&str], once: bool) -> Service {
    let ports: Vec<Port> = ports.iter().map(|port| port.parse().unwrap()).collect();
    Service { name: name(text), selector: ports[0].number, ports, open_for: 30, once, kill: false }
}

/// `count` users u0, u1, … who may open ssh (22) and wg (51820, udp and tcp), but not mail (25); `edit` changes them.
pub fn world(count: usize, edit: impl Fn(usize, &mut User)) -> (Server, Vec<Client>) {
    let server = private_key(0);
    let mut users = Vec::new();
    let mut clients = Vec::new();
    for place in 0..count {
        let own = private_key(1 + u64::try_from(place).unwrap());
        let mut user = User {
            name: name(&format!("u{place}")),
            public_key: *own.public(),
            secrets: Secrets::Token(KnockSecrets::derive(Side::Server, &server, own.public(), None).unwrap()),
            services: vec![0, 1],
            source: SourcePolicy::Any,
            from: Vec::new(),
            open_for: None,
            expires: None,
        };
        edit(place, &mut user);
        users.push(user);
        let secrets = KnockSecrets::derive(Side::Client, &own, server.public(), None).unwrap();
        clients.push(Client { key: KnockKey::new(&secrets) });
    }
    let registry = Registry {
        window: WINDOW,
        knock_ports: KnockPorts::new([20000..=21023]).unwrap(),
        grants_per_minute: 60_000,
        services: vec![
            service("ssh", &["tcp/22"], false),
            service("wg", &["udp/51820", "tcp/51820"], true),
            service("mail", &["tcp/25"], false),
        ],
        users,
    };
    let verifier = Verifier::new(registry.clone(), &HashMap::new(), NOW);
    (Server { verifier, log: Memory::default(), registry }, clients)
}

pub struct Knock<'a> {
    pub client: &'a Client,
    pub n: u64,
    pub port: u16,
    pub binding: Binding,
    pub source: IpAddr,
}

impl<'a> Knock<'a> {
    pub fn new(client: &'a Client, n: u64) -> Self {
        Self { client, n, port: 22, binding: Binding::Unbound, source: address("203.0.113.9") }
    }

    pub fn port(self, port: u16) -> Self {
        Self { port, ..self }
    }

    pub fn bound_to(self, source: &str) -> Self {
        Self { binding: Binding::Bound(address(source)), ..self }
    }

    pub fn from(self, source: &str) -> Self {
        Self { source: address(source), ..self }
    }

    pub fn packet(&self) -> Vec<u8> {
        let ports = KnockPorts::new([20000..=21023]).unwrap();
        self.packet_to(self.client.key.pad(self.n).knock_port(&ports))
    }

    pub fn packet_to(&self, knock_port: u16) -> Vec<u8> {
        let token = self.client.key.seal(self.n, self.port, self.binding);
        self.syn(knock_port, token.sequence, token.tsval)
    }

    pub fn with_tag_off_by(&self, difference: u32) -> Vec<u8> {
        let ports = KnockPorts::new([20000..=21023]).unwrap();
        let token = self.client.key.seal(self.n, self.port, self.binding);
        self.syn(self.client.key.pad(self.n).knock_port(&ports), token.sequence, token.tsval ^ difference)
    }

    pub fn syn(&self, knock_port: u16, sequence: u32, tsval: u32) -> Vec<u8> {
        let destination = if self.source.is_ipv4() { address("192.0.2.1") } else { address("2001:db8::1") };
        let flow = Flow { source: self.source, source_port: 40000, destination, destination_port: knock_port };
        persona(self.source.is_ipv4()).syn(&flow, sequence, tsval).unwrap()
    }
}

impl Server {
    /// Handles, records and settles one packet at once.
    pub fn receive(&mut self, packet: &[u8], now: u64) -> End {
        match self.claim(packet, now) {
            Ok(claim) => match self.record(claim) {
                Ok(recorded) => self.settle(&recorded, now),
                Err(reason) => End::Refused(reason),
            },
            Err(end) => end,
        }
    }

    pub fn claim(&mut self, packet: &[u8], now: u64) -> Result<Claim, End> {
        self.verifier.advance(now, usize::MAX);
        match self.verifier.handle(packet, now) {
            Decision::Claimed(claim) => Ok(claim),
            Decision::Refused(Refusal { reason, .. }) => Err(End::Refused(reason)),
            Decision::Withdrawn(withdrawal) => {
                Err(End::Withdrawn { source: withdrawal.source, elsewhere: withdrawal.elsewhere })
            }
        }
    }

    pub fn record(&mut self, claim: Claim) -> Result<Recorded, Reason> {
        Claim::record(vec![claim], &mut self.log)
            .map(|mut recorded| recorded.remove(0))
            .map_err(|(refusals, _)| refusals[0].0.reason)
    }

    pub fn settle(&mut self, recorded: &Recorded, now: u64) -> End {
        match self.verifier.settle(recorded, now) {
            Ok(grant) => End::Granted(grant),
            Err(refusal) => End::Refused(refusal.reason),
        }
    }

    /// The configuration is edited and read again: what the verifier has learnt goes over, the rest is in the log.
    pub fn reload(&mut self, now: u64, edit: impl FnOnce(&mut Registry)) {
        edit(&mut self.registry);
        self.verifier.replace_with(Verifier::new(self.registry.clone(), &self.log.last, now));
    }

    /// What a new process knows: the configuration and what the log kept.
    pub fn restart(&mut self, now: u64) {
        self.verifier = Verifier::new(self.registry.clone(), &self.log.last, now);
    }
}
