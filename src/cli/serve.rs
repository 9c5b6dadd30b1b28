//! `knockq serve`, and the commands that the daemon starts this binary with.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use tracing::warn;

use super::ConfigArg;
use super::doctor::Host;
use super::failure::Failure;
use crate::config::Seconds;
use crate::serve::log::{self, Style};
use crate::serve::{configuration, engine, start};

#[derive(Args)]
#[command(after_help = "Examples:\n  knockq serve --config /etc/knockq/knockq.toml\n  \
                        knockq serve --try 10m      # and `knockq confirm` once a knock has worked\n\n\
                        SIGHUP reads the configuration again. SIGTERM stops the daemon; doors that are open keep the time \
                        that they have left, and the gate stays shut, unless it is on trial.")]
pub(super) struct Serve {
    #[command(flatten)]
    config: ConfigArg,
    /// Take the gate away after this time, unless `knockq confirm` was run
    #[arg(long = "try", value_name = "TIME")]
    trial: Option<Seconds>,
    /// Log every packet (never a token)
    #[arg(long)]
    debug: bool,
}

impl Serve {
    pub(super) fn run(self) -> Result<(), Failure> {
        let trial = self.trial.map(|time| Duration::from_secs(time.0.into()));
        match start::become_root(&self.config.config, trial, self.style()) {
            Err(error) => Err(error.into()),
        }
    }

    pub(super) fn style(&self) -> Style {
        Style::of_environment(self.debug)
    }
}

#[derive(Args)]
pub(super) struct Child {
    #[arg(long)]
    priorities: bool,
    #[arg(long)]
    debug: bool,
}

#[derive(Args)]
pub(super) struct Engine {
    #[arg(long)]
    trial: Option<u64>,
    #[command(flatten)]
    child: Child,
}

#[derive(Args)]
pub(super) struct Keep {
    #[arg(long)]
    output: PathBuf,
}

impl Keep {
    pub(super) fn run(self) -> Result<(), Failure> {
        Ok(configuration::keep(&self.output)?)
    }
}

#[derive(Args)]
pub(super) struct Configuration {
    #[command(flatten)]
    config: ConfigArg,
    /// The gate is on trial
    #[arg(long)]
    trial: bool,
    #[command(flatten)]
    child: Child,
}

impl Configuration {
    pub(super) fn run(self) -> Result<(), Failure> {
        log::start("knockq", self.style());
        let host = Host::look(); // with a privilege that goes before any file is opened
        Ok(configuration::run(&self.config.config, self.trial, |config| match &host {
            Ok(host) => host.warnings(config).iter().for_each(|(said, hint)| warn!(hint, "{said}")),
            Err(error) => warn!("what the gate cannot guard on this host is not known: {error}"),
        })?)
    }

    pub(super) const fn style(&self) -> Style {
        self.child.style()
    }
}

impl Engine {
    pub(super) fn run(self) -> Result<(), Failure> {
        log::start("engine", self.style());
        log::end_on_panic();
        Ok(engine::run(self.trial)?)
    }

    pub(super) const fn style(&self) -> Style {
        self.child.style()
    }
}

impl Child {
    const fn style(&self) -> Style {
        Style { priorities: self.priorities, debug: self.debug }
    }
}
