//! The units under a real systemd. Each machine here is a set of namespaces with a root directory of its own, in which systemd
//! is process 1 and boots; as that takes root and a cgroup tree, it runs in the virtual machine only.

#[path = "support/lab.rs"]
mod lab;

use std::process::{Child, Command, Output, Stdio};
use std::sync::Once;
use std::time::{Duration, Instant};
use std::{fs, thread};

use lab::{Scratch, eventually, knockq, succeeds};

/// Makes the root directory in $1, goes there, runs the script $2 and becomes systemd.
const BOOT: &str = r#"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" overlay "$1/root"
cd "$1/root"
# It may lie on a file system of its own, /tmp say, which the overlay does not show.
mkdir -p ".$PROJECT"
mount --rbind "$PROJECT" ".$PROJECT"
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount --rbind /dev dev
mount -t tmpfs -o mode=755 tmpfs run
pivot_root . mnt
umount -l mnt
sh -euc "$2" >/dev/null
umount run
exec env -i container=test PATH=/usr/local/bin:/usr/sbin:/usr/bin /lib/systemd/systemd --log-target=journal --show-status=no
"#;

/// As on a fresh Debian: nftables.conf flushes everything, and something brings up the network, here with a client on it.
const DEBIAN: &str = r"
systemctl enable nftables.service
# What has nothing to do here, and much of it.
systemctl mask systemd-udevd.service systemd-udev-trigger.service systemd-logind.service getty.target modprobe@.service \
    systemd-journal-flush.service systemd-modules-load.service kmod-static-nodes.service systemd-random-seed.service \
    systemd-update-utmp.service systemd-sysctl.service systemd-journald-audit.socket sys-kernel-tracing.mount \
    sys-kernel-debug.mount dev-hugepages.mount dev-mqueue.mount systemd-remount-fs.service systemd-pcrphase.service \
    systemd-tmpfiles-setup-dev.service systemd-tmpfiles-clean.timer systemd-user-sessions.service \
    dbus.service dbus.socket
touch /etc/.updated /var/.updated
# Else it is the first boot, and systemd asks for a root password.
echo 0123456789abcdef0123456789abcdef >/etc/machine-id
cat >/etc/systemd/system/network-up.service <<'END'
[Unit]
DefaultDependencies=no
Wants=network-pre.target network.target
After=network-pre.target
Before=network.target
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -euc '\
nft list table inet knockq >/run/gate-before-the-network; \
ip netns add client; \
ip link add eth0 type veth peer name eth0 netns client; \
ip addr add 10.9.0.1/24 dev eth0; ip addr add fd09::1/64 dev eth0 nodad; ip link set eth0 up; \
ip -n client addr add 10.9.0.2/24 dev eth0; ip -n client addr add fd09::2/64 dev eth0 nodad; \
ip -n client link set lo up; ip -n client link set eth0 up'
[Install]
WantedBy=sysinit.target
END
cat >/etc/systemd/system/ssh.socket <<'END'
[Socket]
ListenStream=22
Accept=yes
[Install]
WantedBy=sockets.target
END
cat >/etc/systemd/system/ssh@.service <<'END'
[Service]
ExecStart=/bin/echo welcome
StandardOutput=socket
END
systemctl enable network-up ssh.socket
";

/// What the Makefile says.
const PLACES: &str = r"
export DESTDIR= BINDIR=/usr/local/bin LIBEXECDIR=/usr/local/libexec/knockq UNITDIR=/usr/local/lib/systemd/system SYSUSERSDIR=/usr/local/lib/sysusers.d
export MANDIR=/usr/local/share/man BASHCOMPDIR=/usr/local/share/bash-completion/completions
export ZSHCOMPDIR=/usr/local/share/zsh/site-functions FISHCOMPDIR=/usr/local/share/fish/vendor_completions.d
";

/// As the README says.
const INSTALL: &str = r#"
"$PROJECT/dist/install"
export HOME=/root
knockq init --protect tcp/22 --address 10.9.0.1 --address fd09::1
knockq user add alice --key "$(knockq keygen)" >/root/profile
knockq host add server /root/profile
systemctl enable knockq
"#;

/// Time that booting may take: an emulated machine is slow.
const BOOTING: Duration = Duration::from_secs(400);

