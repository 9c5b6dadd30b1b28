//! On a kernel that lacks nft's queue statement. It takes the module away, so it runs in the virtual machine only.

#[path = "support/lab.rs"]
mod lab;

use lab::{Daemon, Lab, succeeds};

#[test]
fn a_kernel_without_nft_queue_is_named_and_nothing_is_left_behind() {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    assert_eq!(name.trim(), "knockq-vm", "this test removes a kernel module");
    let lab = Lab::network();
    lab.server.sh("find /lib/modules -name 'nft_queue.ko*' -exec rm {} +");
    lab.configure("[services.ssh]\nports = [\"tcp/22\"]\n");
    let mut daemon = Daemon::spawn(&lab, &[]);
    assert_eq!(daemon.end(), Some(1));
    let log = daemon.log();
    assert!(log.contains("knockq: nft: this kernel has no `queue` statement (CONFIG_NFT_QUEUE)"), "{log}");
    assert!(log.contains("Hint: modprobe nft_queue"), "{log}");
    assert_eq!(lab.server.nft(&["list", "ruleset"]), "", "no half of a table");

    let config = lab.config().display().to_string();
    let checked = lab.knockq(&lab.server, &["ruleset", "--check", "--config", &config]);
    assert_eq!(checked.status.code(), Some(1));
    succeeds(&lab.knockq(&lab.server, &["ruleset", "--config", &config]));
}
