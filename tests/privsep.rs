//! docs/privsep.md says what the source says: its tables are made from it. `WRITE=1 cargo test --test privsep` writes them.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use knockq::serve::calls::{self, Argument, Call, ENGINE, MISSING, NEVER};
use object::{Object, ObjectSection, ObjectSymbol, SymbolKind};

/// The programs of root and gate, as they were linked.
const ROOT: &str = env!("CARGO_BIN_EXE_knockq-root");
const GATE: &str = env!("CARGO_BIN_EXE_knockq-gate");

/// What confines a process rather than being confined. It is counted by itself.
const CONFINEMENT: [&str; 2] = ["serve/calls.rs", "serve/sandbox.rs"];

/// Lines that root and gate may have at most, each once, and lines of confinement. They only ever get fewer.
const MOST_OF_BOTH: usize = 3822;
const MOST_OF_CONFINEMENT: usize = 514;

/// What Rust's own library is made of.
const OF_RUST: [&str; 8] =
    ["addr2line", "adler2", "gimli", "hashbrown", "memchr", "miniz_oxide", "object", "rustc_demangle"];

#[test]
fn the_pages_tables_are_those_of_the_source() {
    let path = root().join("docs/privsep.md");
    let page = fs::read_to_string(&path).unwrap();
    let mut expected = page.clone();
    for (name, table) in [
        ("engine", calls(ENGINE)),
        ("gate", calls(calls::GATE)),
        ("root", calls(NEVER)),
        ("missing", calls(MISSING)),
        ("lines", lines_with_a_privilege()),
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
fn no_call_of_the_engine_names_a_file_makes_a_socket_or_a_process_or_reaches_another() {
    let forbidden = [
        "open", "stat", "access", "link", "rename", "mkdir", "chmod", "chown", "exec", "clone", "fork", "socket",
        "bind", "connect", "kill", "ptrace", "pidfd", "mount", "setuid", "setgid", "cap", "seccomp", "landlock",
        "memfd", "shm", "ioctl", "dup",
    ];
    for call in ENGINE {
        let names_nothing = call.name == "SYS_fstat"; // a descriptor, unlike all others that look at a file
        assert!(names_nothing || !forbidden.iter().any(|word| call.name.contains(word)), "{}", call.name);
        assert!(!call.why.is_empty());
    }
    assert!(ENGINE.len() > 20, "the list is looked at");
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

fn lines_with_a_privilege() -> String {
    let mut table = "| process | lines | of which |\n|---|---|---|\n".to_owned();
    let (root, gate) = (files_of(Path::new(ROOT)), files_of(Path::new(GATE)));
    let confines = |file: &&String| CONFINEMENT.contains(&file.as_str());
    for files in [&root, &gate] {
        assert_eq!(files.iter().filter(confines).count(), CONFINEMENT.len(), "the binary has line tables");
    }
    let beside = root.difference(&gate).cloned().collect();
    for (what, files) in [
        ("gate", gate.iter().filter(|file| !confines(file)).cloned().collect()),
        ("root, beside what it shares with the gate", beside),
        ("confinement of both", CONFINEMENT.map(str::to_owned).into()),
    ] {
        let files: BTreeSet<String> = files;
        let counted: Vec<(&str, usize)> = files.iter().map(|file| (file.as_str(), lines(file))).collect();
        let sum: usize = counted.iter().map(|(_, lines)| lines).sum();
        let each: Vec<String> = counted.iter().map(|(file, lines)| format!("{file} {lines}")).collect();
        writeln!(table, "| {what} | {sum} | {} |", each.join(", ")).unwrap();
    }
    for (process, program) in [("root", ROOT), ("the gate", GATE)] {
        let crates: Vec<String> = crates_of(Path::new(program)).into_iter().collect();
        writeln!(table, "\nCrates in {process}: {}: {}.", crates.len(), crates.join(", ")).unwrap();
    }
    table
}

#[test]
fn what_runs_with_a_capability_only_ever_gets_less() {
    let (root, gate) = (files_of(Path::new(ROOT)), files_of(Path::new(GATE)));
    let sum = |files: &mut dyn Iterator<Item = &String>| {
        files.filter(|file| !CONFINEMENT.contains(&file.as_str())).map(|file| lines(file)).sum::<usize>()
    };
    let confinement = CONFINEMENT.iter().map(|file| lines(file)).sum::<usize>();
    for (what, lines, most) in [
        ("root and gate", sum(&mut root.union(&gate)), MOST_OF_BOTH),
        ("confinement", confinement, MOST_OF_CONFINEMENT),
    ] {
        assert!(lines <= most, "{what}: {lines} lines, and {most} before: what is new belongs elsewhere");
        assert!(lines + 50 > most, "{what}: {lines} lines: lower the number to that");
    }
    for (program, one) in [(ROOT, "sd_notify"), (GATE, "nfq")] {
        let crates = crates_of(Path::new(program));
        for none in [
            "serde",
            "postcard",
            "tokio",
            "tracing",
            "redb",
            "etherparse",
            "clap",
            "aes",
            "hmac",
            "x25519_dalek",
            "toml",
        ] {
            assert!(!crates.contains(none), "{none} is in {program}");
        }
        assert!(crates.contains(one), "the names of crates are found: {crates:?}");
    }
}

/// The files of ours of which there is a line in a program, by its debug information.
fn files_of(program: &Path) -> BTreeSet<String> {
    let bytes = fs::read(program).unwrap();
    let code = object::File::parse(bytes.as_slice()).unwrap();
    let code = code.section_by_name(".text").unwrap();
    let lines = addr2line::Loader::new(program).unwrap();
    let ranges = lines.find_location_range(code.address(), code.address() + code.size()).unwrap();
    let own = root().join("src");
    let files = ranges.filter_map(|(_, _, place)| Some(PathBuf::from(place.file?).strip_prefix(&own).ok()?.to_owned()));
    let files: BTreeSet<PathBuf> = files.collect();
    files.into_iter().map(|file| file.to_str().unwrap().to_owned()).collect()
}

/// Whose functions a program has, by their names; but for Rust's own.
fn crates_of(program: &Path) -> BTreeSet<String> {
    let bytes = fs::read(program).unwrap();
    let file = object::File::parse(bytes.as_slice()).unwrap();
    let functions = file.symbols().filter(|symbol| symbol.kind() == SymbolKind::Text && symbol.size() > 0);
    let names = functions.map(|symbol| format!("{:#}", rustc_demangle::demangle(symbol.name().unwrap())));
    let lock = fs::read_to_string(root().join("Cargo.lock")).unwrap();
    let known: BTreeSet<String> = lock
        .lines()
        .filter_map(|line| line.strip_prefix("name = \""))
        .map(|name| name.trim_end_matches('"').replace('-', "_"))
        .collect();
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut found = BTreeSet::new();
    for name in names {
        for (place, _) in name.match_indices("::") {
            let before = &name[..place];
            let root = &before[before.rfind(|c| !is_word(c)).map_or(0, |end| end + 1)..];
            let is_root = !before[..before.len() - root.len()].ends_with(':');
            found.extend(known.get(root).filter(|_| is_root && root != "knockq" && !OF_RUST.contains(&root)).cloned());
        }
    }
    found
}

/// All lines but those of tests.
fn lines(file: &str) -> usize {
    let text = fs::read_to_string(root().join("src").join(file)).unwrap();
    text.split("#[cfg(test)]").next().unwrap().trim_end().lines().count()
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
