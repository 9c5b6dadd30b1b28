//! `knockq ruleset`

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;

use super::failure::{CONFIGURATION, Failure};
use super::{ConfigArg, print};
use crate::config::ServerConfig;
use crate::config::secure_file::{self, Privacy};
use crate::nft::{self, Boot, Comment, Doors, Element, ElementError, Kernel, Lister, Open, SetName};

#[derive(Args)]
#[command(
    after_help = "Examples:\n  knockq ruleset --output /etc/knockq/knockq.nft\n  knockq ruleset --load   # what the boot does\n\n\
                        `serve` keeps what it loaded last in knockq.nft, beside the configuration."
)]
pub(super) struct PrintRuleset {
    #[command(flatten)]
    config: ConfigArg,
    /// Let nft and the kernel check it too, without applying it
    #[arg(long)]
    check: bool,
    /// Put it into this file, at once and whole, instead of printing it
    #[arg(long, value_name = "FILE", conflicts_with = "load")]
    output: Option<PathBuf>,
    /// Load knockq.nft, the ruleset that `serve` loaded last: the gate then stands, whatever the configuration is like now
    #[arg(long, conflicts_with = "check")]
    load: bool,
}

impl PrintRuleset {
    pub(super) fn run(self) -> Result<(), Failure> {
        if self.load {
            let include_file = self.config.config.with_file_name("knockq.nft");
            let ruleset = secure_file::read(&include_file, Privacy::Public)
                .map_err(|error| Failure::from(error).or_hint("`knockq serve` makes it; `knockq ruleset` prints it"))?;
            if !nft::is_whole(&ruleset) {
                let message = format!("{}: is not whole, so it would let all in", include_file.display());
                return Err(Failure::new(message).hint("`knockq serve` makes it anew").code(CONFIGURATION));
            }
            nft::install(&ruleset)?;
            return shut_what_is_over(nft::is_of_before(&ruleset), &self.config.config);
        }
        let ruleset = ServerConfig::load(&self.config.config)?.ruleset();
        if self.check {
            nft::check(&ruleset.for_check())?;
        }
        match self.output {
            Some(path) => Ok(secure_file::replace(&path, &ruleset.to_string(), Privacy::Public)?),
            None => print(&ruleset.to_string()),
        }
    }
}

/// Shuts doors that others have loaded, when their grants are over. Whoever saved the host's tables while doors were open has
/// them loaded by each boot.
fn shut_what_is_over(old_count: bool, config: &Path) -> Result<(), Failure> {
    let boot = Boot::this().map_err(|error| Failure::new(format!("this boot's name and clock: {error}")))?;
    let mut doors = Doors::new()?;
    let is_over = |comment: Option<Comment>, left: Option<Duration>| {
        comment.is_some_and(|comment| comment.counts_until(left, old_count, &boot, Instant::now()).is_none())
    };
    let open = match Kernel::default().open_doors() {
        Err(ElementError::NoSet) if old_count => return Ok(()), // knockq 0.1.0 had fewer sets, and doors that count
        listed => listed?,
    };
    for Open { what: door, comment, left } in open {
        if is_over(comment, left) {
            doors.close_all([&door])?;
        }
    }
    // The gate stands, whatever the configuration is like.
    let users = ServerConfig::load(config).map(|config| config.users).unwrap_or_default();
    let sets: BTreeSet<&SetName> = users.iter().flat_map(|user| &user.add_to).collect();
    for set in sets {
        for Open { what: member, comment, left } in Kernel::default().members(set).unwrap_or_default() {
            if is_over(comment, left) {
                doors.change([&(Element::Member(member), None)])?;
            }
        }
    }
    Ok(())
}
