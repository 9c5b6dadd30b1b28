//! Throw-away attacks.
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::lab::{Daemon, FAMILIES, Family, Lab, eventually, knockq, succeeds};

const REVOKE_ALL: &[u8] = &[1, 2];
const RELOAD: &[u8] = &[0];

fn sock(lab: &Lab) -> PathBuf {
    lab.directory.path.join("run/control.sock")
}

fn ask(lab: &Lab, bytes: &[u8]) -> Option<Vec<u8>> {
    let mut s = UnixStream::connect(sock(lab)).ok()?;
    s.set_read_timeout(Some(Duration::from_secs(60))).ok()?;
    s.write_all(bytes).ok()?;
    s.shutdown(std::net::Shutdown::Write).ok()?;
    let mut v = Vec::new();
    s.read_to_end(&mut v).ok()?;
    Some(v)
}

fn alive(pid: Pid) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|s| !s.contains(") Z "))
}

fn configuration_child(keeper: Pid) -> Option<Pid> {
    let children = fs::read_to_string(format!("/proc/{keeper}/task/{keeper}/children")).ok()?;
    children
        .split_whitespace()
        .find(|pid| {
            fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|c| c.starts_with("knockq: configuration"))
        })?
        .parse()
        .ok()
        .map(Pid::from_raw)
}

fn table_there(lab: &Lab) -> bool {
    lab.server.sh("nft list tables").contains("table inet knockq")
}

#[test]
fn a_revoke_during_reload() {
    let lab = Lab::new();
    let daemon = lab.start();
    let keeper = daemon.processes()[0].1;
    let over = AtomicBool::new(false);
    let start = Instant::now();
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) && alive(keeper) {
                let _ = kill(keeper, Signal::SIGHUP);
                thread::sleep(Duration::from_millis(50));
            }
        });
        let mut n = 0;
        while start.elapsed() < Duration::from_secs(40) && alive(keeper) {
            ask(&lab, REVOKE_ALL);
            n += 1;
        }
        over.store(true, Ordering::Relaxed);
        eprintln!("A: {n} revokes in {:?}, alive {}", start.elapsed(), alive(keeper));
    });
    let log = daemon.log();
    eprintln!(
        "A: {} reloads\n{}",
        log.matches("reloaded").count(),
        log.lines().rev().take(5).collect::<Vec<_>>().join("\n")
    );
    assert!(alive(keeper), "dead");
}

#[test]
fn b_stderr_gone() {
    for (what, arguments) in [("try", &["--try", "6s"][..]), ("plain", &[])] {
        let lab = Lab::new();
        let mut child = lab.server.enter(|| {
            Command::new(knockq())
                .args(["serve", "--config"])
                .arg(lab.config())
                .args(arguments)
                .stdin(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap()
        });
        let mut err = child.stderr.take().unwrap();
        let mut text = String::new();
        let mut buf = [0; 1024];
        while !text.contains("ready") {
            let n = err.read(&mut buf).unwrap();
            text.push_str(&String::from_utf8_lossy(&buf[..n]));
        }
        thread::sleep(Duration::from_millis(500));
        drop(err);
        let pid = Pid::from_raw(child.id().cast_signed());
        kill(pid, Signal::SIGHUP).unwrap();
        thread::sleep(Duration::from_secs(12));
        let status = child.try_wait().unwrap();
        eprintln!("B {what}: status {status:?}, table there {}", table_there(&lab));
        assert_eq!(table_there(&lab), what == "plain");
        assert_eq!(status.is_none(), what == "plain");
        if status.is_none() {
            let _ = kill(pid, Signal::SIGTERM);
            let _ = child.wait();
        }
    }
}

#[test]
fn c_double_delete() {
    let lab = Lab::new();
    let daemon = lab.start();
    if daemon.log().contains("table is owned") {
        return;
    }
    let mut lost = 0;
    for round in 0..120 {
        let pause = f64::from(round % 40) * 0.002;
        lab.server.sh(&format!(
            "nft delete table inet knockq || true; sleep {pause}; nft delete table inet knockq 2>/dev/null || true"
        ));
        let start = Instant::now();
        while !table_there(&lab) && start.elapsed() < Duration::from_secs(4) {
            thread::sleep(Duration::from_millis(20));
        }
        thread::sleep(Duration::from_millis(60));
        if !table_there(&lab) {
            lost += 1;
            thread::sleep(Duration::from_secs(3));
            eprintln!(
                "C: round {round} pause {pause}: table there after 7 s: {}; mallory gets in: {}",
                table_there(&lab),
                lab.mallory.reaches(Family::V4.server(), 22)
            );
            eprintln!("C log: {}", daemon.log().lines().rev().take(4).collect::<Vec<_>>().join("\n"));
            // what would bring it back: nothing but a restart
            break;
        }
    }
    eprintln!("C: lost {lost}");
    assert_eq!(lost, 0);
}

#[test]
fn d_slow_client() {
    let lab = Lab::new();
    let mut daemon = lab.start();
    let mut s = UnixStream::connect(sock(&lab)).unwrap();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..40 {
                if over.load(Ordering::Relaxed) || s.write_all(&[0xff]).is_err() {
                    break;
                }
                thread::sleep(Duration::from_millis(700));
            }
        });
        thread::sleep(Duration::from_millis(1500));
        let start = Instant::now();
        daemon.signal(Signal::SIGTERM);
        daemon.end();
        over.store(true, Ordering::Relaxed);
        assert!(start.elapsed() < Duration::from_secs(6));
        eprintln!("D: SIGTERM took {:?} with a client that drips", start.elapsed());
    });
}

