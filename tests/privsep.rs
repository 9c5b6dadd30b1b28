//! docs/privsep.md says what the source says: its tables are made from it. `WRITE=1 cargo test --test privsep` writes them.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use knockq::serve::calls::{Argument, Call, MISSING, MONITOR, NEVER, VERIFIER};

/// What runs in a process that holds a capability, once it has given up the others.
const WITH_A_CAPABILITY: [(&str, &[&str]); 2] = [
    (
        "monitor",
        &[
            "serve/monitor.rs",
            "serve/ledger.rs",
            "serve/past.rs",
            "serve/policy.rs",
            "serve/rate.rs",
            "serve/repeats.rs",
            "serve/report.rs",
            "serve/log.rs",
            "serve/watchers.rs",
            "serve/frames.rs",
            "serve/channel.rs",
            "serve/handover.rs",
            "service.rs",
            "queue/kernel.rs",
            "queue/relay.rs",
            "nft/elements.rs",
            "nft/comment.rs",
            "nft/list.rs",
            "nft/sets.rs",
            "nft/attributes.rs",
            "nft/watch.rs",
        ],
    ),
    (
        "keeper",
        &[
            "serve/keeper.rs",
            "serve/start.rs",
            "serve/manager.rs",
            "serve/children.rs",
            "serve/process.rs",
            "serve/vocabulary.rs",
            "serve/gate.rs",
            "serve/control.rs",
            "serve/observers.rs",
            "serve/report.rs",
            "serve/log.rs",
            "serve/watchers.rs",
            "serve/channel.rs",
            "serve/handover.rs",
            "service.rs",
            "config/secure_file.rs",
            "nft/load.rs",
            "nft/table.rs",
            "nft/ruleset.rs",
            "nft/list.rs",
            "nft/comment.rs",
            "nft/sessions.rs",
            "nft/conntrack.rs",
        ],
    ),
];

#[test]
fn the_pages_tables_are_those_of_the_source() {
    let path = root().join("docs/privsep.md");
    let page = fs::read_to_string(&path).unwrap();
    let mut expected = page.clone();
    for (name, table) in [
        ("verifier", calls(VERIFIER)),
        ("monitor", calls(MONITOR)),
        ("keeper", calls(NEVER)),
        ("missing", calls(MISSING)),
        ("lines", lines_with_a_capability()),
    ] {
        expected = with(&expected, name, &table);
    }
    if std::env::var_os("WRITE").is_some() {
        fs::write(path, &expected).unwrap();
    }
    assert!(
        page == expected,
        "docs/privsep.md is out of date: WRITE=1 cargo test --test privsep, then look at what changed"
    );
}

#[test]
fn no_call_of_the_verifier_names_a_file_makes_a_socket_or_a_process_or_reaches_another() {
    let forbidden = [
        "open", "stat", "access", "link", "rename", "mkdir", "chmod", "chown", "exec", "clone", "fork", "socket",
        "bind", "connect", "accept", "kill", "ptrace", "pidfd", "mount", "setuid", "setgid", "cap", "seccomp",
        "landlock", "memfd", "shm", "ioctl", "dup",
    ];
    for call in VERIFIER {
        let names_nothing = call.name == "SYS_fstat"; // a descriptor, unlike all others that look at a file
        assert!(names_nothing || !forbidden.iter().any(|word| call.name.contains(word)), "{}", call.name);
        assert!(!call.why.is_empty());
    }
    assert!(VERIFIER.len() > 20, "the list is looked at");
}

/// One line a call.
fn calls(list: &[Call]) -> String {
    let mut table = "| call | arguments | why |\n|---|---|---|\n".to_owned();
    for Call { name, only, why, .. } in list {
        let arguments: Vec<String> = only.iter().map(words).collect();
        writeln!(table, "| {} | {} | {why} |", name.trim_start_matches("SYS_"), arguments.join(", ")).unwrap();
    }
    table
}

fn words(argument: &Argument) -> String {
    match argument {
        Argument::Is(place, value) => format!("{} is {value}", place + 1),
        Argument::IsNot(place, value) => format!("{} is not {value}", place + 1),
        Argument::Has(place, bits) => format!("{} with bits {bits:#x}", place + 1),
        Argument::Lacks(place, bits) => format!("{} without bits {bits:#x}", place + 1),
    }
}

fn lines_with_a_capability() -> String {
    let mut table = "| process | lines | of which |\n|---|---|---|\n".to_owned();
    for (process, files) in WITH_A_CAPABILITY {
        let counted: Vec<(&str, usize)> = files.iter().map(|file| (*file, lines_of_code(file))).collect();
        let sum: usize = counted.iter().map(|(_, lines)| lines).sum();
        let each: Vec<String> = counted.iter().map(|(file, lines)| format!("{file} {lines}")).collect();
        writeln!(table, "| {process} | {sum} | {} |", each.join(", ")).unwrap();
    }
    table
}

/// Neither empty lines nor comments nor tests.
fn lines_of_code(file: &str) -> usize {
    let text = fs::read_to_string(root().join("src").join(file)).unwrap();
    let code = text.split("#[cfg(test)]").next().unwrap();
    code.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with("//")).count()
}

/// The page with a table in its place.
fn with(page: &str, name: &str, table: &str) -> String {
    let (start, end) = (format!("<!-- {name}: from the source -->\n"), "<!-- end -->");
    let (before, rest) = page.split_once(&start).unwrap_or_else(|| panic!("docs/privsep.md has no table `{name}`"));
    let (_, after) = rest.split_once(end).unwrap();
    format!("{before}{start}\n{table}\n{end}{after}")
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}
