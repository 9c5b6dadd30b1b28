//! What the service manager is told, if there is one.

pub(super) use sd_notify::NotifyState;
use tracing::warn;

/// What the service manager shows while the table is not what it should be.
pub(super) const OPEN: &str = "table inet knockq is not what it should be, so guarded ports may be open: see the log";

/// What is ready, as the service manager shows it.
pub(super) fn summary(users: usize, services: usize, knock_ports: &str) -> String {
    format!("ready: users {users}, services {services}, knock ports {knock_ports}")
}

/// The service manager may have gone, or never have been there: that is no reason to stop.
pub(super) fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        warn!("the service manager does not listen: {error}");
    }
}
