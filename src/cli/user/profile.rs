//! The profile that a user imports.

use std::collections::BTreeMap;

use crate::cli::failure::{CONFIGURATION, Failure};
use crate::cli::init::host_addresses;
use crate::client::host::{Key, Profile, ProfileService};
use crate::config::{Seconds, ServerConfig};
use crate::crypto::PublicKey;
use crate::service::Name;

/// What a user with this key imports. The first of the services is the one that is opened when none is named.
pub(super) fn profile(
    config: &ServerConfig,
    user: &Name,
    client: PublicKey,
    allowed: &[Name],
) -> Result<Profile, Failure> {
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
        let open_for = Some(Seconds(service.open_for));
        (service.name.clone(), ProfileService { selector, ports, open_for, once })
    });
    Ok(Profile {
        server_key: Key(*config.private_key.public()),
        client_key: Key(client),
        client_private_key: None,
        address,
        knock_ports: config.knock_ports.clone(),
        window: config.window,
        default: (allowed.len() > 1).then(|| allowed.first().cloned()).flatten(),
        source: None,
        services: services.collect::<BTreeMap<_, _>>(),
    })
}

/// As it is printed.
pub(super) fn without_secret(user: &Name, profile: &Profile) -> String {
    format!("# knockq profile of {user} (no secret in it)\n{}", profile.to_text())
}
