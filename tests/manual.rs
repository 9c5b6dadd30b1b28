//! Manual pages and completions: they say what the definitions and the code say, and programs that read them take them.

#[path = "../examples/manual/markdown.rs"]
mod markdown;
#[path = "../examples/manual/page.rs"]
mod page;
#[path = "../examples/manual/pages.rs"]
mod pages;
#[path = "support/tree.rs"]
mod tree;
#[path = "support/world.rs"]
mod world;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use clap::{Arg, Command as Definition};
use roff::Roff;
use world::World;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn made() -> BTreeMap<String, String> {
    pages::files(root()).unwrap()
}

#[test]
fn dist_holds_what_the_definitions_and_docs_give() {
    let read = |file: &Path| {
        let name = file.strip_prefix(root().join("dist")).unwrap().display().to_string();
        (name, fs::read_to_string(file).unwrap())
    };
    let files = pages::DIRECTORIES.map(|directory| tree::files(&root().join("dist").join(directory))).concat();
    let there: BTreeMap<String, String> = files.iter().map(|file| read(file)).collect();
    let made = made();
    let names: BTreeSet<&String> = made.keys().chain(there.keys()).collect();
    let old: Vec<_> = names.into_iter().filter(|name| made.get(*name) != there.get(*name)).collect();
    assert!(
        old.is_empty(),
        "these files of dist/ are not what the definitions and docs/ give: {old:?}\nHint: make manual"
    );
}

/// Every command that is shown, with the words that call it; `knockq` itself has none.
fn commands() -> Vec<(Vec<String>, Definition)> {
    fn collect(command: &Definition, words: &[String], found: &mut Vec<(Vec<String>, Definition)>) {
        found.push((words.to_vec(), command.clone()));
        for command in command.get_subcommands().filter(|command| !command.is_hide_set()) {
            collect(command, &[words, &[command.get_name().to_owned()]].concat(), found);
        }
    }
    let (mut found, mut knockq) = (Vec::new(), knockq::cli::definition());
    knockq.build();
    collect(&knockq, &[], &mut found);
    assert!(found.len() > 15, "only {} commands were found: this test no longer sees them", found.len());
    found
}

/// What one types, or in place of which one does.
fn names(arg: &Arg) -> Vec<String> {
    let flags = [arg.get_long().map(|long| format!("--{long}")), arg.get_short().map(|short| format!("-{short}"))];
    let names: Vec<String> = flags.into_iter().flatten().collect();
    if names.is_empty() { arg.get_value_names().unwrap().iter().map(ToString::to_string).collect() } else { names }
}

/// What is under a heading, to the next line that begins with `end`.
#[track_caller]
fn part<'a>(text: &'a str, heading: &str, end: &str) -> &'a str {
    let (_, rest) = text.split_once(&format!("\n{heading}\n")).unwrap_or_else(|| panic!("there is no `{heading}`"));
    rest.split(&format!("\n{end}")).next().unwrap()
}

#[test]
fn every_command_is_in_its_page_and_in_its_help_with_all_options_and_an_example() {
    let world = World::empty();
    let made = made();
    for (words, command) in commands() {
        let called: Vec<&str> = words.iter().map(String::as_str).chain(["--help"]).collect();
        let help = world.run(&called).succeeds();
        assert!(help.contains("Example"), "{called:?} has no example");
        let pages = [&made["man/knockq.1"], &made["man/knockq-serve.8"]];
        let place =
            if words.is_empty() { ".SH OPTIONS".to_owned() } else { format!(".SS \"knockq {}\"", words.join(" ")) };
        let page =
            pages.into_iter().find(|page| page.contains(&place)).unwrap_or_else(|| panic!("{place} is on no page"));
        let described = part(page, &place, ".S");
        for argument in command.get_arguments().filter(|argument| !argument.is_hide_set()) {
            for name in names(argument) {
                assert!(help.contains(&name), "{name} is not in the help of {words:?}");
                let is_left_out = argument.get_id() == "help" && !words.is_empty();
                assert!(is_left_out || described.contains(&name.replace('-', "\\-")), "{name} is not in {place}");
            }
        }
        for command in command.get_subcommands().filter(|command| !command.is_hide_set()) {
            assert!(
                help.contains(&format!("\n  {}", command.get_name())),
                "{} is not in {words:?}",
                command.get_name()
            );
        }
        if let [word] = &words[..] {
            let has_page = |number: u8| made.contains_key(&format!("man/knockq-{word}.{number}"));
            assert!(has_page(1) || has_page(8), "`man knockq-{word}` finds nothing");
        }
    }
}

