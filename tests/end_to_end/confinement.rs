//! What each process of a running daemon may do: as the kernel tells it, and as one finds who has taken it over.

use std::collections::{BTreeMap, BTreeSet};
use std::env::consts::ARCH;
use std::ffi::OsStr;
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::{fs, thread};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

use crate::debugger::{call, other_thread, threads};
use crate::lab::{Daemon, FAMILIES, Family, Lab, eventually, knockq};

/// A system call by its name in Linux's table for x86_64, its number there, and its arguments as far as they matter.
type Call = (&'static str, u64, [u64; 3]);

/// What nobody may do who reads what strangers send, nor who holds CAP_NET_ADMIN.
const FORBIDDEN: [Call; 22] = [
    ("open", 2, [0, 0, 0]),
    ("openat", 257, [AT_FDCWD, 0, 0]),
    ("openat2", 437, [AT_FDCWD, 0, 0]),
    ("newfstatat", 262, [AT_FDCWD, 0, 0]),
    ("unlinkat", 263, [AT_FDCWD, 0, 0]),
    ("socket", 41, [AF_INET, SOCK_STREAM, 0]),
    ("socket", 41, [AF_NETLINK, SOCK_RAW, NETLINK_ROUTE]),
    ("execve", 59, [0, 0, 0]),
    ("fork", 57, [0, 0, 0]),
    ("clone", 56, [SIGCHLD, 0, 0]),
    ("clone3", 435, [0, 0, 0]),
    ("ptrace", 101, [0, 0, 0]),
    ("process_vm_readv", 310, [0, 0, 0]),
    ("kill", 62, [0, 0, 0]),
    ("mount", 165, [0, 0, 0]),
    ("unshare", 272, [CLONE_NEWUSER, 0, 0]),
    ("setuid", 105, [0, 0, 0]),
    ("prctl", 157, [PR_SET_DUMPABLE, 1, 0]),
    ("mmap", 9, [0, 4096, PROT_EXEC]),
    ("mprotect", 10, [0, 4096, PROT_EXEC]),
    ("io_uring_setup", 425, [1, 0, 0]),
    ("bpf", 321, [0, 0, 0]),
];

const AT_FDCWD: u64 = (-100_i64).cast_unsigned();
const AF_INET: u64 = 2;
const AF_NETLINK: u64 = 16;
const SOCK_STREAM: u64 = 1;
const SOCK_RAW: u64 = 3;
const NETLINK_ROUTE: u64 = 0;
const SIGCHLD: u64 = 17;
const CLONE_NEWUSER: u64 = 0x1000_0000;
const PR_SET_DUMPABLE: u64 = 4;
const PROT_EXEC: u64 = 4;

#[test]
fn a_forbidden_call_kills_the_engine_and_stops_all() {
    let lab = Lab::new();
    for call in FORBIDDEN {
        is_deadly(&lab, "engine", first_thread, call);
    }
    for call in [("bind", 49, [0; 3]), ("connect", 42, [0; 3]), ("dup", 32, [0; 3]), ("fcntl", 72, [0, F_SETOWN, 1])] {
        is_deadly(&lab, "engine", first_thread, call);
    }
}

const F_SETOWN: u64 = 8;

#[test]
fn a_forbidden_call_of_the_engines_other_thread_kills_it_too() {
    let lab = Lab::new();
    for call in FORBIDDEN.into_iter().filter(|(name, ..)| ["openat", "socket", "execve", "clone"].contains(name)) {
        is_deadly(&lab, "engine", other_thread, call);
    }
}

#[test]
fn a_forbidden_call_kills_the_gate_and_stops_all() {
    let lab = Lab::new();
    for call in FORBIDDEN {
        is_deadly(&lab, "gate", first_thread, call);
    }
}

#[test]
fn a_root_that_turns_to_the_network_or_to_another_process_is_killed() {
    let lab = Lab::new();
    for (name, number, arguments) in FORBIDDEN {
        if ["ptrace", "process_vm_readv", "mount", "unshare", "bpf"].contains(&name) || arguments[0] == AF_INET {
            is_deadly(&lab, "root", first_thread, (name, number, arguments));
        }
    }
    for call in [("clone", 56, [CLONE_NEWUSER | SIGCHLD, 0, 0]), ("move_mount", 429, [0; 3])] {
        is_deadly(&lab, "root", first_thread, call);
    }
    const CLONE3: u64 = 435;
    let daemon = lab.start();
    assert_eq!(call(daemon.pid(), CLONE3, [0; 3]), Ok(-i64::from(Errno::ENOSYS as i32)));
}

#[test]
fn a_root_writes_nowhere_but_beside_its_configuration() {
    const OPEN: u64 = 2;
    const O_RDONLY: u64 = 0;
    const O_WRONLY_CREAT: u64 = 0o101;
    let lab = Lab::new();
    let path = |name: &str| lab.directory.path.join(name).to_str().unwrap().to_owned();
    // The paths must be in root's own memory: its environment is.
    let paths = [path("elsewhere"), path("etc/beside")];
    let names = ["ELSEWHERE", "BESIDE_CONFIGURATION"];
    let mut daemon = Daemon::spawn(&lab, &[0, 1].map(|place| (names[place], paths[place].as_str())));
    daemon.wait_for("knockq: ready");
    let root = daemon.pid();
    let stat = fs::read_to_string(format!("/proc/{root}/stat")).unwrap();
    let environment_start: u64 = stat.rsplit(' ').nth(2).unwrap().parse().unwrap();
    let environment = String::from_utf8(fs::read(format!("/proc/{root}/environ")).unwrap()).unwrap();
    let address = |name: &str| {
        let variable = format!("{name}=");
        environment_start + u64::try_from(environment.find(&variable).unwrap() + variable.len()).unwrap()
    };
    fs::write(&paths[0], "").unwrap();
    assert!(call(root, OPEN, [address(names[0]), O_RDONLY, 0]).unwrap() >= 0, "it reads anywhere");
    let written = call(root, OPEN, [address(names[0]), O_WRONLY_CREAT, 0o600]);
    if kernel_has_landlock() {
        assert_eq!(written, Ok(-i64::from(Errno::EACCES as i32)));
    } else {
        assert!(daemon.log().contains("this kernel has no Landlock: one lock less"), "{}", daemon.log());
    }
    for name in &names[1..] {
        assert!(call(root, OPEN, [address(name), O_WRONLY_CREAT, 0o600]).unwrap() >= 0, "{name}");
    }
}

/// The control: what is allowed is done, and the daemon goes on as if nothing had been.
#[test]
fn an_allowed_call_kills_nobody() {
    const LSEEK: u64 = 8;
    const READ: u64 = 0;
    let lab = Lab::new();
    let daemon = lab.start();
    let [_, (_, gate), (_, engine)] = daemon.processes();
    for (thread, number) in [(engine, LSEEK), (other_thread(engine), LSEEK), (gate, READ)] {
        let no_descriptor = [u64::MAX, 0, 0];
        assert_eq!(call(thread, number, no_descriptor), Ok(-i64::from(Errno::EBADF as i32)));
    }
    for family in FAMILIES {
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
    }
    daemon.stop();
}

#[test]
fn each_process_has_its_own_user_and_no_more_than_it_needs() {
    const KILL: u64 = 1 << 5;
    const NET_ADMIN: u64 = 1 << 12;
    let lab = Lab::new();
    let daemon = lab.start();
    let mut users = BTreeSet::new();
    for (role, process) in daemon.processes() {
        let kept = match role {
            "root" => KILL | NET_ADMIN,
            "gate" => NET_ADMIN,
            _ => 0,
        };
        assert!(users.insert(Status::of(process).field("Uid")), "{role} shares its user");
        for thread in threads(process) {
            let status = Status::of(thread);
            let mut sets = vec![("CapEff", kept), ("CapPrm", kept), ("CapInh", 0), ("CapAmb", 0)];
            if role != "root" {
                sets.push(("CapBnd", kept));
                assert_eq!(status.field("Groups"), "", "{role}");
            }
            for (set, expected) in sets {
                assert_eq!(u64::from_str_radix(&status.field(set), 16).unwrap(), expected, "{role} {set}");
            }
            assert_eq!(status.field("NoNewPrivs"), "1", "{role}");
            assert_eq!(status.field("Seccomp"), "2", "{role} {thread}: a filter");
        }
        if role != "root" {
            assert!(fs::read(format!("/proc/{process}/environ")).unwrap().is_empty(), "{role}");
            // The kernel gives what belongs to a process that cannot be dumped to root.
            assert_eq!(fs::metadata(format!("/proc/{process}/environ")).unwrap().uid(), 0, "{role}");
        }
    }
    assert_eq!(threads(daemon.processes()[2].1).len(), 2, "the engine's filter is on both of its threads");
}

/// A kernel that refuses a step, and one that says it is done and does nothing.
#[test]
fn a_privilege_that_cannot_be_given_up_starts_nothing() {
    const REFUSES: u32 = Errno::EPERM as u32;
    const LIES: u32 = 0;
    const LANDLOCK_RESTRICT_SELF: i64 = 446;
    let lab = Lab::new();
    for (number, errno, line) in [
        (126, REFUSES, "cannot give up CAP_NET_RAW: "), // capset
        (126, LIES, "a capability can be taken back, after it was given up"),
        (317, REFUSES, "cannot forbid system calls: "), // seccomp
        (317, LIES, "every system call can be made, after it was given up"),
        (LANDLOCK_RESTRICT_SELF, REFUSES, "cannot leave the files: "),
        (LANDLOCK_RESTRICT_SELF, LIES, "any file can be written, after it was given up"),
        (116, REFUSES, "engine: cannot leave all groups: "), // setgroups
        (116, LIES, "engine: a supplementary group is left, after it was given up"),
        (119, REFUSES, "engine: cannot change the group: "), // setresgid
        (119, LIES, "engine: the group is root's, after it was given up"),
        (117, REFUSES, "engine: cannot change the user: "), // setresuid
        (117, LIES, "engine: the user is root, after it was given up"),
    ] {
        if number == LANDLOCK_RESTRICT_SELF && !kernel_has_landlock() {
            continue; // nothing is asked of it
        }
        let mut daemon = start_where(&lab, number, errno);
        assert!(daemon.end().is_some_and(|code| code != 0), "{line}: {}", daemon.log());
        assert!(daemon.log().contains(line), "{line}: {}", daemon.log());
    }
    assert_eq!(lab.server.nft(&["list", "ruleset"]), "", "no table");
}

#[test]
fn a_kernel_without_landlock_is_warned_of_and_locks_nobody_out() {
    const LANDLOCK_CREATE_RULESET: i64 = 444;
    let lab = Lab::new();
    let mut daemon = start_where(&lab, LANDLOCK_CREATE_RULESET, Errno::ENOSYS as u32);
    daemon.wait_for("knockq: ready");
    assert_eq!(daemon.log().matches("this kernel has no Landlock").count(), 1);
    for family in FAMILIES {
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
    }
    let (_, engine) = daemon.processes()[2];
    let open = FORBIDDEN[1];
    assert_eq!(call(engine, open.1, open.2), Err(Signal::SIGSYS), "it still opens no file");
}

/// One that is older than the proof, as far as it shows: its threads do not tell their filters.
#[test]
fn a_kernel_on_which_nothing_can_be_proved_is_refused_with_the_remedy() {
    let lab = Lab::new();
    let status = lab.directory.path.join("status").display().to_string();
    let (knockq, config) = (knockq().display().to_string(), lab.config().display().to_string());
    let serve = format!(
        "grep -v Seccomp_filters /proc/self/status >{status}; \
         mount --bind {status} /proc/$$/task/$$/status; exec {knockq} serve --config {config}"
    );
    let refused = lab.server.enter(|| Command::new("unshare").args(["-m", "sh", "-euc", &serve]).output().unwrap());
    let said = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(78), "{said}");
    assert_eq!(
        said,
        "knockq: cannot prove that system calls are limited: this kernel is older than Linux 5.9, or has no seccomp\n\
         Hint: boot Linux 5.9 or newer, with CONFIG_SECCOMP_FILTER as every distribution has it\n"
    );
    assert_eq!(lab.server.nft(&["list", "ruleset"]), "", "no table");
}