#[test]
fn e_many_askers_and_stopped_child() {
    let _ = rustix::process::setrlimit(
        rustix::process::Resource::Nofile,
        rustix::process::Rlimit { current: Some(8192), maximum: Some(8192) },
    );
    let lab = Lab::new();
    let daemon = lab.start();
    let keeper = daemon.processes()[0].1;
    // 1024, as systemd has it
    rustix::process::prlimit(
        rustix::process::Pid::from_raw(keeper.as_raw()),
        rustix::process::Resource::Nofile,
        rustix::process::Rlimit { current: Some(1024), maximum: Some(1024) },
    )
    .unwrap();
    daemon.signal(Signal::SIGHUP);
    let start = Instant::now();
    let child = loop {
        if let Some(c) = configuration_child(keeper) {
            kill(c, Signal::SIGSTOP).unwrap();
            break c;
        }
        assert!(start.elapsed() < Duration::from_secs(10), "no child");
    };
    thread::sleep(Duration::from_millis(300));
    eprintln!("E: stopped {child}, keeper alive {}, its child {:?}", alive(keeper), configuration_child(keeper));
    let mut kept = Vec::new();
    for n in 0..1200 {
        let mut s = UnixStream::connect(sock(&lab)).unwrap();
        s.set_write_timeout(Some(Duration::from_secs(2))).unwrap();
        if s.write_all(RELOAD).is_err() || s.shutdown(std::net::Shutdown::Write).is_err() {
            eprintln!("E: client {n} failed");
            break;
        }
        kept.push(s);
        if n > 1000 {
            thread::sleep(Duration::from_millis(2));
        }
        if n == 1050 {
            break;
        }
    }
    thread::sleep(Duration::from_secs(3));
    let cpu = |pid: Pid| {
        fs::read_to_string(format!("/proc/{pid}/stat"))
            .map(|s| {
                s.rsplit(") ")
                    .next()
                    .unwrap()
                    .split(' ')
                    .skip(11)
                    .take(2)
                    .map(|x| x.parse::<u64>().unwrap())
                    .sum::<u64>()
            })
            .unwrap_or(0)
    };
    let before = cpu(keeper);
    thread::sleep(Duration::from_secs(2));
    eprintln!("E: keeper alive {}, cpu ticks in 2 s: {}", alive(keeper), cpu(keeper).saturating_sub(before));
    if !alive(keeper) {
        eprintln!("E: {}", daemon.log());
        panic!("dead");
    }
    let _ = kill(child, Signal::SIGCONT);
    thread::sleep(Duration::from_secs(8));
    eprintln!(
        "E: after SIGCONT: keeper alive {}\n{}",
        alive(keeper),
        daemon.log().lines().rev().take(8).collect::<Vec<_>>().join("\n")
    );
    assert!(alive(keeper));
}

#[test]
fn f_no_descriptors_at_reload() {
    let lab = Lab::new();
    let daemon = lab.start();
    let keeper = daemon.processes()[0].1;
    let used = fs::read_dir(format!("/proc/{keeper}/fd")).unwrap().count() as u64;
    rustix::process::prlimit(
        rustix::process::Pid::from_raw(keeper.as_raw()),
        rustix::process::Resource::Nofile,
        rustix::process::Rlimit { current: Some(used + 1), maximum: Some(1024) },
    )
    .unwrap();
    daemon.signal(Signal::SIGHUP);
    thread::sleep(Duration::from_secs(4));
    eprintln!(
        "F: keeper alive {}\n{}",
        alive(keeper),
        daemon.log().lines().rev().take(4).collect::<Vec<_>>().join("\n")
    );
}