#[test]
fn what_only_the_daemon_calls_is_in_no_page_and_no_completion() {
    let definition = knockq::cli::definition();
    let hidden: Vec<&Definition> = definition.get_subcommands().filter(|command| command.is_hide_set()).collect();
    assert!(!hidden.is_empty(), "this test no longer sees them");
    for (file, text) in made() {
        for command in &hidden {
            let (name, about) = (command.get_name(), command.get_about().unwrap().to_string());
            for trace in [about, format!("knockq {name}"), format!("knockq,{name}"), format!("-a \"{name}\"")] {
                assert!(!text.contains(&trace), "{file}: {trace}");
            }
        }
    }
}

/// The settings that a file may have, as whoever reads it says when he meets another one.
fn settings(errors: &str) -> BTreeSet<String> {
    let (_, expected) =
        errors.split_once("unknown field `unheard_of`, expected ").unwrap_or_else(|| panic!("{errors}"));
    expected.lines().next().unwrap().split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

#[test]
fn every_setting_that_the_code_knows_is_in_the_page_and_no_other() {
    let world = World::new();
    let made = made();
    let page = &made["man/knockq.toml.5"];
    let agree = |place: &str, prefix: &str, errors: &str| {
        let described = part(page, place, ".S");
        let known = settings(errors);
        assert!(known.len() > 2, "{known:?}");
        let terms = described.split(".TP\n\\fB").skip(1).map(|term| term.split('\\').next().unwrap());
        let terms: BTreeSet<&str> = terms.filter_map(|term| term.strip_prefix(prefix)).collect();
        for name in &known {
            // A table of tables has a line for each of their settings.
            let is_described = terms.iter().any(|term| term == name || term.starts_with(&format!("{name}.")));
            assert!(is_described, "{prefix}{name} is not in {place}");
        }
        let is_setting = |term: &&&str| !term.contains([' ', '.']);
        let unknown: Vec<_> = terms.iter().filter(is_setting).filter(|term| !known.contains(**term)).collect();
        assert!(unknown.is_empty(), "{place}: no code knows {unknown:?}");
    };
    let right = fs::read_to_string(world.config()).unwrap();
    for (section, place) in [("[server]", ".SS [server]"), ("[services.x]", ".SS [services.NAME]")] {
        fs::write(world.config(), format!("{section}\nunheard_of = 1\n")).unwrap();
        agree(place, "", &world.check().errors());
    }
    fs::write(world.config(), right).unwrap();
    fs::write(world.path("etc/users.d/alice.toml"), "unheard_of = 1\n").unwrap();
    agree(".SH USERS.D/NAME.TOML", "", &world.check().errors());
    for (section, prefix) in [("", ""), ("[services.x]", "services.NAME.")] {
        fs::write(world.path("alice.profile"), format!("{section}\nunheard_of = 1\n")).unwrap();
        let added = world.run(&["host", "add", "other", &world.text("alice.profile")]);
        agree(".SS \\(ti/.config/knockq/hosts/NAME.toml", prefix, &added.errors());
    }
    let whole = "unheard_of = 1\n[knockknock]\nkey_file = \"x\"\nknock_port = 1\ncounter = 1\n";
    for (text, prefix) in [(whole, ""), ("[knockknock]\nunheard_of = 1\n", "knockknock.")] {
        fs::write(world.path("alice.profile"), text).unwrap();
        let added = world.run(&["host", "add", "other", &world.text("alice.profile")]);
        agree(".SS \"A knockknock profile\"", prefix, &added.errors());
    }
}

#[test]
fn groff_sets_every_page_without_a_warning_and_every_alias_leads_to_one() {
    let made = made();
    for (name, text) in made.iter().filter(|(name, _)| name.starts_with("man/")) {
        if let Some(page) = text.strip_prefix(".so ") {
            let (_, page) = page.trim_end().split_once('/').unwrap(); // its place is below man1 or man8 once it is installed
            assert!(made.contains_key(&format!("man/{page}")), "{name}: {text}");
            continue;
        }
        let mut groff = Command::new("groff");
        groff.args(["-man", "-Tutf8", "-ww", "-z"]).arg(root().join("dist").join(name));
        let set = groff.output().unwrap_or_else(|error| panic!("groff: {error}\nHint: apt-get install groff-base"));
        assert!(set.status.success() && set.stderr.is_empty(), "{name}: {}", String::from_utf8_lossy(&set.stderr));
    }
}

/// What bash offers for the last of these words.
fn offered(words: &[&str]) -> Vec<String> {
    // As it calls the function that `complete -F` names: with the command, the word, and the word before it.
    const SCRIPT: &str = r#"
        set -e
        source "$1"
        shift
        [[ $(complete -p knockq) =~ -F\ ([a-z_]+) ]]
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
        "${BASH_REMATCH[1]}" "$1" "${@: -1}" "${@: -2:1}"
        printf '%s\n' "${COMPREPLY[@]}"
    "#;
    let file = root().join("dist/completions/knockq.bash");
    let ran = Command::new("bash").args(["-c", SCRIPT, "bash"]).arg(file).args(words).output().unwrap();
    assert!(ran.status.success() && ran.stderr.is_empty(), "{words:?}: {}", String::from_utf8_lossy(&ran.stderr));
    String::from_utf8(ran.stdout).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn bash_completes_commands_options_and_their_values() {
    assert_eq!(offered(&["knockq", "se"]), ["serve", "send"]);
    assert_eq!(offered(&["knockq", "send", "--wa"]), ["--wait"]);
    assert_eq!(offered(&["knockq", "send", "--print", ""]), ["hex"]);
    assert_eq!(offered(&["knockq", "user", "re"]), ["remove", "rename"]);
    for (words, command) in commands() {
        let typed = [&["knockq".to_owned()], &words[..], &[String::new()]].concat();
        let offered = offered(&typed.iter().map(String::as_str).collect::<Vec<_>>());
        let commands: Vec<&str> =
            command.get_subcommands().filter(|command| !command.is_hide_set()).map(Definition::get_name).collect();
        let is_command = |word: &&String| !word.starts_with(['-', '<', '[']);
        assert!(
            !command.has_subcommands() || offered.iter().filter(is_command).eq(&commands),
            "{typed:?}: {offered:?}"
        );
    }
}

#[test]
fn what_markdown_has_no_form_in_a_page_is_refused_by_name() {
    let a_test = "`a_test_has_a_long_name`";
    let refused = [
        ("<b>bold</b>", "<b>"),
        ("![a picture](a.png)", "Image"),
        ("> quoted", "BlockQuote"),
        ("```\nfenced\n```", "Fenced"),
        ("# one", "H1"),
        ("[far away](https://example.org)", "example.org"),
        ("- a\n  - b in a", "List"),
        ("-     code", "CodeBlock"),
        ("- a\n\n- b", "Paragraph"),
        ("it ends with\n1. And goes on.", "a sentence whose number"),
        ("---\n", "Rule"),
        (&format!("{a_test} shows it"), "stands in brackets"),
        ("| a | b |", "no head"),
        ("| a | b |\n|---|---|\n| | x |", "no name"),
    ];
    for (text, said) in refused {
        let error = markdown::to_roff(text, &mut Roff::new()).unwrap_err();
        assert!(error.contains(said), "{text}: {error}");
    }
}

#[test]
fn markdown_becomes_what_a_manual_page_has_for_it() {
    let set = |text: &str| {
        let mut page = Roff::new();
        markdown::to_roff(text, &mut page).unwrap();
        page.to_roff()
    };
    assert_eq!(
        set("## The key's file\n\n*One* `a-b`.\n.x"),
        ".SH \"THE KEY\\(aqS FILE\"\n.PP\n\\fIOne\\fR \\fBa\\-b\\fR.\n\\&.x\n"
    );
    assert_eq!(set("    a\n\n      .b\n"), ".PP\n.RS 4\n.EX\na\n\n  .b\n.EE\n.RE\n");
    assert_eq!(set("1. a\n2. b\n"), ".IP 1. 3\na\n.IP 2. 3\nb\n");
    assert_eq!(set("- a\n- b\n\nc"), ".IP \\(bu 3\na\n.IP \\(bu 3\nb\n.PP\nc\n");
    assert_eq!(set("It is so\n(`it_is_so_if_tested`, `and_it_is_so_again`). [So](so.md)."), ".PP\nIt is so. So.\n");
    let table = "| key | type | default |\n|---|---|---|\n| **server** | | |\n| `a` | b | |\n| `c` | d | e |\n";
    assert_eq!(set(table), ".PP\n\\fBserver\\fR\n.TP\n\\fBa\\fR\ntype: b\n.TP\n\\fBc\\fR\ntype: d\n.br\ndefault: e\n");
}
