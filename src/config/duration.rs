//! Durations as people write them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A span of time in whole seconds, written `90s`, `15m`, `2h` or `1d`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Seconds(pub u32);

/// Units, the largest first.
const UNITS: [(char, u32); 4] = [('d', 86_400), ('h', 3_600), ('m', 60), ('s', 1)];

impl FromStr for Seconds {
    type Err = DurationError;

    fn from_str(text: &str) -> Result<Self, DurationError> {
        let wrong = || DurationError(text.escape_default().to_string());
        let split = |(letter, factor): &(char, u32)| Some((text.strip_suffix(*letter)?, *factor));
        let (number, factor) = UNITS.iter().find_map(split).ok_or_else(wrong)?;
        let number: u32 = number.parse().map_err(|_| wrong())?;
        number.checked_mul(factor).map(Self).ok_or_else(wrong)
    }
}

crate::service::serde_as_text!(Seconds);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fits = |factor: u32| self.0 > 0 && self.0.is_multiple_of(factor);
        let (letter, factor) = UNITS.into_iter().find(|(_, factor)| fits(*factor)).unwrap_or(('s', 1));
        write!(f, "{}{letter}", self.0 / factor)
    }
}

/// Not a duration.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("`{0}` is no duration: write 90s, 15m, 2h or 1d")]
pub struct DurationError(String);

#[cfg(test)]
mod tests {
    use super::Seconds;

    #[test]
    fn durations_are_read_and_shown_in_their_largest_unit() {
        for (text, seconds, shown) in [
            ("90s", 90, "90s"),
            ("15m", 900, "15m"),
            ("2h", 7200, "2h"),
            ("1d", 86_400, "1d"),
            ("120s", 120, "2m"),
            ("0s", 0, "0s"),
        ] {
            let parsed: Seconds = text.parse().unwrap();
            assert_eq!((parsed.0, parsed.to_string().as_str()), (seconds, shown));
        }
        for bad in ["", "s", "30", "30 s", "-1s", "1.5h", "1w", "99999999d", "1ss", "30\u{e9}"] {
            assert!(bad.parse::<Seconds>().is_err(), "{bad:?}");
        }
    }
}