#[test]
fn g_notify_socket_gone() {
    let lab = Lab::new();
    let path = lab.directory.path.join("notify");
    let socket = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    let mut daemon = Daemon::spawn(&lab, &[("NOTIFY_SOCKET", path.to_str().unwrap())]);
    daemon.wait_for("knockq: ready");
    let keeper = daemon.processes()[0].1;
    drop(socket);
    fs::remove_file(&path).unwrap();
    daemon.signal(Signal::SIGHUP);
    thread::sleep(Duration::from_secs(4));
    eprintln!(
        "G: keeper alive {}\n{}",
        alive(keeper),
        daemon.log().lines().rev().take(4).collect::<Vec<_>>().join("\n")
    );
}

#[test]
#[allow(clippy::too_many_lines, reason = "a table of edits")]
fn h_external_subtle() {
    let lab = Lab::with("open_for = \"1h\"");
    lab.set("ruleset = \"external\"");
    lab.set("trusted = [\"192.0.2.0/24\"]");
    let config = lab.config().display().to_string();
    let file = lab.config().with_file_name("knockq.nft");
    let text = lab.control(&["ruleset", "--config", &config]);
    let t = "inet knockq";
    let edits: Vec<(&str, String, String)> = vec![
        ("nothing", text.clone(), String::new()),
        ("dormant", text.clone(), format!("add table {t} {{ flags dormant; }}")),
        ("bypass", text.replace("queue num 4097", "queue num 4097 bypass"), String::new()),
        ("queue range", text.replace("queue num 4097", "queue num 4097-4098"), String::new()),
        ("no limit", text.replace(" limit rate 1/week burst 1 packets;", ""), String::new()),
        ("other limit", text.replace("1/week burst 1 packets", "1/second burst 100 packets"), String::new()),
        ("rule added", text.clone(), format!("insert rule {t} gate accept")),
        ("trusted element", text.clone(), format!("add element {t} trusted4 {{ 203.0.113.0/24 }}")),
        ("trusted all", text.clone(), format!("add element {t} trusted6 {{ ::/0 }}")),
        ("catchall", text.clone(), format!("add element {t} trusted4 {{ * }}")),
        (
            "policy",
            text.clone(),
            format!("add chain {t} gate {{ type filter hook prerouting priority dstnat - 10; policy drop; }}"),
        ),
        ("priority", text.replace("priority dstnat - 10", "priority dstnat + 10"), String::new()),
        ("last rule gone", text.replace(&format!("add rule {t} door drop\n"), ""), String::new()),
        ("related", text.replace("ct state established accept", "ct state established,related accept"), String::new()),
        (
            "tcp flags mask",
            text.replace(
                "tcp flags & (fin | syn | rst | ack) == syn ct state new",
                "tcp flags & syn == syn ct state new",
            ),
            String::new(),
        ),
        (
            "fib type",
            text.replace("gate fib daddr type unicast accept", "gate fib daddr type local accept"),
            String::new(),
        ),
        ("iif", text.replace("gate iif lo accept", "gate iif != lo accept"), String::new()),
        ("update once", text.replace("delete @once4", "update @once4"), String::new()),
        ("size", text.replace("size 65535", "size 65534"), String::new()),
        ("guarded less", text.clone(), format!("delete element {t} guarded {{ tcp . 25 }}")),
        ("extra chain", text.clone(), format!("add chain {t} x {{ type filter hook input priority 0; policy drop; }}")),
        ("extra set", text.clone(), format!("add set {t} x {{ type ipv4_addr; }}")),
        (
            "open4 with default timeout",
            text.replace(
                "flags timeout; }\nadd set inet knockq open6",
                "flags timeout; timeout 1d; }\nadd set inet knockq open6",
            ),
            String::new(),
        ),
        (
            "trusted4 timeout",
            text.replace(
                "trusted4 { type ipv4_addr; flags interval; }",
                "trusted4 { type ipv4_addr; flags interval, timeout; }",
            ),
            format!("add element {t} trusted4 {{ 203.0.113.0/24 timeout 1d }}"),
        ),
        ("confirmed rule", text.replace("ct status confirmed accept", "accept"), String::new()),
    ];
    for (what, file_text, more) in edits {
        lab.server.sh("nft delete table inet knockq 2>/dev/null || true");
        fs::write(&file, &file_text).unwrap();
        let changed = file_text != text || !more.is_empty();
        let loaded = lab.server.enter(|| Command::new("nft").arg("-f").arg(&file).output().unwrap());
        if !loaded.status.success() {
            eprintln!("H {what}: cannot load: {}", String::from_utf8_lossy(&loaded.stderr).lines().next().unwrap());
            continue;
        }
        if !more.is_empty() {
            let edited = lab.server.enter(|| Command::new("nft").arg(&more).output().unwrap());
            if !edited.status.success() {
                eprintln!(
                    "H {what}: cannot edit: {}",
                    String::from_utf8_lossy(&edited.stderr).lines().next().unwrap_or("")
                );
                continue;
            }
        }
        let mut daemon = Daemon::spawn(&lab, &[]);
        let start = Instant::now();
        while !daemon.log().contains("ready")
            && !daemon.log().contains("not that of this")
            && start.elapsed() < Duration::from_secs(20)
        {
            thread::sleep(Duration::from_millis(50));
        }
        let ready = daemon.log().contains("knockq: ready");
        eprintln!(
            "H {what}: {} {}",
            if ready { "TAKEN" } else { "refused" },
            if ready && changed { "<<<<<<" } else { "" }
        );
        if ready && changed {
            eprintln!(
                "   {}\n   mallory gets in {}",
                daemon.log().trim_end(),
                lab.mallory.reaches(Family::V4.server(), 22)
            );
        }
        if ready {
            daemon.stop();
        } else {
            daemon.end();
        }
    }
    // a rule added while it runs, then a reload
    lab.server.sh("nft delete table inet knockq 2>/dev/null || true");
    fs::write(&file, &text).unwrap();
    lab.server.nft(&["-f", file.to_str().unwrap()]);
    let daemon = lab.start();
    lab.server.sh("nft insert rule inet knockq gate accept");
    thread::sleep(Duration::from_secs(2));
    daemon.signal(Signal::SIGHUP);
    thread::sleep(Duration::from_secs(4));
    assert!(
        daemon.log().contains("guarded ports may be open") && daemon.log().contains("not reloaded: table"),
        "{}",
        daemon.log()
    );
    eprintln!("H live edit: mallory gets in {}\n{}", lab.mallory.reaches(Family::V4.server(), 22), daemon.log());
}