struct Machine {
    unshare: Child,
    init: String,
    _directory: Scratch,
}

impl Machine {
    /// Boots a machine with knockq installed and configured, after this change.
    fn boot(name: &str, change: &str) -> Self {
        let guest = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
        assert_eq!(guest.trim(), "knockq-vm", "this test boots systemd");
        let directory = Scratch::new();
        let cgroup = cgroup(name);
        let mut command = Command::new("sh");
        command.args([
            "-euc",
            "echo $$ >\"$0/cgroup.procs\"; exec unshare -m -p -n -u -i -C --fork --kill-child sh -euc \"$@\"",
        ]);
        command.arg(cgroup).args([BOOT, "boot"]).arg(&directory.path).arg([DEBIAN, PLACES, INSTALL, change].concat());
        command.env("BINARY", knockq()).env("PROJECT", env!("CARGO_MANIFEST_DIR"));
        let unshare = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        let children = format!("/proc/{0}/task/{0}/children", unshare.id());
        let mut init = String::new();
        eventually("process 1", || {
            init = fs::read_to_string(&children).unwrap().trim().to_owned();
            !init.is_empty() && fs::read_to_string(format!("/proc/{init}/comm")).unwrap().starts_with("systemd")
        });
        let machine = Self { unshare, init, _directory: directory };
        let deadline = Instant::now() + BOOTING;
        while !machine.is_up() {
            assert!(Instant::now() < deadline, "booting does not end");
            thread::sleep(Duration::from_secs(1)); // each question costs the machine more than a tenth of that
        }
        machine
    }

    fn is_up(&self) -> bool {
        let state = self.run("timeout 10 systemctl is-system-running");
        ["running", "degraded"].contains(&String::from_utf8_lossy(&state.stdout).trim())
    }

    fn run(&self, script: &str) -> Output {
        let mut command = Command::new("nsenter");
        command.args(["-t", &self.init, "-m", "-p", "-n", "-u", "-i", "-C", "sh", "-euc", script]).env_clear();
        command.env("PATH", "/usr/local/bin:/usr/sbin:/usr/bin").env("HOME", "/root").output().unwrap()
    }

    #[track_caller]
    fn says(&self, script: &str) -> String {
        succeeds(&self.run(script)).trim_end().to_owned()
    }

    fn property(&self, unit: &str, property: &str) -> String {
        self.says(&format!("systemctl show --value -p {property} {unit}"))
    }

    /// The ids of processes whose command lines begin like this, a regular expression.
    fn processes(&self, begin: &str) -> String {
        let listed = self.run(&format!("grep -alsE '^({begin})' /proc/[0-9]*/cmdline | cut -d / -f 3"));
        String::from_utf8(listed.stdout).unwrap().trim_end().to_owned()
    }

    /// What a connection to the guarded port meets.
    fn is_open(&self, server: &str) -> bool {
        let connected = self.run(&format!("ip netns exec client busybox nc -w 1 {server} 22 </dev/null"));
        connected.stdout == b"welcome\n"
    }

    /// systemd starts the service at a connection, which a slow machine may not do in time.
    #[track_caller]
    fn opens(&self, server: &str) {
        eventually("a connection", || self.is_open(server));
    }

    fn log(&self) -> String {
        self.says("journalctl -b --no-pager -o cat -u knockq -u knockq-gate")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if thread::panicking() {
            let journal = self.run("systemctl list-jobs; journalctl -b -o short-monotonic SYSLOG_IDENTIFIER=systemd SYSLOG_IDENTIFIER=knockq");
            eprintln!("--- jobs and journal\n{}---", String::from_utf8_lossy(&journal.stdout));
        }
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
    }
}

/// A cgroup for one machine.
fn cgroup(name: &str) -> String {
    static MOUNT: Once = Once::new();
    MOUNT.call_once(|| {
        let mounted = Command::new("mount").args(["-t", "cgroup2", "cgroup2", "/sys/fs/cgroup"]).status().unwrap();
        assert!(mounted.success());
    });
    let path = format!("/sys/fs/cgroup/{name}");
    fs::create_dir(&path).unwrap();
    path
}

