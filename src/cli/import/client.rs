//! A client's profile of knockknock becomes a host.

use std::collections::BTreeMap;

use super::original::Original;
use super::warn;
use crate::cli::failure::Failure;
use crate::cli::{note, print};
use crate::client::host::ProfileService;
use crate::client::{Home, KnockknockProfile, KnockknockTerms, Profile};
use crate::service::{HostAddress, Name, Port, Transport};

/// Takes over the profile of one host. One that is there with the same keys is left as it is.
///
/// # Errors
/// What of it is wrong, or in the way; nothing is written then.
pub(super) fn take(original: &Original, address: Vec<HostAddress>, services: &[(Name, u16)]) -> Result<(), Failure> {
    let Original { name, keys, counter, knock_port, .. } = original;
    let home = Home::of_environment()?;
    if is_there(original, &home) {
        return print(&format!("host {name}: has these keys already: left as it is\n"));
    }
    let profile = profile(original, address, services);
    profile.add(&home, name, keys)?;
    let listed: Vec<String> = services.iter().map(|(service, port)| format!("{service} (tcp/{port})")).collect();
    let at: Vec<&str> = profile.address.iter().map(HostAddress::as_str).collect();
    print(&format!(
        "host {name}: {}, for {}, knock port {knock_port}, next counter {counter}\n",
        at.join(", "),
        listed.join(", ")
    ))?;
    note(&format!("Knock with `knockq send {name}`, and no more with knockknock: the count is kept here from now on."));
    warn("Leave it when the server has knockq: ask its administrator for a profile, made by `knockq user invite`.");
    Ok(())
}

/// Whether a host of this name has the same keys.
fn is_there(original: &Original, home: &Home) -> bool {
    let Ok((_, Profile::Knockknock(there))) = Profile::load(home, original.name.as_str()) else { return false };
    let stand_in = home.secrets(&there.knockknock.key_file).ok().and_then(|secrets| secrets.stand_in().ok());
    stand_in == Some(original.stand_in)
}

fn profile(original: &Original, address: Vec<HostAddress>, services: &[(Name, u16)]) -> KnockknockProfile {
    let service = |(name, number): &(Name, u16)| {
        let ports = vec![Port { transport: Transport::Tcp, number: *number }];
        (name.clone(), ProfileService { selector: *number, ports, open_for: None, once: false })
    };
    KnockknockProfile {
        address,
        default: services.first().map(|(name, _)| name.clone()),
        source: None,
        knockknock: KnockknockTerms {
            key_file: KnockknockTerms::key_file_of(&original.name),
            knock_port: original.knock_port,
            counter: original.counter,
        },
        services: services.iter().map(service).collect::<BTreeMap<_, _>>(),
    }
}
