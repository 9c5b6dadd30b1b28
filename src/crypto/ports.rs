//! The list of knock ports, of which the token picks one.

use std::fmt;
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A server's knock ports: ascending, no duplicates, 1 to 16384 of them.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(try_from = "Vec<String>", into = "Vec<String>")]
pub struct KnockPorts(Vec<u16>);

impl KnockPorts {
    /// The most ports a list may have.
    pub const MAX_LEN: usize = 16384;

    /// The list that these ranges make together.
    ///
    /// # Errors
    /// When it is empty, too long, or holds port 0 or one port twice.
    pub fn new(ranges: impl IntoIterator<Item = RangeInclusive<u16>>) -> Result<Self, KnockPortsError> {
        let mut ports: Vec<u16> = ranges.into_iter().flatten().take(Self::MAX_LEN + 1).collect();
        ports.sort_unstable();
        let twice = ports.windows(2).find_map(|pair| match pair {
            [a, b] if a == b => Some(*a),
            _ => None,
        });
        match (twice, ports.first()) {
            _ if ports.len() > Self::MAX_LEN => Err(KnockPortsError::TooMany),
            (Some(port), _) => Err(KnockPortsError::Twice(port)),
            (None, None) => Err(KnockPortsError::None),
            (None, Some(0)) => Err(KnockPortsError::Zero),
            _ => Ok(Self(ports)),
        }
    }

    /// These and others, with no regard to how many they are.
    #[must_use]
    pub fn and(&self, others: impl IntoIterator<Item = u16>) -> Self {
        let mut ports: Vec<u16> = self.iter().chain(others).collect();
        ports.sort_unstable();
        ports.dedup();
        Self(ports)
    }

    /// The port number `choice mod K`, K the length of the list (docs/protocol.md section 3).
    pub fn pick(&self, choice: u32) -> u16 {
        let count = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        let place = usize::try_from(choice % count.max(1)).unwrap_or(0);
        self.0.get(place).copied().unwrap_or_default()
    }

    /// Whether this port is one of them.
    pub fn contains(&self, port: u16) -> bool {
        self.0.binary_search(&port).is_ok()
    }

    /// The ports, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u16> {
        self.0.iter().copied()
    }

    /// The fewest ranges that hold these ports and no other.
    pub fn ranges(&self) -> Vec<RangeInclusive<u16>> {
        let mut ranges: Vec<RangeInclusive<u16>> = Vec::new();
        for port in self.iter() {
            match ranges.last_mut() {
                Some(range) if range.end().checked_add(1) == Some(port) => *range = *range.start()..=port,
                _ => ranges.push(port..=port),
            }
        }
        ranges
    }
}

impl TryFrom<Vec<String>> for KnockPorts {
    type Error = KnockPortsError;

    fn try_from(texts: Vec<String>) -> Result<Self, KnockPortsError> {
        Self::new(texts.iter().map(|text| parse_range(text)).collect::<Result<Vec<_>, _>>()?)
    }
}

impl From<KnockPorts> for Vec<String> {
    fn from(ports: KnockPorts) -> Self {
        ports.ranges().iter().map(show_range).collect()
    }
}

impl fmt::Display for KnockPorts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&Vec::from(self.clone()).join(", "))
    }
}

fn parse_range(text: &str) -> Result<RangeInclusive<u16>, KnockPortsError> {
    let (low, high) = text.split_once('-').unwrap_or((text, text));
    match (low.trim().parse(), high.trim().parse()) {
        (Ok(low), Ok(high)) if low <= high => Ok(low..=high),
        _ => Err(KnockPortsError::Range(text.escape_default().to_string())),
    }
}

fn show_range(range: &RangeInclusive<u16>) -> String {
    if range.start() == range.end() { range.start().to_string() } else { format!("{}-{}", range.start(), range.end()) }
}

/// Why a list of knock ports is refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum KnockPortsError {
    /// Not a port or a range of ports.
    #[error("`{0}` is no range of ports: write 20000-21023 or 2222")]
    Range(String),
    /// No port at all.
    #[error("a server has 1 to 16384 knock ports, not none")]
    None,
    /// More than [`KnockPorts::MAX_LEN`].
    #[error("a server has 1 to 16384 knock ports, not more")]
    TooMany,
    /// One port in two ranges.
    #[error("knock port {0} is listed twice")]
    Twice(u16),
    /// Port 0.
    #[error("port 0 cannot be a knock port")]
    Zero,
}

#[cfg(test)]
mod tests {
    use super::{KnockPorts, KnockPortsError};

    fn parse(texts: &[&str]) -> Result<KnockPorts, KnockPortsError> {
        KnockPorts::try_from(texts.iter().map(|&text| text.to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn ranges_in_any_order_become_one_ascending_list() {
        let ports = parse(&["8443", "443", "2222-2224"]).unwrap();
        assert_eq!(ports.iter().collect::<Vec<_>>(), [443, 2222, 2223, 2224, 8443]);
        assert_eq!(ports.to_string(), "443, 2222-2224, 8443");
        assert!(ports.contains(2223) && !ports.contains(2225));
    }

    #[test]
    fn lists_that_two_sides_could_read_differently_are_refused() {
        assert_eq!(parse(&["5", "4-6"]), Err(KnockPortsError::Twice(5)));
        assert_eq!(parse(&[]), Err(KnockPortsError::None));
        assert_eq!(parse(&["0-3"]), Err(KnockPortsError::Zero));
        assert_eq!(parse(&["1-16385"]), Err(KnockPortsError::TooMany));
        assert_eq!(parse(&["1-65535"; 100]), Err(KnockPortsError::TooMany));
        assert_eq!(parse(&["1-16384"]).unwrap().iter().count(), 16384);
        for bad in ["", "-", "9-8", "70000", "a", "1-2-3"] {
            assert!(matches!(parse(&[bad]), Err(KnockPortsError::Range(_))), "{bad:?}");
        }
    }
}
