//! What is under dist/man and dist/completions: made from the command line's definitions (`src/cli`) and from docs/, so that
//! nothing is written twice.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use clap::Command;
use clap_complete::Shell;
use roff::{Roff, bold, roman};

use super::markdown::section;
use super::page::{CLIENT, Page, SERVER, about, inlines, what_it_does};

/// Below dist/, these hold what is made here and nothing else.
pub const DIRECTORIES: [&str; 2] = ["man", "completions"];

/// Every file and its text, by its path below dist/.
///
/// # Errors
/// What in docs/ or in the definitions has no form in a manual page, or is not where it was.
pub fn files(root: &Path) -> Result<BTreeMap<String, String>, String> {
    let read = |name: &str| fs::read_to_string(root.join(name)).map_err(|error| format!("{name}: {error}"));
    let docs = Docs {
        readme: read("README.md")?,
        configuration: read("docs/configuration.md")?,
        architecture: read("docs/architecture.md")?,
    };
    let knockq = visible()?;
    let mut files = BTreeMap::from([
        ("man/knockq.1".to_owned(), client_page(&knockq, &docs)?),
        ("man/knockq-serve.8".to_owned(), server_page(&knockq, &docs)?),
        ("man/knockq.toml.5".to_owned(), configuration_page(&docs)?),
    ]);
    // What people type: `man knockq-send`.
    for (half, page) in [(CLIENT, "knockq.1"), (SERVER, "knockq-serve.8")] {
        let (_, number) = page.split_at(page.len() - 1);
        for command in half_of(&knockq, half) {
            let name = format!("man/knockq-{}.{number}", command.get_name());
            files.entry(name).or_insert_with(|| format!(".so man{number}/{page}\n"));
        }
    }
    for (name, shell) in [("knockq.bash", Shell::Bash), ("_knockq", Shell::Zsh), ("knockq.fish", Shell::Fish)] {
        let mut text = Vec::new();
        clap_complete::generate(shell, &mut knockq.clone(), "knockq", &mut text);
        files.insert(format!("completions/{name}"), String::from_utf8(text).map_err(|error| error.to_string())?);
    }
    Ok(files)
}

struct Docs {
    readme: String,
    configuration: String,
    architecture: String,
}

/// The commands without the hidden ones, which clap_complete would show.
fn visible() -> Result<Command, String> {
    let all = knockq::cli::definition();
    let shown = all.get_subcommands().filter(|command| !command.is_hide_set());
    let mut knockq = Command::new("knockq")
        .version(env!("CARGO_PKG_VERSION"))
        .about(all.get_about().cloned().unwrap_or_default())
        .disable_help_subcommand(true)
        .subcommand_required(all.is_subcommand_required_set())
        .args(all.get_arguments())
        .subcommands(shown);
    knockq.build();
    let is_of_a_half = |command: &&Command| [CLIENT, SERVER].iter().any(|half| about(command).starts_with(half));
    if let Some(command) = knockq.get_subcommands().find(|command| !is_of_a_half(command)) {
        return Err(format!("knockq {}: is neither `{CLIENT}...` nor `{SERVER}...`", command.get_name()));
    }
    Ok(knockq)
}

fn half_of<'a>(knockq: &'a Command, half: &'a str) -> impl Iterator<Item = &'a Command> {
    knockq.get_subcommands().filter(move |command| about(command).starts_with(half))
}

fn client_page(knockq: &Command, docs: &Docs) -> Result<String, String> {
    let mut page = Page::new("knockq", "1");
    let commands: Vec<&Command> = half_of(knockq, CLIENT).collect();
    page.name("knockq", &commands, &about(knockq));
    page.synopsis(&commands);
    page.prose("DESCRIPTION", section(&docs.readme, "# knockq", false)?)?;
    page.commands("COMMANDS", &commands)?;
    page.heading("COMMANDS OF THE SERVER");
    for command in half_of(knockq, SERVER) {
        page.push(
            Roff::new().control("TP", []).text([bold(command.get_name())]).text(inlines(&what_it_does(command))?),
        );
    }
    page.push(Roff::new().control("PP", []).text([bold("knockq-serve"), roman("(8) describes them.")]));
    page.heading("OPTIONS");
    page.options(knockq)?;
    page.prose("FILES", section(&docs.configuration, "## Files", false)?)?;
    page.prose("EXIT STATUS", section(&docs.configuration, "## Exit codes", true)?)?;
    page.prose("EXAMPLES", &rows(section(&docs.readme, "## On a real server", false)?, |_| true)?)?;
    page.see_also(&["knockq-serve(8)", "knockq.toml(5)"]);
    Ok(page.finish())
}