#[test]
fn the_gate_stands_before_the_network_is_up() {
    let machine = Machine::boot("gate", "systemctl disable knockq; systemctl enable knockq-gate");
    let before = machine.says("cat /run/gate-before-the-network");
    assert!(before.contains("tcp . 22"), "{before}");
    assert_eq!(machine.property("nftables", "ActiveState"), "active", "whose `flush ruleset` came before");
    for server in ["10.9.0.1", "fd09::1"] {
        assert!(!machine.is_open(server), "{server}");
    }
    machine.says("systemctl start knockq; systemctl stop knockq");
    for server in ["10.9.0.1", "fd09::1"] {
        assert!(!machine.is_open(server), "{server}");
    }
    machine.says("nft delete table inet knockq");
    for server in ["10.9.0.1", "fd09::1"] {
        machine.opens(server); // it was the gate that shut it
    }
}

#[test]
fn with_a_broken_configuration_the_gate_of_last_time_stands() {
    let machine = Machine::boot("broken", "sed -i 's/^private_key/private_kee/' /etc/knockq/knockq.toml");
    assert_eq!(machine.property("knockq-gate", "ActiveState"), "active", "{}", machine.log());
    for server in ["10.9.0.1", "fd09::1"] {
        assert!(!machine.is_open(server), "{server}");
    }
    for (property, value) in [("ActiveState", "failed"), ("ExecMainStatus", "78"), ("NRestarts", "0")] {
        assert_eq!(machine.property("knockq", property), value, "{property}");
    }
    let log = machine.log();
    assert!(log.contains("/etc/knockq/knockq.toml:4:1: unknown field `private_kee`"), "{log}");
    machine.says("sed -i 's/^private_kee/private_key/' /etc/knockq/knockq.toml; systemctl start knockq");
}

#[test]
fn the_daemon_runs_hardened_and_reloads_under_systemd() {
    let machine = Machine::boot("daemon", "");
    assert_eq!(machine.property("knockq", "ActiveState"), "active", "{}", machine.log());
    let root = machine.property("knockq", "MainPID");
    machine.says("systemctl reload knockq");
    assert_eq!(machine.property("knockq", "MainPID"), root);
    for (flag, server) in [("-4", "10.9.0.1"), ("-6", "fd09::1")] {
        assert!(!machine.is_open(server), "{server}");
        machine.says(&format!("ip netns exec client knockq send server {flag} --wait 2>&1"));
        machine.opens(server);
    }

    let status = machine.says(&format!("cat /proc/{root}/status"));
    for (field, value) in [("CapBnd", "00000000000031e0"), ("NoNewPrivs", "1"), ("Seccomp", "2")] {
        assert!(status.contains(&format!("{field}:\t{value}\n")), "{field}: {status}");
    }
    let accounts = machine.says("ps -eo user:32,args | grep '[k]nockq: '");
    assert!(accounts.lines().all(|line| line.starts_with("knockq")), "not as nobody: {accounts}");
    let within = format!("nsenter -t {root} -m ");
    for (path, mode) in [("/etc/knockq", "700"), ("/var/lib/knockq", "700"), ("/run/knockq", "711")] {
        machine.says(&format!("{within} test -w {path}"));
        assert_eq!(machine.says(&format!("stat -c %a {path}")), mode);
    }
    for (socket, mode) in [("control", "600 root"), ("status", "660 knockq")] {
        assert_eq!(machine.says(&format!("stat -c '%a %G' /run/knockq/{socket}.sock")), mode, "after a reload too");
    }
    machine.says("useradd --groups knockq member; setpriv --reuid member --regid nogroup --init-groups knockq status");
    for path in ["/etc", "/usr", "/var/lib"] {
        assert!(!machine.run(&format!("{within} touch {path}/x")).status.success(), "{path}");
    }

    for (restarts, role) in ["root", "gate", "engine"].into_iter().enumerate() {
        let process = match role {
            "root" => machine.property("knockq", "MainPID"),
            _ => machine.processes(&format!("knockq: {role}")),
        };
        assert!(!process.is_empty(), "{role}");
        machine.says(&format!("kill -9 {process}"));
        let restarts = (restarts + 1).to_string();
        eventually("starting again", || {
            machine.property("knockq", "NRestarts") == restarts && machine.property("knockq", "ActiveState") == "active"
        });
    }
    machine.says("systemctl stop knockq");
    assert_eq!(machine.property("knockq", "Result"), "success", "{}", machine.log());
    assert!(machine.says("nft list table inet knockq").contains("tcp . 22"), "the gate stays");
}

