//! From the knock on the wire to the element in the set.

use std::collections::HashMap;
use std::io;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use knockq::crypto::{Binding, KnockPorts};
use knockq::packet::Flow;
use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_netfilter::nftables::{
    DataAttribute, ListAttribute, NfTablesMessage, SetElementAttribute, SetElementList,
};
use netlink_packet_netfilter::{NetfilterMessage, NetfilterMessageInner};
use netlink_sys::{Socket, protocols::NETLINK_NETFILTER};
use rustix::net::sockopt::{Timeout, set_socket_recv_buffer_size_force, set_socket_timeout};

use crate::flood::{self, Flooded, RawSocket};
use crate::lab::{Family, Host, Lab};
use crate::recorded::persona;
use crate::users::{self, User};
use crate::{FLOODS, Row, Scale, machine, millis, percentile};

/// Multicast group of nf_tables (`NFNLGRP_NFTABLES`).
const GROUP: u32 = 7;

/// Time between two knocks.
pub const PACE: Duration = Duration::from_millis(10);

/// Time after which a knock counts as lost.
const LOST: Duration = Duration::from_secs(2);

/// Users who knock in turn, since counters rise by one a second and must lie within the window.
pub const USERS: usize = 10;

/// How long each knock took that opened something, sorted; and how many did not.
pub struct Latencies {
    pub sorted: Vec<Duration>,
    pub lost: usize,
}

impl Latencies {
    pub fn median(&self) -> Option<Duration> {
        (!self.sorted.is_empty()).then(|| percentile(&self.sorted, 50))
    }

    pub fn show(&self) -> String {
        if self.sorted.is_empty() {
            return format!("{} of {} lost", self.lost, self.lost);
        }
        let [p50, p99] = [50, 99].map(|percent| millis(percentile(&self.sorted, percent)));
        format!("{p50}, {p99}; {} of {} lost", self.lost, self.lost + self.sorted.len())
    }
}

pub fn rows(scale: &Scale) -> Vec<Row> {
    FLOODS.iter().flat_map(|&rate| under(scale, rate)).collect()
}

fn under(scale: &Scale, rate: u32) -> Vec<Row> {
    let lab = Lab::network();
    lab.configure("[services.ssh]\nports = [\"tcp/22\"]\nopen_for = \"30s\"\n");
    let users = users::add(&lab, USERS);
    let daemon = lab.start();
    let rows = match rate {
        0 => {
            let latencies = of_knocks(&lab, &users, scale.knocks, PACE);
            let state = lab.directory.path.join("state");
            let sync = format!("{} ({})", millis(machine::sync(&state)), machine::filesystem(&state));
            vec![
                Row("knock to element, quiet: p50, p99; lost".to_owned(), "p50 < 0.5 ms, none lost", latencies.show()),
                Row("one fdatasync there: p50 (file system)".to_owned(), "", sync),
            ]
        }
        _ => {
            let (latencies, flooded) = flood::during(&lab, rate, || of_knocks(&lab, &users, scale.knocks, PACE));
            let figure = format!("knock to element, under {rate} SYN/s: p50, p99; lost");
            vec![
                Row(figure, "p50 < 1 ms, none lost", latencies.show()),
                Row("the flood meanwhile".to_owned(), "", flooded.show()),
            ]
        }
    };
    daemon.stop();
    rows
}

impl Flooded {
    pub fn show(&self) -> String {
        let Self { rate, queued, dropped, generator } = self;
        format!("{rate:.0} SYN/s sent, {queued} queued, {dropped} dropped unread; sending took {generator:.2} cores")
    }
}

/// Latencies of real knocks, of users in turn.
pub fn of_knocks(lab: &Lab, users: &[User], count: u32, pace: Duration) -> Latencies {
    let ports = KnockPorts::new([20_000..=21_023]).unwrap();
    let persona = persona(true);
    let each = count / u32::try_from(users.len()).unwrap();
    let first = machine::unix_now() - u64::from(each) / 2;
    let packet = |number: u32| {
        let user = &users[usize::try_from(number).unwrap() % users.len()];
        let n = first + u64::from(number) / u64::try_from(users.len()).unwrap();
        let token = user.key.seal(n, 22, Binding::Bound(source(number).into()));
        let flow = Flow {
            source: source(number).into(),
            source_port: 40_000,
            destination: Family::V4.server(),
            destination_port: user.key.pad(n).knock_port(&ports),
        };
        persona.syn(&flow, token.sequence, token.tsval).unwrap()
    };
    let packets: Vec<Vec<u8>> = (0..count).map(packet).collect();
    measure(lab, count, pace, || {
        let socket = RawSocket::new();
        move |number| socket.send(&packets[number])
    })
}

