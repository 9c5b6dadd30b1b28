//! The Markdown of docs/ as roff for manual pages. A table becomes a list of what its first column names, for a table of five
//! columns fits no terminal. What has no form here yet is an error, so that nothing is lost unseen.

use std::mem;

use pulldown_cmark::{CodeBlockKind, Event, HeadingLevel, Options, Parser, Tag, TagEnd};
use roff::{Inline, Roff, bold, italic, roman};

/// Appends the text to a page.
///
/// # Errors
/// The first thing that has no form in a manual page.
pub fn to_roff(markdown: &str, page: &mut Roff) -> Result<(), String> {
    let text = without_tests(markdown);
    let mut writer = Writer::new(page);
    for event in Parser::new_ext(&text, Options::ENABLE_TABLES) {
        writer.event(event)?;
    }
    Ok(())
}

/// What is under a heading, to the next heading of its level or a higher one, or to the next one at all.
///
/// # Errors
/// If there is no such heading.
pub fn section<'a>(markdown: &'a str, heading: &str, with_subsections: bool) -> Result<&'a str, String> {
    let marks = |line: &str| line.bytes().take_while(|&byte| byte == b'#').count();
    let level = marks(heading);
    let ends = |line: &str| marks(line) > 0 && (!with_subsections || marks(line) <= level);
    let size = |line: &str| line.len();
    let above = markdown.split_inclusive('\n').take_while(|line| line.trim_end() != heading).map(size).sum();
    let (_, rest) = markdown[above..]
        .split_once('\n')
        .ok_or_else(|| format!("there is no heading `{heading}`: name the new one in examples/manual/pages.rs"))?;
    Ok(&rest[..rest.split_inclusive('\n').take_while(|line| !ends(line)).map(size).sum()])
}

/// Readers of a manual page have no tests, so their names go, and the brackets around them.
fn without_tests(markdown: &str) -> String {
    let mut kept = String::new();
    let mut rest = markdown;
    while let Some((before, bracket)) = rest.split_once('(') {
        let (inside, after) = bracket.split_once(')').unwrap_or((bracket, ""));
        if inside.split(',').all(|name| is_test(name.trim())) {
            kept.push_str(before.trim_end_matches([' ', '\n']));
            // A paragraph of its own, then: what follows must remain one.
            if before.ends_with("\n\n") {
                kept.push_str("\n\n");
            }
            rest = after;
        } else {
            kept.push_str(before);
            kept.push('(');
            rest = bracket;
        }
    }
    kept + rest
}

/// A sentence about behaviour, as code.
fn is_test(text: &str) -> bool {
    let is_word = |word: &str| word.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    let name = text.strip_prefix('`').and_then(|text| text.strip_suffix('`')).unwrap_or_default();
    name.split('_').count() > 4 && name.split('_').all(is_word)
}

struct Writer<'a> {
    page: &'a mut Roff,
    line: Vec<Inline>,
    font: fn(String) -> Inline,
    /// In a list, the number of its next item, if it has numbers.
    list: Option<Option<u64>>,
    /// The words above a table's columns.
    head: Vec<Vec<Inline>>,
    cells: Vec<Vec<Inline>>,
}

impl<'a> Writer<'a> {
    fn new(page: &'a mut Roff) -> Self {
        Self { page, line: Vec::new(), font: roman, list: None, head: Vec::new(), cells: Vec::new() }
    }

    fn event(&mut self, event: Event<'_>) -> Result<(), String> {
        match event {
            Event::Start(tag) => self.start(tag)?,
            Event::End(tag) => self.end(tag)?,
            Event::Text(text) if self.line.is_empty() && text.starts_with('|') => {
                return Err(format!("a row of a table that has no head: {text}"));
            }
            Event::Text(text) => self.line.push((self.font)(text.into_string())),
            Event::Code(text) if is_test(&format!("`{text}`")) => {
                return Err(format!("`{text}` is a test, so it stands in brackets with no other words"));
            }
            Event::Code(text) => self.line.push(bold(text.trim())),
            Event::SoftBreak => self.flush(),
            other => return Err(unknown(&other)),
        }
        Ok(())
    }

