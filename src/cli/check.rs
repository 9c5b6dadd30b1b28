//! `knockq check`

use std::env;
use std::net::IpAddr;

use clap::Args;

use super::doctor::Host;
use super::failure::Failure;
use super::inspect::{Trust, check_store, unseen_sets, warn_of_ephemeral_ports};
use super::{ConfigArg, note, print};
use crate::config::ServerConfig;
use crate::nft::{self, Kernel, NftError};
use crate::serve::configuration::accounts;

#[derive(Args)]
#[command(after_help = "Example:\n  knockq check --config /etc/knockq/knockq.toml")]
pub(super) struct Check {
    #[command(flatten)]
    config: ConfigArg,
}

impl Check {
    pub(super) fn run(self) -> Result<(), Failure> {
        let path = self.config.config;
        let config = ServerConfig::load(&path)?;
        config.registry()?;
        let (_, missing) = accounts(&config)?;
        for account in missing {
            note(&format!("warning: there is no user `{account}`, so a user id that nobody has stands in for it"));
        }
        match check_store(&config)? {
            Trust::Whole => {}
            Trust::Shut(said) | Trust::Suspicion(said) | Trust::Unknown(said) => note(&format!("warning: {said}")),
        }
        warn_of_ephemeral_ports(&config);
        warn_of_cuts(&config);
        warn_of_what_is_beyond(&config);
        for set in unseen_sets(&config)? {
            note(&format!("warning: only root can see whether set {set} is there"));
        }
        let (services, users) = (config.services.len(), config.users.len());
        let knock_ports = config.all_knock_ports().iter().count();
        print(&format!(
            "{}: ok (services {services}, users {users}, knock ports {knock_ports})\nserver key fingerprint: {}\n",
            path.display(),
            config.private_key.public().fingerprint()
        ))
    }
}

/// Who would be cut off by the gate of this configuration, and whoever looks at it above all.
fn warn_of_cuts(config: &ServerConfig) {
    const TOLD: usize = 8;
    let ruleset = config.ruleset();
    let own = env::var("SSH_CONNECTION").unwrap_or_default();
    let own: Option<IpAddr> = own.split(' ').next().and_then(|source| source.parse().ok());
    let connected = nft::connected(&ruleset.kill, &ruleset.trusted, nft::established());
    let cut = nft::without_door(connected, &mut Kernel::default());
    let (yours, others): (Vec<_>, Vec<_>) = cut.into_iter().partition(|(source, _)| Some(*source) == own);
    for (source, port) in yours.iter().chain(&others).take(TOLD) {
        let who = if Some(*source) == own { "you are" } else { "is" };
        note(&format!(
            "warning: {source} {who} connected to {port} without a door, and would be cut: on_close = \"kill\""
        ));
    }
}

/// What the gate cannot guard on this host.
fn warn_of_what_is_beyond(config: &ServerConfig) {
    match Host::look() {
        Ok(host) => {
            for (said, hint) in host.warnings(config) {
                note(&format!("warning: {said}\nHint: {hint}"));
            }
        }
        Err(NftError::NotPermitted(_)) => note("warning: only root can see what of this host the gate cannot guard"),
        Err(error) => note(&format!("warning: what the gate cannot guard is not known: {error}")),
    }
}
