//! Writes the seeds that are not text: `cargo run --example seeds` in `fuzz/`. Those of text are written by hand.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use knockq::crypto::{KnockPorts, KnockSecrets, PrivateKey, Side};
use knockq::nft::{Comment, Door, Element, Member, Query, Ruleset};
use knockq::packet::{Flow, Syn};
use knockq::serve::commands::Command;
use knockq::serve::control::{Reply, Request, Selection};
use knockq::serve::policy::{Allowance, Opening, Policy};
use knockq::serve::sandbox::Identity;
use knockq::serve::settings::{Outline, Settings};
use knockq::service::{Answer, Name, Port};
use knockq::verify::{Registry, Secrets, Service, SourcePolicy, User};
use knockq_fuzz::recorded::persona;

fn main() {
    packets();
    knocks();
    commands();
    channel();
    control();
    handed_over();
    netlink();
    socks();
}

fn write(target: &str, name: &str, bytes: impl AsRef<[u8]>) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(target);
    fs::create_dir_all(&directory).unwrap();
    fs::write(directory.join(name), bytes).unwrap();
}

fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<u8> = hex.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    digits.chunks(2).map(byte).collect()
}

fn syn(is_v4: bool) -> Vec<u8> {
    let [source, destination] = if is_v4 { ["192.0.2.1", "192.0.2.2"] } else { ["2001:db8::1", "2001:db8::2"] };
    let [source, destination]: [IpAddr; 2] = [source, destination].map(|text| text.parse().unwrap());
    let flow = Flow { source, source_port: 40_000, destination, destination_port: 20_001 };
    persona(is_v4).syn(&flow, 1, 2).unwrap()
}

/// A SYN over IPv6 behind these extension headers, the first of which has this number.
fn behind(first: u8, extensions: &[u8]) -> Vec<u8> {
    let syn = syn(false);
    let mut packet = [&syn[..40], extensions, &syn[40..]].concat();
    packet[6] = first;
    packet
}

fn packets() {
    write("packet", "v4", syn(true));
    write("packet", "v6", syn(false));
    let mut with_options = syn(true);
    with_options.splice(20..20, [7, 4, 4, 0]);
    with_options[0] = 0x46;
    write("packet", "v4-options", with_options);
    let mut sack = syn(true);
    sack[32] = 0xf0; // 40 bytes of options
    sack.extend(bytes("050a0000000100000002 0101 fd08f98901020304"));
    write("packet", "v4-forty-bytes-of-options", sack);
    write("packet", "v6-hop-by-hop", behind(0, &[6, 0, 1, 4, 0, 0, 0, 0]));
    let chain = bytes("3c00010400000000 2b00010400000000 3300000000000000 0601000000000000 0000000000000000");
    write("packet", "v6-chain", behind(0, &chain));
    write("packet", "v6-first-fragment", behind(44, &[6, 0, 0, 1, 0, 0, 0, 1]));
    write("packet", "v6-atomic-fragment", behind(44, &[6, 0, 0, 0, 0, 0, 0, 1]));
    write("packet", "v6-authentication", behind(51, &[6, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2]));
    let read = [with_length(&syn(true)), with_length(&[]), with_length(&syn(false))].concat();
    write("relay", "packets", read);
    let mut block = vec![0; 256];
    block[..62].copy_from_slice(&[&[0, 60], syn(true).as_slice()].concat());
    block[128..130].copy_from_slice(&u16::MAX.to_be_bytes());
    write("relay", "block", block);
    for syn in [syn(true), syn(false)] {
        assert!(Syn::parse(&syn).is_ok());
    }
}

fn with_length(bytes: &[u8]) -> Vec<u8> {
    [&[u8::try_from(bytes.len()).unwrap()], bytes].concat()
}

