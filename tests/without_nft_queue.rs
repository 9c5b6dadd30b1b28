//! On a kernel that lacks what the table needs. It takes modules away, so it runs in the virtual machine only.

#[path = "support/lab.rs"]
mod lab;

use lab::{Daemon, Lab, succeeds};

#[test]
fn a_kernel_that_lacks_what_the_table_needs_is_named_and_nothing_is_left_behind() {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    assert_eq!(name.trim(), "knockq-vm", "this test removes kernel modules");
    let lab = Lab::network();
    lab.configure("[services.ssh]\nports = [\"tcp/22\"]\n");
    lab.set("answer = \"reset\"");
    let config = lab.config().display().to_string();
    for (module, lacks) in [
        ("nft_queue", "`queue` statement (CONFIG_NFT_QUEUE)"),
        ("nft_limit", "`limit` in a set (CONFIG_NFT_LIMIT)"),
        ("nft_fib_inet", "`fib` expression (CONFIG_NFT_FIB_INET)"),
        ("nft_reject_inet", "`reject` before routing (CONFIG_NFT_REJECT_INET)"),
    ] {
        let away = format!("find /lib/modules -name '{module}.ko*' -exec mv {{}} /tmp +; rmmod {module} 2>&1 || :");
        lab.server.sh(&away);
        let mut daemon = Daemon::spawn(&lab, &[]);
        assert_eq!(daemon.end(), Some(78), "{}", daemon.log());
        let log = daemon.log();
        let said: Vec<&str> = log.lines().skip_while(|line| !line.starts_with("knockq: nft")).collect();
        let line = format!("knockq: nft: this kernel has no {lacks}, or this nft is too old for it");
        let hint =
            format!("Hint: modprobe {module}; else boot a distribution's kernel, or install nftables 0.9.8 or newer");
        assert_eq!(said, [line, hint], "{log}");
        assert_eq!(lab.server.nft(&["list", "ruleset"]), "", "no half of a table");

        let checked = lab.knockq(&lab.server, &["ruleset", "--check", "--config", &config]);
        assert_eq!(checked.status.code(), Some(78));
        succeeds(&lab.knockq(&lab.server, &["ruleset", "--config", &config]));
        let found = lab.knockq(&lab.server, &["doctor", "--config", &config]);
        let line = format!("problem  nft: this kernel has no {lacks}, or this nft is too old for it");
        let found = String::from_utf8(found.stdout).unwrap();
        assert!(found.contains(&format!("{line}\n         Hint: modprobe {module}; ")), "{found}");
        lab.server.sh(&format!("insmod /tmp/{module}.ko"));
    }
    lab.start().stop();
    let found = lab.knockq(&lab.server, &["doctor", "--config", &config]);
    let found = String::from_utf8(found.stdout).unwrap();
    assert!(found.contains("ok       this kernel and this nft have all that the table needs\n"), "{found}");
}
