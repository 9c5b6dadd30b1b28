//! The one rule that a kernel without nft's `queue` statement cannot take from nft: there iptables puts it in.
//!
//! The daemon runs /usr/sbin/nft itself. So this process gets a mount namespace of its own, in which a script stands in
//! its place: it hands everything on to the real nft but the rule with the queue, which it gives to iptables-nft, in a
//! table of its own. Nobody else sees that script, and where the kernel has the statement nothing of this is done.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

const NFT: &str = "/usr/sbin/nft";

/// Where the real one is meanwhile: a daemon that is confined cannot reach it through a descriptor of this process.
const ASIDE: &str = "/mnt";

const PROBE: &str = "table inet t { chain c { type filter hook prerouting priority raw; queue num 1; }; }";

const STAND_IN: &str = r#"#!/bin/sh
# nft, but for the queue statement.
PATH=/usr/sbin:/usr/bin:/sbin:/bin
case " $* " in
*" -f - "*) ;;
*) exec REAL "$@" ;;
esac
input=$(cat)
queue=$(printf %s "$input" | sed -n 's/.* queue num //p')
printf '%s\n' "$input" | grep -v ' queue num ' | REAL "$@" || exit
case " $* $queue " in *" -c "* | *"  ") exit ;; esac
for iptables in iptables-nft ip6tables-nft; do
    set -- PREROUTING -p tcp --tcp-flags FIN,SYN,RST,ACK SYN --dport 20000:21023 ! -i lo \
        -m addrtype --dst-type LOCAL -j NFQUEUE --queue-num "$queue"
    "$iptables" -t raw -C "$@" 2>/dev/null || "$iptables" -t raw -A "$@" || exit
done
"#;

/// Makes `knockq serve` work on this kernel, for this process and those that it starts. Call it before any thread.
pub fn provide() {
    install("nft", "nftables");
    install("ip", "iproute2");
    let nft = format!("{NFT} -c -f - <<'END'\n{PROBE}\nEND");
    if succeeds(Command::new("unshare").args(["-n", "sh", "-c", &nft])) {
        return;
    }
    install("iptables-nft", "iptables");
    unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace needs root");
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
    mount(Some("none"), ASIDE, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    let (real, stand_in) = (format!("{ASIDE}/nft"), format!("{ASIDE}/stand-in"));
    fs::copy(NFT, &real).unwrap();
    fs::write(&stand_in, STAND_IN.replace("REAL", &real)).unwrap();
    fs::set_permissions(&stand_in, Permissions::from_mode(0o755)).unwrap();
    mount(Some(stand_in.as_str()), NFT, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
}

fn install(program: &str, package: &str) {
    if succeeds(Command::new("sh").args(["-c", &format!("command -v {program}")])) {
        return;
    }
    eprintln!("installing {package}");
    let install = format!("apt-get -qq -y --no-install-recommends install {package}");
    let script = format!("{install} || {{ apt-get -qq update && {install}; }}");
    assert!(succeeds(Command::new("sh").args(["-c", &script])), "{package} cannot be installed: are you root?");
}

fn succeeds(command: &mut Command) -> bool {
    command.output().is_ok_and(|output| output.status.success())
}