/// Steps of a world: knock is `3 user n selector source binding`, see `World::step`.
fn knocks() {
    let knock = |user: u8, n: i8, selector: u8, source: u8, binding: u8| {
        vec![3, user, n.cast_unsigned(), selector, source, binding]
    };
    let (commit, restart, full) = ([11], [15, 0], [15, 1]);
    let wait = |seconds| [12, seconds];
    let all = |steps: &[&[u8]]| steps.concat();
    let bound = knock(0, 0, 0, 0, 2);
    let unbound = knock(0, 0, 0, 0, 0);
    let replay = |source: &[u8]| [&[9, 0], source].concat();
    write("handle", "knock-and-replay", all(&[&bound, &commit, &replay(&[0]), &restart, &replay(&[0])]));
    write("handle", "every-user", all(&[&bound, &knock(1, 0, 1, 0, 0), &knock(2, 8, 0, 3, 2), &commit]));
    write("handle", "a-stranger", all(&[&knock(3, 0, 0, 0, 2), &commit]));
    // The last byte of the source is changed: the token comes from elsewhere.
    let elsewhere = replay(&[1, 15, 3]);
    write("handle", "spent-twice", all(&[&unbound, &elsewhere, &commit, &elsewhere]));
    write("handle", "in-and-out-of-the-window", all(&[&knock(0, 64, 0, 0, 2), &knock(2, -64, 0, 0, 2), &commit]));
    let wrong_tag = [&[7, 0, 0, 0, 0, 2][..], &[1, 51, 1]].concat();
    let wrong_tags: Vec<u8> = [wrong_tag, wait(1).to_vec()].concat().repeat(25);
    write("handle", "wrong-tags", all(&[&wrong_tags, &bound, &commit]));
    write("handle", "disk-full", all(&[&full, &bound, &commit, &full, &replay(&[0]), &commit]));
    let [without_first, all_users] = [[14, 2], [14, 0]];
    let enforce = [14];
    let reload = |which: &[u8]| [which, &enforce].concat();
    write("handle", "reload-in-flight", all(&[&bound, &without_first, &enforce, &commit, &reload(&all_users)]));
    let lost = all(&[&full, &bound, &commit, &reload(&without_first), &full, &reload(&all_users)]);
    write("handle", "removed-and-back", all(&[&lost, &replay(&[0]), &commit]));
    write(
        "handle",
        "clocks",
        all(&[&[13, 0], &bound, &[13, 1], &bound, &[13, 3, 0, 0, 0, 9], &bound, &wait(9), &commit]),
    );
    write("handle", "any-packet", [&[0][..], &with_length(&syn(true))].concat());
}

fn commands() {
    let door =
        |source: &str, port: &str, once| Door { source: source.parse().unwrap(), port: port.parse().unwrap(), once };
    let put = |element, seconds| {
        Command::Put(element, Duration::from_secs(seconds), Comment::read("alice ssh 1234 0a1b2c3d bound").unwrap())
    };
    let of_set = |source: &str| {
        Element::Member(Member { set: "inet mine s".parse().unwrap(), source: source.parse().unwrap(), port: None })
    };
    let (v4, v6) = (door("192.0.2.1", "tcp/22", false), door("2001:db8::1", "udp/51820", true));
    for (name, commands) in [
        ("put-v4", vec![put(Element::Opens(v4), 30), put(of_set("192.0.2.1"), 30)]),
        ("put-once-v6", vec![put(Element::Lasts(v6), 43_200), put(Element::Opens(v6), 43_200)]),
        ("too-long", vec![put(Element::Opens(v4), 31)]),
        ("delete", vec![Command::Delete(Element::Opens(v4)), Command::Delete(of_set("2001:db8::1"))]),
        ("known", vec![Command::Known(Element::Opens(v6), Duration::from_secs(1))]),
        ("ask", vec![Command::Ask(of_set("192.0.2.1"), Query::Layout)]),
        ("next", vec![Command::Next, Command::Forget, Command::Count]),
    ] {
        write("command", name, commands.iter().flat_map(Command::encode).collect::<Vec<u8>>());
    }
}

