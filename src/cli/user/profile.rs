//! The profile that a user imports.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::cli::failure::{CONFIGURATION, Failure};
use crate::cli::init::host_addresses;
use crate::client::host::{Key, ProfileService, TokenProfile};
use crate::config::{Seconds, ServerConfig, open_for};
use crate::crypto::PublicKey;
use crate::service::Name;

/// Whom a profile is for.
pub(super) struct Holder<'a> {
    pub(super) name: &'a Name,
    pub(super) key: PublicKey,
    /// The first of them is the one that is opened when none is named.
    pub(super) allowed: &'a [Name],
    /// For how long a knock opens a service at most.
    pub(super) open_for: Option<Seconds>,
    /// They need a pre-shared key too.
    pub(super) is_preshared: bool,
}

/// What a user imports.
pub(super) fn profile(config: &ServerConfig, holder: &Holder<'_>) -> Result<TokenProfile, Failure> {
    let Holder { name: user, key, allowed, open_for: cap, is_preshared } = *holder;
    if allowed.is_empty() {
        return Err(Failure::new(format!("user {user}: may open no service, so no client takes the profile"))
            .hint("put one into `services` of the user's file")
            .code(CONFIGURATION));
    }
    let address = if config.addresses.is_empty() { host_addresses() } else { config.addresses.clone() };
    if address.is_empty() {
        return Err(Failure::new("this host has no address that a client could use".to_owned())
            .hint("set `address = [\"server.example.org\"]` in [server]")
            .code(CONFIGURATION));
    }
    let services = config.services.iter().filter(|service| allowed.contains(&service.name)).map(|service| {
        let (selector, ports, once) = (service.selector, service.ports.clone(), service.once);
        let open_for = Some(Seconds(open_for(service.open_for, cap.map(|cap| cap.0), None, 0)));
        (service.name.clone(), ProfileService { selector, ports, open_for, once })
    });
    Ok(TokenProfile {
        server_key: Key(*config.private_key.public()),
        client_key: Key(key),
        client_private_key: None,
        address,
        knock_ports: config.knock_ports.clone(),
        window: config.window,
        default: (allowed.len() > 1).then(|| allowed.first().cloned()).flatten(),
        source: None,
        psk_file: is_preshared.then(|| brought_as(user)),
        services: services.collect::<BTreeMap<_, _>>(),
    })
}

/// The file of the user's pre-shared key on their machine, beside their own key.
pub(super) fn brought_as(user: &Name) -> PathBuf {
    PathBuf::from(format!("{user}.psk"))
}

/// As it is printed.
pub(super) fn without_secret(user: &Name, profile: &TokenProfile) -> String {
    format!("# knockq profile of {user} (no secret in it)\n{}", profile.to_text())
}
