//! One manual page, as it grows out of the definitions and of Markdown.

use clap::Command;
use clap_mangen::Man;
use roff::{Inline, Roff, bold, roman};

use super::markdown::{self, code, heading, subheading};

/// Begins what the definitions say about a command, and picks its page.
pub const CLIENT: &str = "Client: ";
/// The same of the other half.
pub const SERVER: &str = "Server: ";

/// The text of a page.
pub struct Page(String);

impl Page {
    /// An empty page. Its words are not broken, for some are commands.
    pub fn new(title: &str, number: &str) -> Self {
        let version = concat!("knockq ", env!("CARGO_PKG_VERSION"));
        Self(Roff::new().control("TH", [title, number, "\"\"", version]).control("nh", []).render())
    }

    /// The names under which `man` and `whatis` find the page.
    pub fn name(&mut self, title: &str, commands: &[&Command], about: &str) {
        let mut names = vec![title.to_owned()];
        names.extend(commands.iter().map(|command| format!("knockq-{}", command.get_name())));
        names.dedup();
        self.heading("NAME");
        self.push(Roff::new().text([roman(format!("{} - {about}", names.join(", ")))]));
    }

    /// How the commands are called.
    pub fn synopsis(&mut self, commands: &[&Command]) {
        self.heading("SYNOPSIS");
        for command in commands {
            self.push(Roff::new().text([bold(usage(command))]).control("br", []));
        }
    }

    /// Appends a part.
    pub fn push(&mut self, roff: &Roff) {
        let text = roff.render();
        self.0.push_str(text.strip_prefix(Roff::new().render().as_str()).unwrap_or(&text));
    }

    /// Begins a section.
    pub fn heading(&mut self, title: &str) {
        let mut roff = Roff::new();
        heading(&mut roff, title);
        self.push(&roff);
    }

    /// Appends a section that is written in Markdown.
    pub fn prose(&mut self, title: &str, markdown: &str) -> Result<(), String> {
        self.heading(title);
        let mut roff = Roff::new();
        markdown::to_roff(markdown, &mut roff).map_err(|error| format!("{title}: {error}"))?;
        self.push(&roff);
        Ok(())
    }

    /// Appends a section with all there is to say about these commands.
    pub fn commands(&mut self, title: &str, commands: &[&Command]) -> Result<(), String> {
        self.heading(title);
        self.paragraph("Each has `--help`, which prints what stands here.")?;
        commands.iter().try_for_each(|command| self.command(command))
    }

    fn paragraph(&mut self, text: &str) -> Result<(), String> {
        self.push(Roff::new().control("PP", []).text(inlines(text)?));
        Ok(())
    }

    fn command(&mut self, command: &Command) -> Result<(), String> {
        let mut roff = Roff::new();
        subheading(&mut roff, command.get_bin_name().unwrap_or_default());
        self.push(roff.text([bold(usage(command))]));
        self.paragraph(&what_it_does(command))?;
        let more = command.get_long_about().map(ToString::to_string).unwrap_or_default();
        more.split("\n\n").skip(1).try_for_each(|paragraph| self.paragraph(paragraph))?;
        self.options(&without_help(command))?;
        self.after_help(command)?;
        command.get_subcommands().filter(|command| !command.is_hide_set()).try_for_each(|command| self.command(command))
    }

    /// As clap_mangen has them, without the heading, and with code in bold.
    pub fn options(&mut self, command: &Command) -> Result<(), String> {
        let mut text = Vec::new();
        Man::new(command.clone()).render_options_section(&mut text).map_err(|error| error.to_string())?;
        let text = String::from_utf8(text).map_err(|error| error.to_string())?;
        let (_, text) = text.split_once(".SH OPTIONS\n").unwrap_or_default();
        for line in text.lines() {
            let parts = code_spans(line)?;
            let marked = parts
                .iter()
                .map(|(part, is_code)| if *is_code { format!("\\fB{part}\\fR") } else { (*part).to_owned() });
            self.0.extend(marked.chain(["\n".to_owned()]));
        }
        Ok(())
    }

    /// Paragraphs, of which those with lines that are set in are examples.
    fn after_help(&mut self, command: &Command) -> Result<(), String> {
        let text =
            command.get_after_long_help().or(command.get_after_help()).map(ToString::to_string).unwrap_or_default();
        for paragraph in text.split("\n\n").filter(|paragraph| !paragraph.is_empty()) {
            match paragraph.split_once("\n  ") {
                Some((title, examples)) => {
                    self.paragraph(title)?;
                    let mut roff = Roff::new();
                    roff.control("RS", ["4"]).control("EX", []);
                    code(&mut roff, &examples.replace("\n  ", "\n"));
                    self.push(roff.control("EE", []).control("RE", []));
                }
                None => self.paragraph(paragraph)?,
            }
        }
        Ok(())
    }

    /// Ends the page's text with where to read on.
    pub fn see_also(&mut self, pages: &[&str]) {
        self.heading("SEE ALSO");
        let mut line: Vec<Inline> = Vec::new();
        for page in pages {
            let (name, number) = page.split_at(page.len() - "(1)".len());
            line.extend([roman(if line.is_empty() { "" } else { ", " }), bold(name), roman(number)]);
        }
        self.push(Roff::new().text(line).control("PP", []));
        self.push(Roff::new().text([roman("Names that end in .md are pages in the directory docs/ of its source.")]));
    }

    /// The page, with characters escaped that groff would show as others: paths and commands are to be copied.
    pub fn finish(self) -> String {
        let shown = |letter: char| match letter {
            '~' => "\\(ti".to_owned(),
            '^' => "\\(ha".to_owned(),
            '`' => "\\(ga".to_owned(),
            _ if letter.is_ascii() => letter.to_string(),
            _ => format!("\\[u{:04X}]", u32::from(letter)),
        };
        self.0.chars().map(shown).collect()
    }
}

/// What the definitions say about a command.
pub fn about(command: &Command) -> String {
    command.get_about().map(ToString::to_string).unwrap_or_default()
}

/// The same as a sentence, without the half that it belongs to.
pub fn what_it_does(command: &Command) -> String {
    let about = about(command);
    let about = about.strip_prefix(CLIENT).or(about.strip_prefix(SERVER)).unwrap_or(&about);
    let mut letters = about.chars();
    letters.next().map_or(String::new(), |first| format!("{}{}.", first.to_uppercase(), letters.as_str()))
}

/// As `--help` has it.
fn usage(command: &Command) -> String {
    let usage = without_help(command).render_usage().to_string();
    usage.trim_start_matches("Usage: ").to_owned()
}

/// Every command has `--help`; a page need not say so with each.
fn without_help(command: &Command) -> Command {
    command.clone().mut_args(|arg| if arg.get_id() == "help" { arg.hide(true) } else { arg })
}

/// The words of the definitions, with code in bold.
pub fn inlines(text: &str) -> Result<Vec<Inline>, String> {
    Ok(code_spans(text)?.into_iter().map(|(part, is_code)| if is_code { bold(part) } else { roman(part) }).collect())
}

/// What stands between backticks, and what does not.
fn code_spans(text: &str) -> Result<Vec<(&str, bool)>, String> {
    let parts: Vec<&str> = text.split('`').collect();
    if parts.len().is_multiple_of(2) {
        return Err(format!("a backtick has no partner: {text}"));
    }
    Ok(parts.into_iter().zip([false, true].into_iter().cycle()).filter(|(part, _)| !part.is_empty()).collect())
}
