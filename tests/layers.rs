//! The direction of the modules: who may know whom.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Each module and what it may use, the lowest first. A single file may have a line of its own, which then holds for it.
const LAYERS: &[(&str, &[&str])] = &[
    ("service", &[]),
    ("crypto", &[]),
    ("packet", &[]),
    ("verify", &["service", "crypto", "packet"]),
    ("queue", &["service"]),
    ("nft", &["service"]),
    ("config", &["service", "crypto", "verify", "nft"]),
    // Looks at no byte of a packet: it knows neither packet nor crypto nor verify. Nor has it anything that serialises, or logs
    // in its own way: it is a program of its own.
    (
        "serve/gate.rs",
        &[
            "queue",
            "nft",
            "super::admission",
            "super::calls",
            "super::channel",
            "super::commands",
            "super::handover",
            "super::limits",
            "super::line",
            "super::sandbox",
            "super::terminal",
        ],
    ),
    ("serve/line.rs", &[]),
    ("serve/admission.rs", &["nft", "super::commands", "super::limits", "super::rate"]),
    ("serve/commands.rs", &["service", "nft"]),
    ("serve/limits.rs", &["service", "nft", "super::sandbox"]),
    ("serve/gate_link.rs", &["nft", "super::commands"]),
    // The kernel's sets, through the gate alone.
    (
        "serve/reconciler.rs",
        &[
            "service",
            "nft",
            "verify",
            "super::clock",
            "super::commands",
            "super::control",
            "super::gate_link",
            "super::ledger",
            "super::past",
            "super::policy",
            "super::rate",
            "super::repeats",
            "super::report",
            "super::watchers",
        ],
    ),
    ("serve/reconciler/found.rs", &["nft", "serve", "super::Reconciler"]),
    ("serve/reconciler/members.rs", &["nft", "service", "super::Reconciler"]),
    ("serve/reconciler/table.rs", &["nft", "serve", "super::Reconciler"]),
    ("serve/policy.rs", &["service", "nft", "verify", "super::ledger"]),
    ("serve/control.rs", &["service", "super::report"]),
    ("serve/sockets.rs", &["super::control"]),
    ("serve/visitors.rs", &["super::control", "super::report", "super::watchers"]),
    ("serve/ledger.rs", &["service", "nft"]),
    ("serve/past.rs", &["service", "nft", "super::ledger", "super::control"]),
    ("serve/rate.rs", &[]),
    ("serve/report.rs", &["service", "nft", "verify"]),
    ("serve/observers.rs", &["super::control", "super::report", "super::watchers"]),
    ("serve/watchers.rs", &[]),
    ("serve/figures.rs", &["service", "verify", "super::clock", "super::report"]),
    ("serve/repeats.rs", &[]),
    ("serve/clock.rs", &[]),
    // Has no file and no way to the kernel's tables.
    (
        "serve/engine.rs",
        &[
            "crypto",
            "nft",
            "verify",
            "queue",
            "super::calls",
            "super::channel",
            "super::clock",
            "super::figures",
            "super::control",
            "super::gate_link",
            "super::handover",
            "super::reconciler",
            "super::refusals",
            "super::repeats",
            "super::report",
            "super::sandbox",
            "super::settings",
            "super::store",
            "super::terminal",
            "super::visitors",
            "super::watchers",
            "super::writer",
        ],
    ),
    ("serve/engine/reload.rs", &["nft", "serve", "super::unexpected"]),
    ("serve/engine/status.rs", &["serve", "verify"]),
    (
        "serve/writer.rs",
        &[
            "verify",
            "super::clock",
            "super::handover",
            "super::log",
            "super::policy",
            "super::repeats",
            "super::settings",
            "super::store",
        ],
    ),
    ("serve/settings.rs", &["crypto", "service", "verify", "super::policy", "super::sandbox"]),
    // Sees no packet, no decision and no file: it is a program of its own, with nothing in it that parses.
    (
        "serve/root.rs",
        &[
            "super::calls",
            "super::channel",
            "super::children",
            "super::ending",
            "super::handover",
            "super::line",
            "super::plan",
            "super::program",
            "super::sandbox",
            "super::terminal",
        ],
    ),
    ("serve/children.rs", &["super::channel", "super::ending", "super::process"]),
    ("serve/process.rs", &["super::channel", "super::ending"]),
    ("serve/ending.rs", &["super::channel", "super::sandbox"]),
    ("serve/plan.rs", &["super::handover"]),
    ("serve/program.rs", &["super::handover"]),
    ("serve/calls.rs", &[]),
    ("serve/sandbox.rs", &["super::calls"]),
    ("serve/start.rs", &["super::configuration", "super::log"]),
    // Runs as root, reads files, and has ended before anything comes of them.
    (
        "serve/configuration.rs",
        &[
            "config",
            "crypto",
            "nft",
            "queue",
            "service",
            "verify",
            "super::channel",
            "super::control",
            "super::handover",
            "super::limits",
            "super::plan",
            "super::policy",
            "super::sandbox",
            "super::settings",
            "super::sockets",
        ],
    ),
    ("serve/explain.rs", &["packet", "service", "verify", "super::report"]),
    ("serve", &["service", "crypto", "verify", "queue"]),
    ("client", &["service", "crypto", "packet", "config"]),
    ("cli", &["service", "crypto", "packet", "queue", "nft", "config", "serve", "client"]),
    ("bin", &[]),
];

