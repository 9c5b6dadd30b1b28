//! Configuration and user files, read from disk as `serve` reads them: refused with the right place, or right throughout.
#![no_main]

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use knockq::config::ConfigError;
use knockq::config::server::ServerConfig;
use knockq::nft::is_whole;
use knockq::service::Transport;
use knockq_fuzz::{Scratch, diagnostic};
use libfuzzer_sys::fuzz_target;

/// Stands between the files of an input: knockq.toml, then users'.
const NEXT_FILE: &str = "\n%%\n";

/// Files of users in an input at most.
const USERS: usize = 3;

static SCRATCH: LazyLock<Scratch> = LazyLock::new(|| {
    let scratch = Scratch::new("config");
    scratch.write("server.key", "QEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEA=\n");
    fs::create_dir_all(scratch.path().join("users.d")).unwrap();
    scratch
});

fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let files = write(text);
    match ServerConfig::load(&files[0].0) {
        Ok(config) => check(&config),
        Err(ConfigError::Content(error)) => check_refusal(&error.to_string(), &files),
        Err(error) => drop((error.to_string(), error.hint())),
    }
});

/// Writes the files of an input; tells where and what.
fn write(text: &str) -> Vec<(PathBuf, &str)> {
    let mut parts = text.split(NEXT_FILE);
    let mut files = vec![(SCRATCH.write("knockq.toml", parts.next().unwrap_or_default()), text)];
    files[0].1 = text.split(NEXT_FILE).next().unwrap_or_default();
    for place in 0..USERS {
        let name = format!("users.d/u{place}.toml");
        match parts.next() {
            Some(text) => files.push((SCRATCH.write(&name, text), text)),
            None => drop(fs::remove_file(SCRATCH.path().join(name))),
        }
    }
    files
}

fn check(config: &ServerConfig) {
    assert!((5..=600).contains(&config.window.0));
    assert!(!config.services.is_empty());
    let selectors: HashSet<u16> = config.services.iter().map(|service| service.selector).collect();
    assert_eq!(selectors.len(), config.services.len(), "one selector, one service");
    for service in &config.services {
        assert!((1..=365 * 86_400).contains(&service.open_for) && !service.ports.is_empty());
        let is_knocked_at = |number| config.knock_ports.contains(number);
        assert!(!service.ports.iter().any(|port| port.transport == Transport::Tcp && is_knocked_at(port.number)));
    }
    let keys: HashSet<_> = config.users.iter().map(|user| user.public_key).collect();
    assert_eq!(keys.len(), config.users.len(), "one key, one user");
    assert!(!keys.contains(config.private_key.public()));
    assert!(config.users.iter().flat_map(|user| &user.services).all(|place| *place < config.services.len()));
    assert_eq!(config.registry().unwrap().users.len(), config.users.len());
    check_ruleset(&config.ruleset().to_string());
}

/// Nothing in a file gets more into the ruleset than elements and ports.
fn check_ruleset(ruleset: &str) {
    const LINES: [&str; 8] =
        ["add table", "add set", "add chain", "add rule", "insert rule", "add element", "flush chain", "flush set"];
    assert!(is_whole(ruleset));
    for line in ruleset.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        assert!(LINES.iter().any(|start| line.starts_with(&format!("{start} inet knockq"))), "{line}");
    }
    assert_eq!(ruleset.matches("add table").count(), 1);
}

fn check_refusal(error: &str, files: &[(PathBuf, &str)]) {
    let names = |path: &Path| error.starts_with(&format!("{}:", path.display()));
    let (path, text) = files.iter().find(|(path, _)| names(path)).expect("a file of the input");
    if !error.contains("is a key file") {
        diagnostic::check(path, text, error);
    }
}