#[test]
fn i_odd_doors() {
    let lab = Lab::new();
    let daemon = lab.start();
    let owned = daemon.log().contains("table is owned");
    daemon.stop();
    let cases = [
        ("forever", "open4", "{ 1.2.3.4 . tcp . 22 }"),
        ("alice forever", "open4", "{ 1.2.3.4 . tcp . 22 comment \"alice ssh\" }"),
        ("comment one word", "open4", "{ 1.2.3.4 . tcp . 22 timeout 1h comment \"x\" }"),
        ("comment odd", "open4", "{ 1.2.3.4 . tcp . 22 timeout 1h comment \"a  b c -/ é\" }"),
        ("comment spaces", "open4", "{ 1.2.3.4 . tcp . 22 timeout 1h comment \"  \" }"),
        ("comment backslash", "open4", "{ 1.2.3.4 . tcp . 22 timeout 1h comment \"a\\\\b\" }"),
        ("comment bad utf8", "open4", "{ 1.2.3.4 . tcp . 22 timeout 1h comment \"a\\377b\" }"),
        ("counter", "open4", "{ 1.2.3.4 . tcp . 22 timeout 1h counter }"),
        ("counter packets", "open4", "{ 1.2.3.4 . tcp . 22 counter packets 5 bytes 5 }"),
        ("very long", "open4", "{ 1.2.3.4 . tcp . 22 timeout 60000d }"),
        ("very long alice", "open4", "{ 1.2.3.4 . tcp . 22 timeout 40000d comment \"alice ssh\" }"),
        ("catchall", "open4", "{ * timeout 1h }"),
        ("sctp", "open4", "{ 1.2.3.4 . sctp . 22 timeout 1h }"),
        ("proto 250", "open4", "{ 1.2.3.4 . 250 . 22 timeout 1h }"),
        ("port 0", "open4", "{ 1.2.3.4 . tcp . 0 timeout 1h }"),
        ("link local", "open6", "{ fe80::1 . tcp . 22 timeout 1h comment \"alice ssh\" }"),
        ("mapped", "open6", "{ ::ffff:1.2.3.4 . tcp . 22 timeout 1h }"),
        ("once by hand", "once4", "{ 1.2.3.4 . tcp . 22 timeout 1h }"),
        ("once forever", "once4", "{ 1.2.3.4 . tcp . 22 }"),
        ("removed user", "open4", "{ 1.2.3.4 . tcp . 22 timeout 1h comment \"zoe ssh\" }"),
    ];
    for (what, set, element) in cases {
        let script = format!("printf 'add element inet knockq {set} {}\\n' | nft -f - 2>&1", element);
        let added = lab.server.enter(|| Command::new("sh").args(["-c", &script]).output().unwrap());
        if !added.status.success() {
            eprintln!("I {what}: cannot add: {}", String::from_utf8_lossy(&added.stdout).lines().next().unwrap_or(""));
            continue;
        }
        let grants = lab.knockq(&lab.server, &["grants"]);
        eprintln!(
            "I {what}: grants {:?} {} {}",
            grants.status.code(),
            String::from_utf8_lossy(&grants.stdout).lines().last().unwrap_or(""),
            String::from_utf8_lossy(&grants.stderr).trim_end()
        );
        let mut daemon = Daemon::spawn(&lab, &[]);
        let start = Instant::now();
        while !daemon.log().contains("knockq: ready")
            && alive_child(&daemon)
            && start.elapsed() < Duration::from_secs(20)
        {
            thread::sleep(Duration::from_millis(50));
        }
        let ready = daemon.log().contains("knockq: ready");
        let said: Vec<String> = daemon
            .log()
            .lines()
            .filter(|l| {
                !l.contains("ready")
                    && !l.contains("no user")
                    && !l.contains("others can flush")
                    && !l.contains("owned")
            })
            .map(str::to_owned)
            .collect();
        let left = lab.server.sh(&format!("nft list set inet knockq {set} | tr -cd '[ -~]'")).contains("1.2.3.4");
        eprintln!("    daemon {}; still there {left}; {said:?}", if ready { "ready" } else { "DID NOT START" });
        if ready {
            daemon.stop();
        } else {
            daemon.end();
        }
        lab.server.sh(&format!("nft flush set inet knockq {set} || true"));
    }
    let _ = owned;
}

