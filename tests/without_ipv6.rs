//! On a kernel that was booted without IPv6 (`ipv6.disable=1`), so in the virtual machine only.

#[path = "support/lab.rs"]
mod lab;

use lab::{Family, Lab, eventually, has_ipv6};

#[test]
fn a_kernel_without_ipv6_serves_and_sends_over_ipv4() {
    assert!(!has_ipv6(), "tests/vm/runner boots it so");
    let lab = Lab::new();
    let daemon = lab.start();
    let server = Family::V4.server();
    assert!(!lab.alice.reaches(server, 22) && lab.alice.reaches(server, 80));
    lab.knock(Family::V4, &[]);
    eventually("the door", || lab.alice.reaches(server, 22));
    assert!(!lab.mallory.reaches(server, 22));
    let refused = lab.knockq(&lab.alice, &["send", "server", "-6"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.starts_with("knockq: ") && !said.contains("panicked"), "{said}");
    daemon.signal(nix::sys::signal::Signal::SIGHUP);
    eventually("reloading", || daemon.log().contains("engine: reloaded"));
    let log = daemon.stop();
    assert!(!log.contains("error"), "{log}");
}
