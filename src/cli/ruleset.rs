//! `knockq ruleset`

use clap::Args;

use super::failure::Failure;
use super::{ConfigArg, print};
use crate::config::ServerConfig;
use crate::nft;

#[derive(Args)]
#[command(after_help = "Example:\n  knockq ruleset > /etc/knockq/knockq.nft")]
pub(super) struct PrintRuleset {
    #[command(flatten)]
    config: ConfigArg,
    /// Let nft and the kernel check it too, without applying it
    #[arg(long)]
    check: bool,
}

impl PrintRuleset {
    pub(super) fn run(self) -> Result<(), Failure> {
        let ruleset = ServerConfig::load(&self.config.config)?.ruleset();
        if self.check {
            nft::check(&ruleset.for_check())?;
        }
        print(&ruleset.to_string())
    }
}