fn alive_child(daemon: &Daemon) -> bool {
    let pid = daemon.pid();
    alive(pid)
}

#[test]
fn j_empty_include_file() {
    let lab = Lab::new();
    let config = lab.config().display().to_string();
    lab.start().stop();
    let file = lab.config().with_file_name("knockq.nft");
    let whole = fs::read_to_string(&file).unwrap();
    for (what, text) in [
        ("empty", String::new()),
        ("half", whole[..whole.find("add rule inet knockq door").unwrap()].to_owned()),
        ("no drop", whole.replace("add rule inet knockq door drop\n", "")),
        ("comment only", "# nothing\n".to_owned()),
    ] {
        lab.server.sh("nft delete table inet knockq 2>/dev/null || true");
        fs::write(&file, text).unwrap();
        let loaded = lab.knockq(&lab.server, &["ruleset", "--load", "--config", &config]);
        eprintln!(
            "J {what}: exit {:?} {}; mallory gets in: {}; {}",
            loaded.status.code(),
            String::from_utf8_lossy(&loaded.stderr).trim_end(),
            lab.mallory.reaches(Family::V4.server(), 22),
            lab.server.sh("nft list tables").trim_end()
        );
    }
}

#[test]
fn k_socket_gone() {
    let lab = Lab::with("open_for = \"1h\"");
    let daemon = lab.start();
    let config = lab.config().display().to_string();
    lab.knock(Family::V4, &[]);
    lab.wait_for_door(Family::V4.alice(), 22);
    fs::remove_file(sock(&lab)).unwrap();
    let out = lab.knockq(&lab.server, &["user", "remove", "alice", "--config", &config]);
    eprintln!(
        "K: {:?} {} {}; door still {:?}",
        out.status.code(),
        String::from_utf8_lossy(&out.stdout).trim_end(),
        String::from_utf8_lossy(&out.stderr).trim_end(),
        lab.door(Family::V4.alice(), 22).is_some()
    );
    lab.knock(Family::V6, &[]);
    thread::sleep(Duration::from_secs(2));
    eprintln!("K: her next knock opens: {:?}", lab.door(Family::V6.alice(), 22).is_some());
    drop(daemon);
}

