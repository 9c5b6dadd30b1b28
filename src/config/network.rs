//! Networks as people write them.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A network, written `192.0.2.0/24`, or one address.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Network(pub IpNet);

impl FromStr for Network {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let network = text.parse().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
        network.map(Self).map_err(|_| NetworkError(text.escape_default().to_string()))
    }
}

crate::service::serde_as_text!(Network);

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Not a network.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("`{0}` is no network: write 192.0.2.0/24, 2001:db8::/32 or an address")]
pub struct NetworkError(String);

#[cfg(test)]
mod tests {
    use super::Network;

    #[test]
    fn one_address_is_a_network_of_its_own() {
        for (text, shown) in
            [("192.0.2.7", "192.0.2.7/32"), ("2001:db8::7", "2001:db8::7/128"), ("10.0.0.0/8", "10.0.0.0/8")]
        {
            assert_eq!(text.parse::<Network>().unwrap().to_string(), shown);
        }
        for bad in ["", "10.0.0.0/33", "10.0.0", "::/129", "host"] {
            assert!(bad.parse::<Network>().is_err(), "{bad:?}");
        }
    }
}