/// Whether this kernel is one of those that have it, by its version, for the daemon finds out by trying.
fn kernel_has_landlock() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split('.').map(|number| number.parse::<u32>().unwrap());
    (numbers.next().unwrap(), numbers.next().unwrap()) >= (5, 13)
}

/// Starts the daemon where one system call does nothing and returns this error.
fn start_where(lab: &Lab, number: i64, errno: u32) -> Daemon {
    let these = SeccompAction::Errno(errno);
    let rules = BTreeMap::from([(number, Vec::new())]);
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, these, ARCH.try_into().unwrap()).unwrap();
    let program: BpfProgram = filter.try_into().unwrap();
    // The filter goes with the thread, and what the thread starts inherits it.
    thread::scope(|scope| {
        let starter = scope.spawn(|| {
            seccompiler::apply_filter(&program).unwrap();
            Daemon::spawn(lab, &[])
        });
        starter.join().unwrap()
    })
}

/// The page shows what this test finds, word for word.
#[test]
fn the_page_on_privilege_separation_shows_the_descriptors_that_there_are() {
    let page = include_str!("../../docs/privsep.md");
    let lab = Lab::new();
    let daemon = lab.start();
    let found = || {
        let line = |(role, process)| {
            let kinds = descriptors(process);
            let counted = kinds.chunk_by(|one, next| one == next).map(|same| format!("{} {}", same.len(), same[0]));
            format!("    {role}: {}\n", counted.collect::<Vec<_>>().join(", "))
        };
        daemon.processes().map(line).concat()
    };
    // One may still be about to be closed.
    eventually(&format!("in docs/privsep.md\n{}", found()), || page.contains(&found()));
}