#[test]
fn l_revoke_past_the_daemon() {
    let lab = Lab::with("open_for = \"1h\"");
    lab.add_user("bob", &["ssh"]);
    let daemon = lab.start();
    lab.knock(Family::V4, &[]);
    lab.wait_for_door(Family::V4.alice(), 22);
    // --config forgotten
    let out = lab.knockq(&lab.server, &["revoke", "--all"]);
    eprintln!(
        "L: {:?} {} {}; door {:?}",
        out.status.code(),
        String::from_utf8_lossy(&out.stdout).trim_end(),
        String::from_utf8_lossy(&out.stderr).trim_end(),
        lab.door(Family::V4.alice(), 22)
    );
    if lab.door(Family::V4.alice(), 22).is_none() {
        lab.server.sh("nft flush ruleset");
        thread::sleep(Duration::from_secs(2));
        eprintln!("L: after the table was loaded again: {:?}", lab.door(Family::V4.alice(), 22));
    }
    drop(daemon);
}

#[test]
fn m_restart_log() {
    let lab = Lab::new();
    lab.start().stop();
    let daemon = lab.start();
    thread::sleep(Duration::from_secs(2));
    let log = daemon.stop();
    assert!(!log.contains("somebody else"), "{log}");
}

#[test]
fn n_trial_that_does_not_start() {
    let lab = Lab::new();
    lab.start().stop();
    lab.server.sh("nft delete table inet knockq");
    // told to stop right after the gate is up
    for wait in [0_u64, 20, 50, 100] {
        let mut daemon = Daemon::spawn_with(&lab, &["--try", "1h"], &[]);
        let start = Instant::now();
        while !table_there(&lab) && start.elapsed() < Duration::from_secs(20) {}
        thread::sleep(Duration::from_millis(wait));
        daemon.signal(Signal::SIGTERM);
        let code = daemon.end();
        assert!(code == Some(1) && !table_there(&lab), "{wait}: {}", daemon.log());
        eprintln!("N {wait}: exit {code:?}, table there {}\n{}", table_there(&lab), daemon.log());
        lab.server.sh("nft delete table inet knockq 2>/dev/null || true");
    }
}

#[test]
fn p_flush_during_reloads() {
    let lab = Lab::new();
    let daemon = lab.start();
    let keeper = daemon.processes()[0].1;
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                lab.server.sh("nft flush ruleset 2>/dev/null || true");
                thread::sleep(Duration::from_millis(3));
            }
        });
        for network in 0..15 {
            if !alive(keeper) {
                break;
            }
            let text = fs::read_to_string(lab.config()).unwrap();
            let rest: Vec<&str> = text.lines().filter(|line| !line.starts_with("trusted")).collect();
            fs::write(
                lab.config(),
                rest.join("\n").replace("[server]", &format!("[server]\ntrusted = [\"192.0.2.{network}\"]")),
            )
            .unwrap();
            let before = daemon.log().matches("reloaded").count();
            daemon.signal(Signal::SIGHUP);
            let start = Instant::now();
            while daemon.log().matches("reloaded").count() == before
                && alive(keeper)
                && start.elapsed() < Duration::from_secs(15)
            {
                thread::sleep(Duration::from_millis(20));
            }
        }
        over.store(true, Ordering::Relaxed);
    });
    thread::sleep(Duration::from_secs(3));
    eprintln!(
        "P: alive {}, table there {}, mallory gets in {}\n{}",
        alive(keeper),
        table_there(&lab),
        lab.mallory.reaches(Family::V4.server(), 22),
        daemon.log().lines().rev().take(6).collect::<Vec<_>>().join("\n")
    );
    assert!(alive(keeper) && table_there(&lab) && !lab.mallory.reaches(Family::V4.server(), 22));
}