/// The sections of docs/configuration.md that whoever looks after a server may need when there is no network to read it over.
const OPERATION: [&str; 7] = [
    "Before you shut the door",
    "Locked out",
    "When the daemon stops by itself",
    "Ending connections",
    "The table and your nftables.conf",
    "The counter store",
    "Installed",
];

fn server_page(knockq: &Command, docs: &Docs) -> Result<String, String> {
    let mut page = Page::new("knockq-serve", "8");
    let mut commands: Vec<&Command> = half_of(knockq, SERVER).collect();
    commands.sort_by_key(|command| command.get_name() != "serve"); // it gives the page its name
    page.name("knockq-serve", &commands, "the commands of a server that knockq hides");
    page.synopsis(&commands);
    page.prose(
        "DESCRIPTION",
        "The server's half of `knockq`, for root. What a knock is, and the client's half: knockq(1).",
    )?;
    page.commands("COMMANDS", &commands)?;
    let failures = section(&docs.architecture, "## When something fails", true)?;
    page.prose("SIGNALS", &rows(failures, |row| row.starts_with("| SIG"))?)?;
    page.prose("FILES", section(&docs.configuration, "## Files", false)?)?;
    for title in OPERATION {
        page.prose(title, section(&docs.configuration, &format!("## {title}"), true)?)?;
    }
    page.prose("EXIT STATUS", section(&docs.configuration, "## Exit codes", true)?)?;
    page.see_also(&["knockq(1)", "knockq.toml(5)", "nft(8)", "systemctl(1)"]);
    Ok(page.finish())
}

/// The table of a section, with those of its rows that are wanted.
fn rows(section: &str, are_wanted: impl Fn(&str) -> bool) -> Result<String, String> {
    let table: Vec<&str> = section.lines().filter(|line| line.starts_with('|')).collect();
    let rows: Vec<&str> = table.iter().skip(2).copied().filter(|row| are_wanted(row)).collect();
    match (table.get(..2), rows.is_empty()) {
        (Some(head), false) => Ok([head, &rows[..]].concat().join("\n")),
        _ => Err(format!("where is its table? {section}")),
    }
}

/// The other sections of docs/configuration.md.
const SETTINGS: [&str; 4] = ["knockq.toml", "users.d/NAME.toml", "The client's files", "Not built yet"];

fn configuration_page(docs: &Docs) -> Result<String, String> {
    let text = &docs.configuration;
    let told = || text.lines().filter_map(|line| line.strip_prefix("## "));
    let known = |title: &str| {
        ["Files", "Exit codes"].contains(&title) || OPERATION.contains(&title) || SETTINGS.contains(&title)
    };
    if let Some(title) = told().find(|title| !known(title)) {
        return Err(format!("docs/configuration.md: `{title}` is on no page: name it in examples/manual/pages.rs"));
    }
    let mut page = Page::new("knockq.toml", "5");
    page.name("knockq.toml", &[], "configuration of knockq: the server, its services, its users, and a client's files");
    // The first paragraph is about the file that this is made from.
    let (_, introduction) =
        section(text, "# Configuration", false)?.trim().split_once("\n\n").ok_or("no introduction")?;
    page.prose("DESCRIPTION", introduction)?;
    for title in SETTINGS {
        page.prose(title, section(text, &format!("## {title}"), true)?)?;
    }
    page.prose("FILES", section(text, "## Files", true)?)?;
    page.see_also(&["knockq(1)", "knockq-serve(8)"]);
    Ok(page.finish())
}
