//! What to knock for, and where: a host as people name it, one of its services, and the addresses that count.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::time::{Duration, Instant};

use thiserror::Error;

use super::address::own_addresses;
use super::home::Home;
use super::host::{KnockknockProfile, Profile, ProfileError, ProfileService};
use super::port::{PortError, source_address};
use crate::service::{HostAddress, Name, Transport};

/// Time after which no further name is looked up: a resolver that does not answer takes ten seconds for each.
const RESOLVING: Duration = Duration::from_secs(10);

/// Which addresses of the server count.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Family {
    /// IPv4 and IPv6.
    Any,
    /// IPv4 only.
    V4,
    /// IPv6 only.
    V6,
}

impl Family {
    fn has(self, address: &SocketAddr) -> bool {
        match self {
            Self::Any => true,
            Self::V4 => address.is_ipv4(),
            Self::V6 => address.is_ipv6(),
        }
    }
}

/// What the token is bound to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    /// The profile's address, or the own one if the server sees it as it is.
    Auto,
    /// Nothing.
    Unbound,
    /// This address: one of the own, or that of a NAT on the way.
    Address(IpAddr),
}

/// What somebody asks for, in their words.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Name of a profile, or a name or address of its server.
    pub host: &'a str,
    /// A service's name or port.
    pub service: Option<&'a str>,
    /// Which addresses count.
    pub family: Family,
    /// What the token is bound to.
    pub source: Source,
    /// Rather no knock than one that its timestamp sets apart.
    pub strict: bool,
}

/// What a request means.
#[derive(Clone, Debug)]
pub struct Aim {
    /// The profile's name.
    pub host: Name,
    /// The profile.
    pub profile: Profile,
    /// The service asked for.
    pub service: Name,
    /// What the service is.
    pub details: ProfileService,
    /// The number that was asked for, if it was one.
    pub port: Option<u16>,
    /// Addresses of the server, in the order in which they are tried; their port is 0. There is at least one.
    pub servers: Vec<SocketAddr>,
    /// What the token is bound to.
    pub source: Source,
    /// Rather no knock than one that its timestamp sets apart.
    pub strict: bool,
}

/// Why a request means nothing here.
#[derive(Debug, Error)]
pub enum AimError {
    /// The profile.
    #[error(transparent)]
    Profile(#[from] ProfileError),
    /// Several profiles have this address.
    #[error("host {asked}: this is an address of several profiles")]
    Ambiguous {
        /// What was asked for.
        asked: String,
        /// The profiles.
        hosts: Vec<Name>,
    },
    /// The name has no address.
    #[error("{name}: cannot be resolved ({cause})")]
    Resolve {
        /// The host name.
        name: String,
        /// What the resolver said.
        cause: io::Error,
    },
    /// No address of the wanted family.
    #[error("host {host}: has no {family} address")]
    NoAddress {
        /// The profile.
        host: Name,
        /// `IPv4`, `IPv6` or `usable`.
        family: &'static str,
    },
    /// The source address is of the other family than the one asked for.
    #[error("source {0}: is not of the family that the knock is to use")]
    SourceFamily(IpAddr),
    /// A knockknock token was asked to go over IPv6.
    #[error("host {0}: a knockknock token goes over IPv4 alone, for IPv6 has no place for it")]
    OnlyV4(Name),
    /// What is meant of the server has IPv6 addresses alone, and a knockknock token goes over none of them.
    #[error("host {0}: has no IPv4 address there, and a knockknock token goes over no other")]
    NoV4(Name),
    /// A knockknock token is bound to no address, so a source can only be an own one.
    #[error("host {host}: a knockknock token is bound to no address, and {source_address} is not this machine's own")]
    BindsNothing {
        /// The profile.
        host: Name,
        /// What was asked for, or is in the profile.
        source_address: IpAddr,
    },
    /// `--strict`: a knockknock token always stands out.
    #[error("host {0}: a knockknock token comes in a SYN that no kernel sends, so an observer can tell it")]
    StandsOut(Name),
    /// The server opens no door for where the knock would come from.
    #[error(
        "{0}: is link-local, and a door for a link-local source would hold on every link, so the server opens none"
    )]
    LinkLocal(IpAddr),
    /// No way leads to any address.
    #[error(transparent)]
    Port(#[from] PortError),
}