/// Each message is: descriptors, what is expected, length, bytes.
fn channel() {
    write("channel", "start", [2, 0, 1, 1]);
    write("channel", "stop-where-start-is-expected", [0, 0, 1, 11]);
    write("channel", "every-message", (1..=4).flat_map(|message| [0, 1, 1, message]).collect::<Vec<u8>>());
    write("channel", "too-many-descriptors", [14, 1, 1, 1]);
    write("channel", "too-long", [0, 1, 2, 1, 0]);
    write("channel", "nothing", [0, 1, 0]);
}

fn control() {
    let request = |request: &Request| [&[1], postcard::to_stdvec(request).unwrap().as_slice()].concat();
    write("control", "reload", request(&Request::Reload));
    write("control", "confirm", request(&Request::Confirm));
    let revoke = |selection| request(&Request::Revoke(selection));
    write("control", "revoke-all", revoke(Selection::All));
    write("control", "revoke-user", revoke(Selection::User("alice".parse().unwrap())));
    write("control", "revoke-v4", revoke(Selection::Source("192.0.2.0/24".parse().unwrap())));
    write("control", "revoke-v6", revoke(Selection::Source("2001:db8::/32".parse().unwrap())));
    let refused = Reply::Refused { message: "no".to_owned(), hint: "try".to_owned() };
    write("control", "answer", [&[0], postcard::to_stdvec(&refused).unwrap().as_slice()].concat());
}

fn handed_over() {
    let seed = |name: &str, kind: u8, bytes: Vec<u8>| write("handover", name, [&[kind], bytes.as_slice()].concat());
    let identity = Identity { uid: 1, gid: 1 };
    let ssh: Name = "ssh".parse().unwrap();
    let port: Port = "tcp/22".parse().unwrap();
    let policy = Policy {
        owns_table: true,
        grants_per_minute: 600,
        services: BTreeMap::from([(ssh.clone(), Opening { ports: vec![port], once: false, seconds: 30, kill: false })]),
        users: BTreeMap::from([(
            "alice".parse().unwrap(),
            Allowance {
                services: vec![ssh.clone()],
                from: vec!["192.0.2.0/24".parse().unwrap()],
                add_to: vec!["inet filter alice".parse().unwrap()],
                ..Allowance::default()
            },
        )]),
        log_closings: false,
        trusted: Vec::new(),
        old_count: false,
    };
    seed("policy", 0, postcard::to_stdvec(&policy).unwrap());
    let selection = Selection::Source("192.0.2.0/24".parse().unwrap());
    seed("selection", 1, postcard::to_stdvec(&selection).unwrap());

    let [server, alice]: [PrivateKey; 2] = ["B", "C"].map(|c| format!("{}A=", c.repeat(42)).parse().unwrap());
    let ruleset = Ruleset {
        guarded: vec![port],
        kill: vec![port],
        knock_ports: vec![20_000..=21_023],
        trusted: vec!["10.0.0.0/8".parse().unwrap()],
        answer: Answer::Drop,
        queue: 4097,
    };
    // As `Plan::seal` writes it.
    let texts = ["managed", "ready: users 1", &ruleset.to_string(), &ruleset.for_check(), "before"];
    seed("plan", 2, texts.join("\0").into_bytes());
    let user = User {
        name: "alice".parse().unwrap(),
        public_key: *alice.public(),
        secrets: Secrets::Token(KnockSecrets::derive(Side::Server, &server, alice.public(), None).unwrap()),
        services: vec![0],
        source: SourcePolicy::Bound,
        from: vec!["192.0.2.0/24".parse().unwrap()],
        open_for: None,
        expires: None,
    };
    let registry = Registry {
        window: 60,
        knock_ports: KnockPorts::new([20_000..=21_023]).unwrap(),
        grants_per_minute: 600,
        services: vec![Service { name: ssh, selector: 22, ports: vec![port], open_for: 30, once: false, kill: false }],
        users: vec![user],
    };
    let outline = Outline { users: 1, services: 1, knock_ports: "20000-21023".to_owned(), ..Outline::default() };
    let (server, store_path) = (*server.public(), "store".to_owned());
    let settings = Settings { identity, server, store_path, registry, policy, outline };
    seed("settings", 3, postcard::to_stdvec(&settings).unwrap());
}