/// What a process has open, but for standard input, output and error, without what differs from run to run.
fn descriptors(process: Pid) -> Vec<String> {
    let entries = fs::read_dir(format!("/proc/{process}/fd")).unwrap().map(|entry| entry.unwrap().path());
    let others = entries.filter(|path| !["0", "1", "2"].map(OsStr::new).contains(&path.file_name().unwrap()));
    let targets = others.filter_map(|path| Some(fs::read_link(path).ok()?.to_str().unwrap().to_owned()));
    let mut kinds: Vec<String> =
        targets.map(|target| target.rsplit('/').next().unwrap().split(":[").next().unwrap().to_owned()).collect();
    kinds.sort();
    kinds
}

struct Status(String);

impl Status {
    fn of(thread: Pid) -> Self {
        Self(fs::read_to_string(format!("/proc/{thread}/status")).unwrap())
    }

    fn field(&self, name: &str) -> String {
        let line = self.0.lines().find(|line| line.starts_with(&format!("{name}:"))).unwrap();
        line.split_once(':').unwrap().1.split_whitespace().collect::<Vec<_>>().join(" ")
    }
}

fn first_thread(process: Pid) -> Pid {
    process
}

/// The daemon's log then has one line more, everybody is gone, and no door is open.
#[track_caller]
fn is_deadly(lab: &Lab, role: &str, thread: fn(Pid) -> Pid, (name, number, arguments): Call) {
    let mut daemon = lab.start();
    let processes = daemon.processes();
    let (_, process) = processes.into_iter().find(|(other, _)| *other == role).unwrap();
    assert_eq!(call(thread(process), number, arguments), Err(Signal::SIGSYS), "{role} lives on after {name}");
    if role != "root" {
        assert_eq!(daemon.end(), Some(1), "{}", daemon.log());
    }
    eventually("the others' end", || processes.iter().all(|(_, pid)| kill(*pid, None).is_err()));
    let log = daemon.log();
    let after: Vec<&str> = log.lines().skip_while(|line| !line.contains("ready")).skip(1).collect();
    let line = if role == "root" {
        "gate: error: root is gone".to_owned()
    } else {
        format!("{role} was killed for a system call that it never makes")
    };
    assert!(after.len() == 1 && after[0].contains(&line), "{name}: {after:?}");
    lab.knock(Family::V4, &[]);
    assert!(!lab.alice.reaches(Family::V4.server(), 22));
}