    fn start(&mut self, tag: Tag<'_>) -> Result<(), String> {
        match tag {
            Tag::Paragraph if self.list.is_none() => control(self.page, "PP"),
            Tag::Heading { level: HeadingLevel::H2 | HeadingLevel::H3, .. } => {}
            Tag::Table(_) if self.list.is_none() => {}
            Tag::CodeBlock(CodeBlockKind::Indented) if self.list.is_none() => {
                self.page.control("PP", []).control("RS", ["4"]).control("EX", []);
            }
            Tag::List(first) if self.list.is_none() => self.list = Some(first),
            Tag::Item => {
                let number = self.list.as_mut().and_then(Option::as_mut);
                let mark = number.map_or("\\(bu".to_owned(), |number| {
                    *number += 1;
                    format!("{}.", *number - 1)
                });
                self.page.control("IP", [mark.as_str(), "3"]);
            }
            Tag::Emphasis => self.font = italic,
            Tag::Strong => self.font = bold,
            Tag::Link { ref dest_url, .. } if !dest_url.contains("://") => {} // to another page: its name will do
            Tag::TableHead | Tag::TableRow | Tag::TableCell => {}
            other => return Err(unknown(&other)),
        }
        Ok(())
    }

    fn end(&mut self, tag: TagEnd) -> Result<(), String> {
        match tag {
            TagEnd::Heading(level) => {
                let title: String = mem::take(&mut self.line).iter().map(words).collect();
                if level == HeadingLevel::H2 { heading(self.page, &title) } else { subheading(self.page, &title) }
            }
            TagEnd::CodeBlock => {
                code(self.page, mem::take(&mut self.line).iter().map(words).collect::<String>().trim_end());
                self.page.control("EE", []).control("RE", []);
            }
            TagEnd::Paragraph | TagEnd::Item => self.flush(),
            TagEnd::List(_) if self.list.take() == Some(Some(2)) => {
                return Err("a list of one item: is it a sentence whose number began a line?".to_owned());
            }
            TagEnd::Emphasis | TagEnd::Strong => self.font = roman,
            TagEnd::TableCell => self.cells.push(mem::take(&mut self.line)),
            TagEnd::TableHead => self.head = mem::take(&mut self.cells),
            TagEnd::TableRow => return self.row(),
            _ => {} // what began was known
        }
        Ok(())
    }

    fn flush(&mut self) {
        let line = mem::take(&mut self.line);
        if !line.is_empty() {
            self.page.text(line);
        }
    }

    /// What the first cell names, then the other cells, each after the word above its column if there are several.
    fn row(&mut self) -> Result<(), String> {
        let cells = mem::take(&mut self.cells);
        let [name, facts @ ..] = &cells[..] else { return Err("a table's row is empty".to_owned()) };
        let facts: Vec<_> = self.head.iter().skip(1).zip(facts).filter(|(_, fact)| !fact.is_empty()).collect();
        if name.is_empty() {
            return Err("a table's row has no name in its first cell".to_owned());
        }
        control(self.page, if facts.is_empty() { "PP" } else { "TP" });
        self.page.text(name.clone());
        for (place, (title, fact)) in facts.into_iter().enumerate() {
            if place > 0 {
                control(self.page, "br");
            }
            let title: String = title.iter().map(words).collect();
            let label = if self.head.len() > 2 && !title.is_empty() { format!("{title}: ") } else { String::new() };
            self.page.text([&[roman(label)], &fact[..]].concat());
        }
        Ok(())
    }
}

fn control(page: &mut Roff, name: &str) {
    page.control(name, []);
}

/// A heading of a page: in capitals, as everywhere in the manual.
pub fn heading(page: &mut Roff, title: &str) {
    page.control("SH", [title.to_uppercase().replace('\'', "\\(aq").as_str()]);
}

/// A heading below one.
pub fn subheading(page: &mut Roff, title: &str) {
    page.control("SS", [title.replace('\'', "\\(aq").as_str()]);
}

/// Lines as they are, after `EX`.
pub fn code(page: &mut Roff, text: &str) {
    for line in text.lines() {
        page.text([roman(line)]);
    }
}

fn words(inline: &Inline) -> &str {
    match inline {
        Inline::Roman(text) | Inline::Bold(text) | Inline::Italic(text) => text,
        Inline::LineBreak => " ",
    }
}

fn unknown(what: &impl std::fmt::Debug) -> String {
    format!("examples/manual/markdown.rs knows no form for this in a manual page: {what:?}")
}