#[test]
fn q_children_of_configuration() {
    let lab = Lab::new();
    let daemon = lab.start();
    let keeper = daemon.processes()[0].1;
    for round in 0..30 {
        daemon.signal(Signal::SIGHUP);
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(500) {
            if let Some(child) = configuration_child(keeper) {
                let _ = kill(child, Signal::SIGKILL);
                break;
            }
        }
        assert!(alive(keeper), "round {round}: {}", daemon.log());
    }
    for _ in 0..500 {
        daemon.signal(Signal::SIGHUP);
    }
    thread::sleep(Duration::from_secs(3));
    eprintln!(
        "Q: alive {} refused {} reloaded {}",
        alive(keeper),
        daemon.log().matches("not reloaded").count(),
        daemon.log().matches("knockq: reloaded").count()
    );
    // a user file that is a fifo
    let users = lab.config().with_file_name("users.d");
    lab.server.sh(&format!("mkfifo {}/f.toml", users.display()));
    daemon.signal(Signal::SIGHUP);
    thread::sleep(Duration::from_secs(2));
    eprintln!("Q: {}", daemon.log().lines().rev().take(3).collect::<Vec<_>>().join("\n"));
    for family in FAMILIES {
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
    }
    let _ = (eventually as fn(&str, fn() -> bool), succeeds as fn(&std::process::Output) -> String);
}

/// Each edit by hand is noticed and undone, where the table has no owner.
#[test]
fn r_managed_edits() {
    let lab = Lab::new();
    lab.set("trusted = [\"192.0.2.0/24\"]");
    let daemon = lab.start();
    if daemon.log().contains("table is owned") {
        return;
    }
    let t = "inet knockq";
    for edit in [
        format!("insert rule {t} gate accept"),
        format!("add element {t} trusted4 {{ 203.0.113.0/24 }}"),
        format!("delete element {t} guarded {{ tcp . 22 }}"),
        format!("add table {t} {{ flags dormant; }}"),
        format!("flush chain {t} door"),
    ] {
        let before = daemon.log().matches("it is loaded again").count();
        let listing = || lab.server.nft(&["list", "table", "inet", "knockq"]);
        let right = listing();
        lab.server.nft(&[&edit]);
        eventually(&edit, || daemon.log().matches("it is loaded again").count() > before && listing() == right);
        thread::sleep(Duration::from_secs(1));
        assert_eq!(daemon.log().matches("it is loaded again").count(), before + 1, "{edit}");
        assert!(!lab.mallory.reaches(Family::V4.server(), 22));
    }
}

/// The boot has loaded it with persist; then nftables.conf must still be able to.
#[test]
fn s_external_is_never_owned() {
    let lab = Lab::with("open_for = \"1h\"");
    lab.set("ruleset = \"external\"");
    let config = lab.config().display().to_string();
    let file = lab.config().with_file_name("knockq.nft");
    fs::write(&file, lab.control(&["ruleset", "--config", &config])).unwrap();
    lab.control(&["ruleset", "--load", "--config", &config]);
    let mut daemon = lab.start();
    assert!(!daemon.log().contains("table is owned"), "{}", daemon.log());
    lab.knock(Family::V4, &[]);
    lab.wait_for_door(Family::V4.alice(), 22);
    let conf = lab.directory.path.join("nftables.conf");
    fs::write(&conf, format!("flush ruleset\ninclude \"{}\"\n", file.display())).unwrap();
    lab.server.nft(&["-f", conf.to_str().unwrap()]);
    lab.wait_for_door(Family::V4.alice(), 22);
    // edited, and put right by hand without a load: told once each, and no look without end
    lab.server.sh("nft insert rule inet knockq gate accept");
    daemon.wait_for("guarded ports may be open");
    lab.server.sh("nft delete rule inet knockq gate handle $(nft -a list chain inet knockq gate | awk '/\taccept # handle/ {print $NF; exit}')");
    daemon.wait_for("as it should be again");
    thread::sleep(Duration::from_secs(3));
    assert_eq!(daemon.log().matches("as it should be again").count(), 1, "{}", daemon.log());
    assert_eq!(daemon.log().matches("guarded ports may be open").count(), 1, "{}", daemon.log());
}

