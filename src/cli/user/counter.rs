//! `knockq user counter`

use std::ops::Range;

use clap::Args;
use serde::Deserialize;
use toml::Spanned;

use super::{all_counted, apply, entry_path, missing};
use crate::cli::failure::{Failure, USAGE};
use crate::cli::{ConfigArg, print};
use crate::config::secure_file::{self, Privacy};
use crate::config::{Diagnostic, Moment};
use crate::service::Name;

#[derive(Args)]
#[command(after_help = "Example:\n  knockq user counter alice 42\n\n\
                        For a user with a knockknock profile whose client has come more than 20 knocks ahead, or whose count \
                        the counter store has lost. `knockq explain` says the number. What was taken stays taken: a number \
                        below the next one changes nothing.")]
pub(super) struct Counter {
    /// The user's name
    name: Name,
    /// The number of the client's next knock
    number: u32,
    #[command(flatten)]
    config: ConfigArg,
}

/// What is changed, by its place.
#[derive(Deserialize)]
struct File {
    knockknock: Option<Table>,
}

#[derive(Deserialize)]
struct Table {
    counter: Spanned<u32>,
    as_of: Spanned<Moment>,
}

impl Counter {
    pub(super) fn run(self) -> Result<(), Failure> {
        let (name, number, config) = (self.name, self.number, self.config.config);
        let path = entry_path(&config, &name);
        let text = secure_file::read_if_there(&path, Privacy::Public)?.ok_or_else(|| missing(&name, &config))?;
        let file: File = toml::from_str(&text).map_err(|error| Diagnostic::of_toml(&path, &text, &error))?;
        let table = file.knockknock.ok_or_else(|| {
            Failure::new(format!("user {name}: has no knockknock profile, so its counter is the clock"))
                .hint("see what is wrong with a knock, with `knockq explain`")
                .code(USAGE)
        })?;
        let as_of = Moment::after(all_counted(&config).into_iter().chain([*table.as_of.get_ref()]));
        let changes = [(table.counter.span(), number.to_string()), (table.as_of.span(), format!("\"{as_of}\""))];
        secure_file::replace(&path, &changed(&text, changes), Privacy::Public)?;
        print(&format!("User {name}: the next knock is number {number}, unless a later one was taken already\n"))?;
        apply(&config)
    }
}

/// The text with something else in these places.
fn changed(text: &str, mut changes: [(Range<usize>, String); 2]) -> String {
    changes.sort_by_key(|(place, _)| place.start);
    let mut changed = text.to_owned();
    for (place, to) in changes.into_iter().rev() {
        changed.replace_range(place, &to);
    }
    changed
}