/// One message of netlink: its kind, and what follows the header.
fn message(kind: u16, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(16 + payload.len()).unwrap();
    [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), &[0; 2], &[0; 8], payload].concat()
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap();
    let mut attribute = [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat();
    attribute.resize(attribute.len().next_multiple_of(4), 0);
    attribute
}

/// Messages of linux/netfilter/nf_tables.h (subsystem 10), and answers of linux/netlink.h.
fn netlink() {
    let of_tables = |message_kind: u8, attributes: &[Vec<u8>]| {
        message(u16::from_be_bytes([10, message_kind]), &[&[1, 0, 0, 0][..], &attributes.concat()].concat())
    };
    let name = || attribute(1, b"knockq\0");
    let watch = |name: &str, datagram: &[u8]| write("netlink", name, [&[2], datagram].concat());
    let flags = attribute(2, &1_u32.to_be_bytes());
    watch("table-sleeps", &of_tables(0, &[name(), flags]));
    watch("table-deleted", &of_tables(2, &[name()]));
    watch("chain-deleted", &of_tables(5, &[name(), attribute(3, b"gate\0")]));
    watch("set-deleted", &of_tables(11, &[name(), attribute(2, b"open4\0")]));
    let rule = of_tables(6, &[name(), attribute(2, b"gate\0"), attribute(4, &[])]);
    let element = |kind: u8, set: &[u8], more: &[u8]| {
        let key = attribute(1 | 0x8000, &attribute(1, &[192, 0, 2, 1, 6, 0, 0, 0, 0, 22, 0, 0]));
        let elements = attribute(3 | 0x8000, &attribute(1 | 0x8000, &[&key, more].concat()));
        of_tables(kind, &[name(), attribute(2, set), elements])
    };
    let noted = attribute(6, b"\0\x15alice ssh 9 0000000a\0");
    let left = attribute(5, &9000_u64.to_be_bytes());
    watch("door-loaded", &element(12, b"open4\0", &[left, noted].concat()));
    watch("rule-deleted-and-added", &[of_tables(8, &[name()]), rule].concat());
    watch("door-deleted", &element(14, b"open4\0", &[]));
    watch("guarded-deleted", &element(14, b"guarded\0", &[]));

    let verdict = |code: i32| message(2, &[&code.to_ne_bytes()[..], &message(0x0a0c, &[1, 0, 0, 0])].concat());
    write("netlink", "done", [&[1], verdict(0).as_slice()].concat());
    write("netlink", "refused", [&[1], verdict(-2).as_slice()].concat());
    let metrics = [attribute(10, &64_u32.to_ne_bytes()), attribute(8, &1_460_u32.to_ne_bytes())].concat();
    let header = [2, 32, 0, 0, 254, 0, 0, 1, 0, 0, 0, 0];
    let route = [&header[..], &attribute(1, &[192, 0, 2, 1]), &attribute(8 | 0x8000, &metrics)].concat();
    write("netlink", "route", [&[0], message(24, &route).as_slice()].concat());
}

fn socks() {
    let greetings = [("open", &[5, 1, 0][..]), ("login", b"\x05\x02\0\x02\x01\x05alice\x06secret")];
    let v6 = [&[4][..], &[0; 15], &[1]].concat();
    for (way, greeting) in greetings {
        for (kind, address) in [("v4", &[1, 127, 0, 0, 1][..]), ("v6", &v6), ("name", b"\x03\x06server")] {
            write("socks", &format!("{way}-{kind}"), [greeting, &[5, 1, 0], address, &[0, 22]].concat());
        }
    }
    write("socks", "bind", [5, 1, 0, 5, 2, 0, 1, 127, 0, 0, 1, 0, 22]);
    write("socks", "version-4", b"\x04\x01\0\x16\x7f\0\0\x01alice\0");
}