/// Knocks of one source each, one after the other. What `ready` makes, on the client, sends the knock of a number.
pub fn measure<S: FnMut(usize)>(lab: &Lab, count: u32, pace: Duration, ready: impl FnOnce() -> S + Send) -> Latencies {
    let is_over = AtomicBool::new(false);
    let (sent, heard) = thread::scope(|scope| {
        let listener = scope.spawn(|| listen(&lab.server, &is_over));
        thread::sleep(Duration::from_millis(100));
        let sent = lab.alice.enter(|| {
            let mut send = ready();
            let knock = |number| {
                thread::sleep(pace);
                let start = Instant::now();
                send(number);
                start
            };
            (0..usize::try_from(count).unwrap()).map(knock).collect::<Vec<Instant>>()
        });
        thread::sleep(LOST);
        is_over.store(true, Ordering::Relaxed);
        (sent, listener.join().unwrap())
    });
    let mut seen = HashMap::new();
    for (when, datagram) in &heard {
        for source in sources(datagram) {
            seen.entry(source).or_insert(*when);
        }
    }
    let taken = |(number, start): (u32, &Instant)| Some(seen.get(&source(number))?.duration_since(*start));
    let mut sorted: Vec<Duration> = (0..).zip(&sent).filter_map(taken).collect();
    sorted.sort_unstable();
    Latencies { lost: sent.len() - sorted.len(), sorted }
}

/// The address that a knock comes from.
pub fn source(number: u32) -> Ipv4Addr {
    Ipv4Addr::from(0x0a4e_0000 + number)
}

/// What the kernel tells of its tables, and when it was heard: reading it comes later.
fn listen(server: &Host, is_over: &AtomicBool) -> Vec<(Instant, Vec<u8>)> {
    server.enter(|| {
        let mut socket = Socket::new(NETLINK_NETFILTER).unwrap();
        socket.bind_auto().unwrap();
        socket.add_membership(GROUP).unwrap();
        set_socket_recv_buffer_size_force(&socket, 8 << 20).unwrap();
        set_socket_timeout(&socket, Timeout::Recv, Some(Duration::from_millis(50))).unwrap();
        let mut heard = Vec::new();
        while !is_over.load(Ordering::Relaxed) {
            let mut datagram = Vec::with_capacity(32 << 10);
            match socket.recv(&mut datagram, 0) {
                Ok(_) => heard.push((Instant::now(), datagram)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => panic!("netlink: {error}"),
            }
        }
        heard
    })
}

/// The IPv4 sources of the elements that a datagram tells of.
fn sources(datagram: &[u8]) -> Vec<Ipv4Addr> {
    let mut sources = Vec::new();
    let mut rest = datagram;
    while let Some(length) = rest.first_chunk().map(|length| usize::try_from(u32::from_ne_bytes(*length)).unwrap()) {
        let message = NetlinkMessage::<NetfilterMessage>::deserialize(&rest[..length]);
        if let Ok(NetlinkMessage { payload: NetlinkPayload::InnerMessage(message), .. }) = message
            && let NetfilterMessageInner::NfTables(NfTablesMessage::NewSetElement(message)) = message.inner
        {
            let elements = message.attributes.iter().filter_map(|attribute| match attribute {
                SetElementList::Elements(elements) => Some(elements),
                _ => None,
            });
            let parts = elements.flatten().filter_map(|element| match element {
                ListAttribute::Element(parts) => Some(parts),
                _ => None,
            });
            sources.extend(parts.flatten().filter_map(|part| match part {
                SetElementAttribute::Key(DataAttribute::Value(key)) => Some(Ipv4Addr::from(*key.first_chunk::<4>()?)),
                _ => None,
            }));
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    sources
}