#[test]
fn every_module_uses_only_those_below_it() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut checked = 0;
    for file in rust_files(&source) {
        let name = file.strip_prefix(&source).unwrap().to_str().unwrap().to_owned();
        if name == "lib.rs" {
            continue;
        }
        let module = name.split(['/', '.']).next().unwrap();
        let allowed = LAYERS
            .iter()
            .find(|(layer, _)| *layer == name)
            .or_else(|| LAYERS.iter().find(|(layer, _)| *layer == module));
        let (_, allowed) = allowed.unwrap_or_else(|| panic!("src/{name}: no layer is given for it"));
        // A file that has a line of its own must say which of its neighbours it uses too.
        let is_bound = LAYERS.iter().any(|(layer, _)| *layer == name);
        for used in used_modules(&fs::read_to_string(&file).unwrap()) {
            let is_neighbour = used == module || used.starts_with("super::");
            let may = if is_bound {
                allowed.contains(&used.as_str())
            } else {
                is_neighbour || allowed.contains(&used.as_str())
            };
            assert!(may, "src/{name} must not use {used}");
            checked += 1;
        }
    }
    assert!(checked > 50, "only {checked} uses were found: this test no longer sees them");
}

#[test]
fn nothing_uses_unsafe_code() {
    let manifest = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml")).unwrap();
    assert!(manifest.contains("unsafe_code = \"forbid\""));
    let lib = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    assert!(lib.contains("#![forbid(unsafe_code)]"));
}

/// What a file uses, outside its tests: modules as `crypto`, and files of its own module as `super::frames`.
fn used_modules(text: &str) -> BTreeSet<String> {
    let code = text.split("#[cfg(test)]").next().unwrap();
    let code: String = code.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    let mut used = BTreeSet::new();
    for (prefix, shown) in [("crate::", ""), ("super::", "super::")] {
        for (place, _) in code.match_indices(prefix) {
            let rest = &code[place + prefix.len()..];
            let names: Vec<&str> = match rest.strip_prefix('{') {
                Some(group) => group.split('}').next().unwrap().split(',').collect(),
                None => vec![rest],
            };
            let first_word =
                |name: &str| name.trim().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
            let modules = names.iter().map(|name| first_word(name)).filter(|name| name.starts_with(char::is_lowercase));
            used.extend(modules.map(|module| format!("{shown}{module}")));
        }
    }
    used
}

fn rust_files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let nested = entries.map(|path| if path.is_dir() { rust_files(&path) } else { vec![path] });
    nested.flatten().filter(|path| path.extension().is_some_and(|extension| extension == "rs")).collect()
}
