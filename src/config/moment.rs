//! Moments as people write them.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use jiff::civil::Date;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use toml::value::Datetime;

/// A moment, to the second: `2027-01-31`, whose first moment in UTC is meant, or `2027-01-31T18:00:00+01:00` (RFC 3339).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "String")]
pub struct Moment(Timestamp);

/// With quotation marks or without: TOML has dates of its own.
#[derive(Deserialize)]
#[serde(untagged, expecting = "no date: write 2027-01-31")]
enum Written {
    Date(Datetime),
    Text(String),
}

impl Moment {
    /// This one.
    fn now() -> Self {
        let now = Timestamp::now();
        Self(Timestamp::from_second(now.as_second()).unwrap_or(now))
    }

    /// A second after now, and after every one of these: later than what was said before, whatever the clock does.
    pub fn after(others: impl IntoIterator<Item = Self>) -> Self {
        let latest =
            others.into_iter().fold(Self::now(), |latest, other| if other.0 > latest.0 { other } else { latest });
        Self(Timestamp::from_second(latest.0.as_second().saturating_add(1)).unwrap_or(latest.0))
    }

    /// Whether it has come.
    pub fn is_over(self) -> bool {
        self.0 <= Timestamp::now()
    }

    /// Unix seconds.
    pub fn unix(self) -> u64 {
        self.0.as_second().try_into().unwrap_or(0) // before 1970 is over as well
    }
}

impl FromStr for Moment {
    type Err = MomentError;

    fn from_str(text: &str) -> Result<Self, MomentError> {
        let wrong = |_| MomentError(text.escape_default().to_string());
        let is_date = text.len() == "2027-01-31".len();
        let moment = if is_date {
            text.parse::<Date>().and_then(|date| TimeZone::UTC.to_timestamp(date.at(0, 0, 0, 0)))
        } else {
            text.parse()
        };
        moment.map(Self).map_err(wrong)
    }
}

impl TryFrom<Written> for Moment {
    type Error = MomentError;

    fn try_from(written: Written) -> Result<Self, MomentError> {
        match written {
            Written::Date(date) => date.to_string().parse(),
            Written::Text(text) => text.parse(),
        }
    }
}

impl From<Moment> for String {
    fn from(expiry: Moment) -> Self {
        expiry.to_string()
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Not a moment.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("`{0}` is no date: write 2027-01-31, whose first moment in UTC is meant, or 2027-01-31T18:00:00Z")]
pub struct MomentError(String);

#[cfg(test)]
mod tests {
    use super::Moment;

    #[test]
    fn what_is_said_next_is_later_than_now_and_than_all_that_was_said() {
        let now = Moment::now();
        assert!(Moment::after([]).unix() > now.unix());
        let [early, late]: [Moment; 2] = ["2001-01-01", "2999-12-31T23:59:59.5Z"].map(|text| text.parse().unwrap());
        assert_eq!(Moment::after([late, early]).to_string(), "3000-01-01T00:00:00Z");
        let last: Moment = "9999-12-30T22:00:00Z".parse().unwrap();
        assert_eq!(Moment::after([last]).unix(), last.unix());
    }

    #[derive(serde::Deserialize)]
    struct File {
        expires: Moment,
    }

    #[test]
    fn dates_are_read_with_and_without_quotation_marks_and_shown_in_utc() {
        for (text, unix, shown) in [
            ("2027-01-31", 1_801_353_600, "2027-01-31T00:00:00Z"),
            ("2027-01-31T18:00:00Z", 1_801_418_400, "2027-01-31T18:00:00Z"),
            ("2027-01-31T18:00:00+01:00", 1_801_414_800, "2027-01-31T17:00:00Z"),
            ("1960-01-01", 0, "1960-01-01T00:00:00Z"),
        ] {
            for written in [format!("expires = {text}"), format!("expires = \"{text}\"")] {
                let File { expires } = toml::from_str(&written).unwrap();
                assert_eq!((expires.unix(), expires.to_string().as_str()), (unix, shown), "{written}");
            }
        }
        // A time of no place, and one of no day, say nothing.
        for bad in ["", "2027-02-30", "2027-01-31T18:00:00", "18:00:00", "31.1.2027", "tomorrow", "1801353600"] {
            assert!(bad.parse::<Moment>().is_err(), "{bad:?}");
        }
    }
}