#[test]
fn uninstall_stops_what_runs_and_says_what_stays() {
    let machine = Machine::boot("uninstall", "");
    const OURS: &str = "knockq: |knockq serve";
    assert_ne!(machine.processes(OURS), "");
    let said = machine.says(&format!("{PLACES} {}/dist/uninstall 2>&1", env!("CARGO_MANIFEST_DIR")));
    assert!(said.contains("nft delete table inet knockq") && said.contains("/etc/knockq"), "{said}");
    for unit in ["knockq", "knockq-gate"] {
        assert_eq!(machine.property(unit, "LoadState"), "not-found", "{unit}");
    }
    assert_eq!(machine.says("find /etc/systemd /usr/local -name '*knockq*'"), "");
    assert_eq!(machine.processes(OURS), "");
    machine.says("test -e /etc/knockq/server.key; test -e /var/lib/knockq/counters.redb; nft list table inet knockq");
}

/// As an administrator does it who edits nftables.conf; Debian's begins with `flush ruleset`.
#[test]
fn reloading_nftables_with_and_without_the_include_leaves_gate_and_doors() {
    // Longer than four reloads take on a machine that is slow.
    let machine = Machine::boot("nftables", "sed -i 's/^open_for = .*/open_for = \"1h\"/' /etc/knockq/knockq.toml\n");
    let servers = [("-4", "10.9.0.1"), ("-6", "fd09::1")];
    for (flag, server) in servers {
        machine.says(&format!("ip netns exec client knockq send server {flag} --wait 2>&1"));
        machine.opens(server);
    }
    let stands = || {
        let table = machine.run("nft list table inet knockq");
        String::from_utf8_lossy(&table.stdout).matches("alice ssh").count() == servers.len()
    };
    let is_owned = machine.log().contains("the table is owned");
    machine.says("systemctl reload nftables");
    eventually("gate and doors", stands);
    machine.says("systemctl stop nftables; systemctl start nftables"); // which flushes twice
    eventually("gate and doors", stands);
    machine.says("echo 'include \"/etc/knockq/knockq.nft\"' >>/etc/nftables.conf");
    let reloaded = machine.run("systemctl reload nftables");
    assert_eq!(reloaded.status.success(), !is_owned, "an owned table is nobody else's to load, and needs no include");
    eventually("gate and doors", stands);
    for (_, server) in servers {
        machine.opens(server); // the doors are open still
    }
    assert_eq!(machine.property("knockq", "NRestarts"), "0", "{}", machine.log());
    machine.says("knockq revoke --all");
    for (_, server) in servers {
        assert!(!machine.is_open(server), "{server}");
    }
}

/// Whoever is locked out cannot start it by hand.
#[test]
fn a_daemon_that_fails_at_each_start_is_started_again_until_it_works_behind_a_shut_gate() {
    let change = "mkdir -p /etc/systemd/system/knockq.service.d
        printf '[Service]\\nCapabilityBoundingSet=~CAP_SETUID\\nRestartSec=100ms\\n' \\
            >/etc/systemd/system/knockq.service.d/less.conf
        systemctl enable knockq-gate\n";
    let machine = Machine::boot("failing", change);
    let restarts = || machine.property("knockq", "NRestarts").parse::<u32>().unwrap();
    eventually("more failures than systemd forgives by itself", || restarts() > 6);
    let log = machine.log();
    assert!(log.contains("cannot "), "{log}");
    assert_eq!(
        machine.property("knockq", "StartLimitIntervalUSec"),
        "0",
        "there is no number of starts that is too many"
    );
    for server in ["10.9.0.1", "fd09::1"] {
        assert!(!machine.is_open(server), "{server}");
    }
    machine.says("rm -r /etc/systemd/system/knockq.service.d; systemctl daemon-reload");
    eventually("its next start", || machine.property("knockq", "ActiveState") == "active");
    assert!(
        machine.property("knockq", "StatusText").starts_with("ready: users 1, services 1, "),
        "as the status shows it"
    );
    machine.says("ip netns exec client knockq send server -4 --wait 2>&1");
    machine.opens("10.9.0.1");
}