fn knocks_during_reloads(name: &str) {
    use crate::recorded::persona;
    use crate::{flow, raw_socket, send_raw, unix_now};
    use knockq::crypto::{Binding, KnockPorts};
    let lab = Lab::with("open_for = \"1h\"");
    let daemon = Daemon::spawn_with(&lab, &["--debug"], &[]);
    eventually("ready", || daemon.log().contains("knockq: ready"));
    let ports = KnockPorts::new([20_000..=21_023]).unwrap();
    let key = lab.alice_key();
    let family = Family::V4;
    let over = AtomicBool::new(false);
    let sent = thread::scope(|scope| {
        let (lab, key, ports, over) = (&lab, &key, &ports, &over);
        let knocking = scope.spawn(move || {
            lab.alice.enter(|| {
                let persona = persona(true);
                let socket = raw_socket(family);
                let mut next = unix_now() - 55;
                let mut sent = 0;
                while !over.load(Ordering::Relaxed) && next < unix_now() + 50 {
                    next = (next + 1).max(unix_now() - 40);
                    let token = key.seal(next, 22, Binding::Unbound);
                    let flow = flow(family.alice(), family.server(), key.pad(next).knock_port(ports));
                    send_raw(&socket, family, &persona.syn(&flow, token.sequence, token.tsval).unwrap());
                    sent += 1;
                    thread::sleep(Duration::from_millis(100));
                }
                sent
            })
        });
        for network in 0..8 {
            let text = fs::read_to_string(lab.config()).unwrap();
            let rest: Vec<&str> = text.lines().filter(|line| !line.starts_with("trusted")).collect();
            fs::write(
                lab.config(),
                rest.join("\n").replace("[server]", &format!("[server]\ntrusted = [\"192.0.2.{network}\"]")),
            )
            .unwrap();
            let before = daemon.log().matches("knockq: reloaded").count();
            daemon.signal(Signal::SIGHUP);
            eventually("reloading", || daemon.log().matches("knockq: reloaded").count() > before);
        }
        over.store(true, Ordering::Relaxed);
        knocking.join().unwrap()
    });
    thread::sleep(Duration::from_secs(5));
    let log = daemon.log();
    let queue = fs::read_to_string("/proc/net/netfilter/nfnetlink_queue").unwrap_or_default();
    eprintln!(
        "T {name}: sent {sent}, granted {}, packets {} queue {queue}",
        log.matches("monitor: granted").count(),
        log.matches("packet reason").count()
    );
    for line in log.lines().filter(|l| l.contains("reason") || l.contains("lost") || l.contains("loaded again")) {
        eprintln!("T {name}: {line}");
    }
}

#[test]
fn t_knocks_1() {
    knocks_during_reloads("1");
}
#[test]
fn t_knocks_2() {
    knocks_during_reloads("2");
}
#[test]
fn t_knocks_3() {
    knocks_during_reloads("3");
}

/// SYNs to a guarded port and to a knock port, while the table is loaded again and again: nothing may answer.
#[test]
fn u_no_hole_while_loading() {
    use crate::lab::Capture;
    use crate::recorded::persona;
    use crate::{raw_socket, send_raw};
    use knockq::packet::Flow;
    let lab = Lab::new();
    lab.start().stop();
    let config = lab.config().display().to_string();
    for family in FAMILIES {
        let filter = "tcp and (src host 10.77.2.1 or src host fd77:2::1 or src host 10.77.1.1 or src host fd77:1::1)";
        let capture = Capture::start(&lab, &lab.mallory, "eth0", filter);
        let over = AtomicBool::new(false);
        let (sent, loads) = thread::scope(|scope| {
            let sending = scope.spawn(|| {
                lab.mallory.enter(|| {
                    let (persona, socket) = (persona(family == Family::V4), raw_socket(family));
                    let mut sent = 0_u32;
                    while !over.load(Ordering::Relaxed) {
                        for port in [22, 20_000, 20_500, 25] {
                            let source_port = 1024 + (sent % 60_000) as u16;
                            let flow = Flow {
                                source: family.mallory(),
                                source_port,
                                destination: family.server(),
                                destination_port: port,
                            };
                            send_raw(&socket, family, &persona.syn(&flow, sent, sent).unwrap());
                            sent += 1;
                        }
                    }
                    sent
                })
            });
            let start = Instant::now();
            let mut loads = 0;
            while start.elapsed() < Duration::from_secs(40) {
                lab.control(&["ruleset", "--load", "--config", &config]);
                loads += 1;
            }
            over.store(true, Ordering::Relaxed);
            (sending.join().unwrap(), loads)
        });
        let packets = capture.packets();
        let offset = if family == Family::V4 { 20 } else { 40 };
        let mut counts = std::collections::BTreeMap::new();
        for packet in &packets {
            let port = u16::from_be_bytes([packet[offset], packet[offset + 1]]);
            *counts.entry((port, packet[offset + 13])).or_insert(0) += 1;
        }
        assert!(counts.is_empty(), "{family:?}: {counts:?}");
        eprintln!("U {family:?}: sent {sent} SYNs during {loads} loads; answers by (port, flags): {counts:?}");
    }
}
