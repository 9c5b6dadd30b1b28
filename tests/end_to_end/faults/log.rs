//! The log stays short, whatever comes.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use knockq::crypto::Binding;

use super::{Knocks, SmallDisk, count, send};
use crate::lab::{Daemon, FAMILIES, Family, Lab, eventually};
use crate::{UntilDropped, raw_socket};

/// Lines a second at most, of all processes; a grant has a line of its own besides.
const LINES: usize = 10;

/// What each kind of packets is sent for.
const TIME: Duration = Duration::from_secs(4);

/// Doors that may open in a minute, of which one user gets half.
const GRANTS: usize = 120;

/// Addresses that mallory copies a knock to.
const THIEVES: u16 = 200;

#[test]
fn the_log_stays_under_ten_lines_a_second_whatever_arrives() {
    let lab = Lab::with("open_for = \"10m\"");
    lab.set(&format!("window = \"10m\"\ngrants_per_minute = {GRANTS}"));
    let disk = SmallDisk::with_the_store_of(&lab);
    let (daemon, start) = (lab.start(), Instant::now());
    let mut knocks = Knocks::new(&lab);
    disk.fill(&lab);
    quietly(&daemon, "knocks while the disk is full", || {
        let refused = "the counters cannot be written, so nothing is opened";
        let sockets = FAMILIES.map(|family| (family, lab.alice.enter(|| raw_socket(family))));
        // The store has a few pages to spare.
        eventually(refused, || {
            sockets.iter().for_each(|(family, socket)| send(socket, *family, &knocks.bound(*family)));
            count(&daemon, refused) > 0
        });
        for (family, socket) in sockets.iter().cycle().take(100) {
            send(socket, *family, &knocks.bound(*family));
        }
        thread::sleep(TIME);
    });
    disk.make_room();

    let [mut bound, mut two_sources, mut more] = [(); 3].map(|()| Vec::new());
    for _ in 0..50 {
        for family in FAMILIES {
            bound.push((family, knocks.bound(family)));
        }
    }
    for _ in 0..20 {
        for family in FAMILIES {
            let syns = knocks.next(family, Binding::Unbound, &[family.alice(), family.mallory()]);
            two_sources.extend(syns.into_iter().map(|syn| (family, syn)));
        }
    }
    let replays: Vec<_> = FAMILIES
        .into_iter()
        .flat_map(|family| {
            let syns = knocks.next(family, Binding::Unbound, &thieves(family));
            syns.into_iter().map(move |syn| (family, syn))
        })
        .collect();
    for _ in 0..100 {
        for family in FAMILIES {
            more.push((family, knocks.bound(family)));
        }
    }
    quietly(&daemon, "a user who knocks as fast as she can", || lab.alice.enter(|| once(&bound)));
    eventually("grants", || count(&daemon, "engine: granted") > 50);
    assert_eq!(count(&daemon, "the counters can be written again"), 1, "{}", daemon.log());
    quietly(&daemon, "tokens that come from two addresses", || lab.mallory.enter(|| once(&two_sources)));
    daemon_says(&daemon, "withdrawn reason=spent_twice user=alice");
    quietly(&daemon, "knocks that were copied", || lab.mallory.enter(|| again_and_again(&replays)));
    daemon_says(&daemon, "refused reason=replayed user=alice");
    quietly(&daemon, "more doors than may open", || lab.alice.enter(|| once(&more)));
    daemon_says(&daemon, "refused reason=over_rate user=alice");
    let minutes = 2 + usize::try_from(start.elapsed().as_secs() / 60).unwrap();
    assert!(count(&daemon, "engine: granted") <= minutes * GRANTS / 2, "{}", daemon.log());
    quietly(&daemon, "the counts of a minute", || daemon_says(&daemon, "refused reason=replayed user=alice count="));
    daemon.stop();
}

fn thieves(family: Family) -> Vec<IpAddr> {
    (20..20 + THIEVES).map(|thief| family.pick(&format!("10.77.2.{thief}"), &format!("fd77:2::{thief:x}"))).collect()
}

type Packet = (Family, Vec<u8>);

fn once(packets: &[Packet]) {
    let sockets = FAMILIES.map(raw_socket);
    for (family, packet) in packets {
        send(&sockets[usize::from(*family == Family::V6)], *family, packet);
    }
    thread::sleep(TIME);
}

fn again_and_again(packets: &[Packet]) {
    let (sockets, start) = (FAMILIES.map(raw_socket), Instant::now());
    for (family, packet) in packets.iter().cycle().take_while(|_| start.elapsed() < TIME) {
        send(&sockets[usize::from(*family == Family::V6)], *family, packet);
    }
}

#[track_caller]
fn daemon_says(daemon: &Daemon, text: &str) {
    eventually(text, || count(daemon, text) > 0);
}

/// Does something while the lines of each second are counted.
#[track_caller]
fn quietly(daemon: &Daemon, what: &str, work: impl FnOnce() + Send) {
    let is_over = AtomicBool::new(false);
    let most = thread::scope(|scope| {
        let until_dropped = UntilDropped(&is_over);
        let most = scope.spawn(|| most_lines_in_a_second(daemon, &is_over));
        work();
        drop(until_dropped);
        most.join().unwrap()
    });
    assert!(most < LINES, "{what}: {most} lines in a second\n{}", daemon.log());
}

fn most_lines_in_a_second(daemon: &Daemon, is_over: &AtomicBool) -> usize {
    let lines = || daemon.log().lines().filter(|line| !line.contains("engine: granted")).count();
    let (mut seen, mut most) = (VecDeque::from([(Instant::now(), lines())]), 0);
    while !is_over.load(Ordering::Relaxed) {
        thread::sleep(Duration::from_millis(50));
        let (now, count) = (Instant::now(), lines());
        while seen.len() > 1 && now.duration_since(seen[0].0) > Duration::from_secs(1) {
            seen.pop_front();
        }
        // What came while this thread was held up came in more than one.
        let seconds = usize::try_from(now.duration_since(seen[0].0).as_secs()).unwrap().max(1);
        most = most.max((count - seen[0].1).div_ceil(seconds));
        seen.push_back((now, count));
    }
    most
}
