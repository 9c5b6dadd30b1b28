//! `knockq serve`, and the two commands that it starts itself with.

use clap::Args;

use super::ConfigArg;
use super::failure::Failure;
use crate::serve::log::{self, Style};
use crate::serve::{keeper, monitor, verifier};

#[derive(Args)]
#[command(after_help = "Example:\n  knockq serve --config /etc/knockq/knockq.toml\n\n\
                        SIGTERM stops it; doors that are open keep the time that they have left, and the gate stays shut.")]
pub(super) struct Serve {
    #[command(flatten)]
    config: ConfigArg,
    /// Log every packet (never a token)
    #[arg(long)]
    debug: bool,
}

impl Serve {
    pub(super) fn run(self) -> Result<(), Failure> {
        Ok(keeper::run(&self.config.config, Style::of_environment(self.debug))?)
    }
}

#[derive(Args)]
pub(super) struct Child {
    #[arg(long)]
    priorities: bool,
    #[arg(long)]
    debug: bool,
}

impl Child {
    pub(super) fn run_monitor(self) -> Result<(), Failure> {
        log::start("monitor", self.style());
        Ok(monitor::run()?)
    }

    pub(super) fn run_verifier(self) -> Result<(), Failure> {
        log::start("verifier", self.style());
        Ok(verifier::run()?)
    }

    const fn style(&self) -> Style {
        Style { priorities: self.priorities, debug: self.debug }
    }
}