impl Aim {
    /// Finds the profile, the service and the addresses. A server that was named by one of its addresses, or by a name that
    /// the profile has, is knocked at there and nowhere else, for a connection would go there.
    ///
    /// # Errors
    /// [`AimError`]; [`ProfileError::Missing`] if no profile is meant.
    pub fn find(home: &Home, request: &Request<'_>) -> Result<Self, AimError> {
        let Found { host, profile, names } = Found::find(home, request.host)?;
        let (service, details) = profile.service(&host, request.service)?;
        let (service, details) = (service.clone(), details.clone());
        let servers = match &profile {
            Profile::Token(profile) => resolve_all(&host, &names, family(request, profile.source)?)?,
            Profile::Knockknock(profile) => knockknock_servers(&host, profile, &names, request)?,
        };
        let port = request.service.and_then(|asked| asked.parse().ok());
        let Request { source, strict, .. } = *request;
        Ok(Self { host, profile, service, details, port, servers, source, strict })
    }

    /// The first address of the server that a way leads to.
    ///
    /// # Errors
    /// The kernel's about the last one.
    pub fn server(&self) -> Result<SocketAddr, AimError> {
        let mut failure = None;
        for &server in &self.servers {
            match self.check_way(server) {
                Ok(()) => return Ok(server),
                Err(error) => failure = Some(error),
            }
        }
        Err(failure.unwrap_or_else(|| AimError::NoAddress { host: self.host.clone(), family: "usable" }))
    }

    /// Whether a knock that goes to this address comes from one that the server opens a door for.
    ///
    /// # Errors
    /// [`AimError::LinkLocal`] if not, and the kernel's if no way leads there.
    pub fn check_way(&self, server: SocketAddr) -> Result<(), AimError> {
        match source_address(server, self.own_source())? {
            IpAddr::V6(source) if source.is_unicast_link_local() => Err(AimError::LinkLocal(server.ip())),
            _ => Ok(()),
        }
    }

    /// `--source`, or else the profile's, also chooses among own addresses; another one is a NAT's and only goes into the
    /// token.
    pub fn own_source(&self) -> Option<IpAddr> {
        let address = match self.source {
            Source::Auto => self.profile.source()?,
            Source::Unbound => return None,
            Source::Address(address) => address,
        };
        own_addresses().contains(&address).then_some(address)
    }

    /// The TCP port that a connection to the service goes to: the one that was asked for, else the first.
    pub fn tcp_port(&self) -> Option<u16> {
        let is_asked = |number| Some(number) == self.port;
        let has_asked = self.details.ports.iter().any(|port| is_asked(port.number));
        let mut tcp = self.details.ports.iter().filter(|port| port.transport == Transport::Tcp).map(|port| port.number);
        tcp.find(|number| is_asked(*number) || !has_asked)
    }
}

/// A profile, and those names and addresses of its server that are meant.
struct Found {
    host: Name,
    profile: Profile,
    names: Vec<HostAddress>,
}

impl Found {
    fn find(home: &Home, asked: &str) -> Result<Self, AimError> {
        match Profile::load(home, asked) {
            Err(ProfileError::Missing(_)) => {}
            loaded => {
                let (host, profile) = loaded?;
                let names = profile.address().to_vec();
                return Ok(Self { host, profile, names });
            }
        }
        let (mut all, mut broken) = (Vec::new(), None);
        for name in Profile::names(home)? {
            match Profile::load(home, name.as_str()) {
                Ok(profile) => all.push(profile),
                Err(error) => broken = Some(error),
            }
        }
        let found = Self::among(&all, asked, |name| is_same_host(name.as_str(), asked))?;
        // Profiles often hold addresses where people use names.
        let resolved = if found.is_none() { resolve(asked).unwrap_or_default() } else { Vec::new() };
        let is_resolved = |name: &HostAddress| {
            name.as_str().parse().is_ok_and(|address: IpAddr| resolved.iter().any(|found| found.ip() == address))
        };
        let found = found.map_or_else(|| Self::among(&all, asked, is_resolved), |found| Ok(Some(found)))?;
        let missing = || ProfileError::Missing(asked.escape_default().to_string());
        found.ok_or_else(|| broken.unwrap_or_else(missing).into())
    }

