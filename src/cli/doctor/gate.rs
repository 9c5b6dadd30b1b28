//! Whether the gate stands, and somebody reads what it queues.

use std::fs;
use std::path::Path;

use super::Finding;
use crate::cli::failure::Failure;
use crate::cli::grants::time_left;
use crate::cli::inspect::ask_daemon;
use crate::config::ServerConfig;
use crate::config::secure_file::{self, Privacy};
use crate::config::server::RulesetMode;
use crate::nft;
use crate::serve::configuration::ServeError;
use crate::serve::configuration::refuse_taken_queue;

/// What the daemon's process that reads the queue is called.
const GATE: &str = "(knockq-gate)";

const MISSING: &str = "there is no table inet knockq: guarded ports are open to all";
const CHANGED: &str = "table inet knockq is not that of this configuration: one of them was changed, by hand";

/// Whether kernel and nft know each word of the table.
pub(super) fn kernel(config: &ServerConfig) -> Finding {
    const CHECK: &str = "kernel";
    match nft::check(&config.ruleset().for_check()) {
        Ok(()) => Finding::ok(CHECK, "this kernel and this nft have all that the table needs"),
        Err(error) => Finding::failed(CHECK, error),
    }
}

/// Whether the table in the kernel is that of the configuration.
pub(super) fn table(config: &ServerConfig, path: &Path) -> Finding {
    const CHECK: &str = "table";
    let file = include(path);
    let is_live = || nft::is_live(&config.ruleset());
    let looked = nft::exists().and_then(|exists| Ok((exists, exists && is_live()?)));
    let (message, hint) = match (looked, config.ruleset_mode) {
        (Ok((_, true)), _) => return Finding::ok(CHECK, "table inet knockq is loaded, and that of this configuration"),
        (Ok((false, _)), RulesetMode::Managed) => (MISSING, "systemctl start knockq".to_owned()),
        (Ok((false, _)), RulesetMode::External) => {
            (MISSING, format!("include \"{}\" in /etc/nftables.conf, and load it", file.display()))
        }
        (Ok((true, false)), RulesetMode::Managed) => {
            let hint = "if the configuration was changed: systemctl reload knockq; else: systemctl restart knockq";
            (CHANGED, hint.to_owned())
        }
        (Ok((true, false)), RulesetMode::External) => {
            (CHANGED, format!("knockq ruleset --output {}, and load nftables.conf", file.display()))
        }
        (Err(error), _) => {
            let (message, hint) = Failure::from(error).into_parts();
            let finding = Finding::unknown(CHECK, format!("table inet knockq cannot be compared: {message}"));
            return Finding { hint, ..finding };
        }
    };
    Finding::problem(CHECK, message).hint(hint)
}

/// A gate that goes away by itself, if this one does.
pub(super) fn trial(config: &ServerConfig) -> Option<Finding> {
    let left = ask_daemon(config)?.table.trial_seconds_left?;
    let message = format!("the gate is on trial: in {} it is gone, and guarded ports are open to all", time_left(left));
    Some(Finding::note("trial", message).hint("when a knock has let you in: knockq confirm"))
}

/// What the next boot begins with.
pub(super) fn include_file(config: &ServerConfig, path: &Path) -> Finding {
    const CHECK: &str = "include-file";
    let file = include(path);
    let output = format!("knockq ruleset --output {}", file.display());
    let hint = match config.ruleset_mode {
        RulesetMode::Managed => "systemctl reload knockq, or start it".to_owned(),
        RulesetMode::External => output,
    };
    match secure_file::read(&file, Privacy::Public) {
        Ok(text) if *text == config.ruleset().to_string() => {
            Finding::ok(CHECK, format!("{}: is up to date, for the next boot to begin with", file.display()))
        }
        Ok(_) => {
            let message =
                format!("{}: is not that of this configuration; the next boot begins with it", file.display());
            Finding::problem(CHECK, message).hint(hint)
        }
        Err(error) => Finding::failed(CHECK, Failure::from(error).or_hint(&hint)),
    }
}

/// Doors that each load of the host's firewall brings, if it was saved while some may have been open.
pub(super) fn saved() -> Option<Finding> {
    const FILE: &str = "/etc/nftables.conf";
    let message = format!(
        "{FILE}: has table inet knockq in it, with the doors of the day on which it was saved; from Linux 6.9 on the kernel \
         refuses the whole file while the daemon runs"
    );
    let hint = "save all tables but that: docs/guide-server.md#saving-the-firewall";
    let has_table = fs::read_to_string(FILE).is_ok_and(|text| is_listed_in(&text));
    has_table.then(|| Finding::note("saved", message).hint(hint))
}

/// Whether nft's listing of the table is in a file of it; an include of ours, or a deletion, is no listing.
fn is_listed_in(text: &str) -> bool {
    text.lines().any(|line| line.trim_start().starts_with(&format!("table inet {} {{", nft::TABLE)))
}

fn include(config: &Path) -> std::path::PathBuf {
    config.with_file_name("knockq.nft")
}

/// Whether it is the daemon that reads the queue.
pub(super) fn queue(config: &ServerConfig) -> Finding {
    const CHECK: &str = "queue";
    let number = config.queue;
    match refuse_taken_queue(number) {
        Ok(()) => Finding::problem(CHECK, format!("queue {number}: nobody reads it, so no knock opens a door"))
            .hint("systemctl start knockq; why it has stopped: journalctl -u knockq"),
        Err(ServeError::QueueTaken { owner, .. }) if owner.ends_with(GATE) => {
            Finding::ok(CHECK, format!("queue {number}: the daemon reads it, {owner}"))
        }
        Err(error @ ServeError::QueueTaken { .. }) => Finding {
            hint: Some("end that program, or set `queue = N` in [server]".to_owned()),
            ..Finding::failed(CHECK, error)
        },
        Err(error) => Finding::failed(CHECK, error),
    }
}

#[cfg(test)]
mod tests {
    use super::is_listed_in;

    #[test]
    fn a_saved_table_is_told_from_an_include_a_deletion_and_others() {
        for text in
            ["flush ruleset\ntable inet knockq {\n}", "table inet knockq { # progname knockq\n\tflags owner,persist\n}"]
        {
            assert!(is_listed_in(text), "{text}");
        }
        for text in [
            "",
            "include \"/etc/knockq/knockq.nft\"",
            "table inet knockq\ndelete table inet knockq",
            "table inet knockq_mine {\n}",
            "# table inet knockq {",
        ] {
            assert!(!is_listed_in(text), "{text}");
        }
    }
}
