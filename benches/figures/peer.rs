//! Peers, on the same hosts and in the same run: each runs nft to put an element into a set when it is knocked at.

use std::fs::{self, Permissions};
use std::net::UdpSocket;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use knockq::packet::Flow;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::flood::RawSocket;
use crate::lab::{Family, Lab};
use crate::latency::{self, Latencies, measure, source};
use crate::recorded::persona;
use crate::{Row, Scale, users};

/// Time between two knocks: none of the peers is kept waiting.
const PACE: Duration = Duration::from_millis(150);

const TABLE: &str = "table inet peer { set open4 { type ipv4_addr; }; }";

/// The ports of knockd's sequence, as its manual has them.
const SEQUENCE: [u16; 3] = [7000, 8000, 9000];

const KNOCKD: &str = "\
[options]
logfile = LOG
[open]
sequence = 7000,8000,9000
seq_timeout = 5
tcpflags = syn
command = /usr/sbin/nft add element inet peer open4 { %IP% }
";

const ACCESS: &str = "\
SOURCE ANY
KEY benchmark-key
HMAC_KEY benchmark-hmac-key
CMD_CYCLE_OPEN /usr/sbin/nft add element inet peer open4 { $SRC }
CMD_CYCLE_CLOSE NONE
CMD_CYCLE_TIMER 5
";

pub fn rows(scale: &Scale) -> Vec<Row> {
    let count = scale.peer_knocks;
    let own = knockq(count);
    let row = |peer: &str, program: &str, measure: &dyn Fn() -> Latencies| {
        let is_here = Command::new("sh").args(["-c", &format!("command -v {program}")]).output().unwrap();
        let measured = if is_here.status.success() {
            let theirs = measure();
            let ratio = theirs.median().zip(own.median());
            let ratio = ratio.map(|(theirs, own)| theirs.as_secs_f64() / own.as_secs_f64());
            format!("{}; {:.1} times knockq's p50", theirs.show(), ratio.unwrap_or(f64::NAN))
        } else {
            "not installed: apt-get install knockd fwknop-server fwknop-client".to_owned()
        };
        Row(format!("{peer}: p50, p99; lost"), "", measured)
    };
    vec![
        Row("knockq, as the peers below: p50, p99; lost".to_owned(), "", own.show()),
        row("knockd, three SYNs", "knockd", &|| knockd(count)),
        row("fwknop, one datagram to its UDP server", "fwknopd", &|| fwknop(count, &["--udp-server"])),
        row("fwknop, one datagram that libpcap sees", "fwknopd", &|| fwknop(count, &["-i", "eth1"])),
    ]
}

fn knockq(count: u32) -> Latencies {
    let lab = Lab::network();
    lab.configure("[services.ssh]\nports = [\"tcp/22\"]\n");
    let users = users::add(&lab, latency::USERS);
    let daemon = lab.start();
    let latencies = latency::of_knocks(&lab, &users, count, PACE);
    daemon.stop();
    latencies
}

fn knockd(count: u32) -> Latencies {
    let lab = Lab::network();
    lab.server.nft(&[TABLE]);
    let directory = &lab.directory.path;
    let config = directory.join("knockd.conf");
    fs::write(&config, KNOCKD.replace("LOG", directory.join("knockd.log").to_str().unwrap())).unwrap();
    let _daemon = Peer::start(&lab, Command::new("knockd").args(["-i", "eth1", "-c"]).arg(config));
    let persona = persona(true);
    let packet = |number: u32, destination_port: u16| {
        let destination = Family::V4.server();
        let flow = Flow { source: source(number).into(), source_port: 40_000, destination, destination_port };
        persona.syn(&flow, number, number).unwrap()
    };
    let knocks: Vec<[Vec<u8>; 3]> = (0..count).map(|number| SEQUENCE.map(|port| packet(number, port))).collect();
    measure(&lab, count, PACE, || {
        let socket = RawSocket::new();
        move |number| knocks[number].iter().for_each(|packet| socket.send(packet))
    })
}

fn fwknop(count: u32, mode: &[&str]) -> Latencies {
    let lab = Lab::network();
    lab.server.nft(&[TABLE]);
    let directory = &lab.directory.path;
    let [config, access, pid, digests] =
        ["fwknopd.conf", "access.conf", "pid", "digests"].map(|name| directory.join(name));
    for (path, text) in [(&config, format!("FWKNOP_RUN_DIR {};\n", directory.display())), (&access, ACCESS.to_owned())]
    {
        fs::write(path, text).unwrap();
        fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
    }
    let datagrams: Vec<Vec<u8>> = (0..count).map(|number| datagram(directory, number)).collect();
    let mut command = Command::new("fwknopd");
    command.arg("-f").args(mode).arg("-c").arg(config).arg("-a").arg(access);
    let _daemon = Peer::start(&lab, command.arg("-p").arg(pid).arg("-d").arg(digests));
    measure(&lab, count, PACE, || {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        move |number| {
            socket.send_to(&datagrams[number], (Family::V4.server(), 62201)).unwrap();
        }
    })
}

/// What fwknop's client would send.
fn datagram(directory: &Path, number: u32) -> Vec<u8> {
    let file = directory.join(format!("{number}.spa"));
    let mut client = Command::new("fwknop");
    client.args(["--test", "-A", "tcp/22", "-D", "10.77.1.1", "-a", &source(number).to_string(), "--use-hmac"]);
    client.args(["--key-rijndael", "benchmark-key", "--key-hmac", "benchmark-hmac-key", "--no-rc-file"]);
    client.args(["--no-home-dir", "-E"]).arg(directory.join("arguments")).arg("-B").arg(&file);
    assert!(client.output().unwrap().status.success());
    fs::read(file).unwrap().trim_ascii().to_vec()
}

/// A peer's daemon in the server's namespace.
struct Peer(Child);

impl Peer {
    fn start(lab: &Lab, command: &mut Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = lab.server.enter(|| command.spawn().unwrap());
        thread::sleep(Duration::from_secs(1));
        Self(child)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.0.id().cast_signed()), Signal::SIGTERM);
        let _ = self.0.wait();
    }
}