    /// The one profile that has such a name of its server.
    fn among(
        all: &[(Name, Profile)],
        asked: &str,
        is_meant: impl Fn(&HostAddress) -> bool,
    ) -> Result<Option<Self>, AimError> {
        let mut found = Vec::new();
        for (host, profile) in all {
            let names: Vec<HostAddress> = profile.address().iter().filter(|name| is_meant(name)).cloned().collect();
            if !names.is_empty() {
                found.push(Self { host: host.clone(), profile: profile.clone(), names });
            }
        }
        if found.len() > 1 {
            let hosts = found.into_iter().map(|found| found.host).collect();
            return Err(AimError::Ambiguous { asked: asked.escape_default().to_string(), hosts });
        }
        Ok(found.pop())
    }
}

/// Whether both name the same host: one address however it is written, or one name in DNS (RFC 4343: without regard to case).
fn is_same_host(one: &str, other: &str) -> bool {
    match (one.parse::<IpAddr>(), other.parse::<IpAddr>()) {
        (Ok(one), Ok(other)) => one.to_canonical() == other.to_canonical(),
        _ => one.trim_end_matches('.').eq_ignore_ascii_case(other.trim_end_matches('.')),
    }
}

/// The family to knock over: a source address that the token is to be bound to decides.
fn family(request: &Request<'_>, profile: Option<IpAddr>) -> Result<Family, AimError> {
    let source = match request.source {
        Source::Auto => profile,
        Source::Unbound => None,
        Source::Address(address) => Some(address),
    };
    let Some(source) = source else { return Ok(request.family) };
    let meant = if source.is_ipv4() { Family::V4 } else { Family::V6 };
    if request.family == Family::Any || request.family == meant {
        Ok(meant)
    } else {
        Err(AimError::SourceFamily(source))
    }
}

/// The IPv4 addresses to knock at with a knockknock token, if such a one can be what is asked for.
fn knockknock_servers(
    host: &Name,
    profile: &KnockknockProfile,
    names: &[HostAddress],
    request: &Request<'_>,
) -> Result<Vec<SocketAddr>, AimError> {
    let source = match request.source {
        Source::Auto => profile.source.map(IpAddr::V4),
        Source::Unbound => None,
        Source::Address(address) => Some(address),
    };
    if request.strict {
        return Err(AimError::StandsOut(host.clone()));
    }
    if request.family == Family::V6 || source.is_some_and(|source| source.is_ipv6()) {
        return Err(AimError::OnlyV4(host.clone()));
    }
    if let Some(source_address) = source.filter(|source| !own_addresses().contains(source)) {
        return Err(AimError::BindsNothing { host: host.clone(), source_address });
    }
    resolve_all(host, names, Family::V4).map_err(|error| match error {
        AimError::NoAddress { host, .. } => AimError::NoV4(host),
        other => other,
    })
}

/// All addresses of the wanted family: those of the first name first, each name's as the resolver orders them for a
/// connection (RFC 6724). Of many names those are left out that there is no time for.
fn resolve_all(host: &Name, names: &[HostAddress], family: Family) -> Result<Vec<SocketAddr>, AimError> {
    let (mut servers, mut failure, begun) = (Vec::new(), None, Instant::now());
    for name in names {
        if begun.elapsed() >= RESOLVING && name.as_str().parse::<IpAddr>().is_err() {
            continue;
        }
        match resolve(name.as_str()) {
            Ok(addresses) => servers.extend(addresses.into_iter().filter(|address| family.has(address))),
            Err(cause) => failure = Some(AimError::Resolve { name: name.to_string(), cause }),
        }
    }
    if !servers.is_empty() {
        return Ok(servers);
    }
    let family = match family {
        Family::Any => "usable",
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    };
    Err(failure.unwrap_or_else(|| AimError::NoAddress { host: host.clone(), family }))
}

fn resolve(name: &str) -> io::Result<Vec<SocketAddr>> {
    Ok((name, 0).to_socket_addrs()?.map(canonical).collect())
}

/// The kernel connects over IPv4 to an IPv4 address that is written as an IPv6 one (RFC 4291 section 2.5.5.2).
fn canonical(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        IpAddr::V4(v4) => (v4, address.port()).into(),
        IpAddr::V6(_) => address, // with its interface
    }
}

#[cfg(test)]
mod tests {
    use super::{Aim, Source, is_same_host, resolve};
    use crate::client::Profile;

    const PROFILE: &str = "
        server_key = 'BwdHR0dHR0dHR0dHR0dHR0dHR0dHR0dHR0dHR0dHRwc='
        client_key = 'BQVFRUVFRUVFRUVFRUVFRUVFRUVFRUVFRUVFRUVFRQU='
        address = ['192.0.2.1']
        knock_ports = ['20000-21023']
        window = '60s'
        [services.web]
        selector = 80
        ports = ['udp/443', 'tcp/80', 'tcp/443', 'udp/53']";

    #[test]
    fn a_connection_goes_to_the_port_that_was_asked_for_and_else_to_the_first() {
        let profile = Profile::parse("profile".as_ref(), PROFILE).unwrap();
        let name: crate::service::Name = "web".parse().unwrap();
        let details = profile.services()[&name].clone();
        for (asked, expected) in
            [(None, Some(80)), (Some(80), Some(80)), (Some(443), Some(443)), (Some(53), None), (Some(7), Some(80))]
        {
            let (profile, details) = (profile.clone(), details.clone());
            let (host, service, servers) = (name.clone(), name.clone(), vec![]);
            let aim =
                Aim { host, profile, service, details, port: asked, servers, source: Source::Auto, strict: false };
            assert_eq!(aim.tcp_port(), expected, "{asked:?}");
        }
    }

    #[test]
    fn a_number_of_two_services_means_the_one_over_tcp() {
        let text =
            PROFILE.replace("[services.web]", "[services.vpn]\nselector = 1\nports = ['udp/443']\n[services.web]");
        let profile = Profile::parse("profile".as_ref(), &text).unwrap();
        let host = "home".parse().unwrap();
        for (asked, expected) in [("443", "web"), ("53", "web"), ("vpn", "vpn")] {
            assert_eq!(profile.service(&host, Some(asked)).unwrap().0.as_str(), expected, "{asked}");
        }
    }

    #[test]
    fn an_ipv4_address_is_one_however_it_is_resolved() {
        for (name, expected) in [
            ("::ffff:192.0.2.1", "192.0.2.1:0"),
            ("192.0.2.1", "192.0.2.1:0"),
            ("2001:db8::1", "[2001:db8::1]:0"),
            ("fe80::1%1", "[fe80::1%1]:0"),
        ] {
            assert!(resolve(name).unwrap().iter().all(|address| address.to_string() == expected), "{name}");
        }
    }

    #[test]
    fn a_host_is_the_same_however_it_is_written() {
        for (one, other, expected) in [
            ("server.example.org", "Server.Example.ORG.", true),
            ("2001:db8::1", "2001:DB8:0::1", true),
            ("192.0.2.1", "192.0.2.1", true),
            ("192.0.2.1", "::ffff:192.0.2.1", true),
            ("192.0.2.1", "::192.0.2.1", false),
            ("192.0.2.1", "192.0.2.10", false),
            ("server.example.org", "server.example", false),
        ] {
            assert_eq!(is_same_host(one, other), expected, "{one} {other}");
        }
    }
}
