//! Times for people.

use jiff::Timestamp;

/// A Unix time as `2026-11-22 14:02:11Z`; one that no calendar has, as a number.
pub(super) fn utc(time: u64) -> String {
    let timestamp = i64::try_from(time).ok().and_then(|time| Timestamp::from_second(time).ok());
    timestamp.map_or_else(|| time.to_string(), |timestamp| timestamp.strftime("%F %TZ").to_string())
}

#[cfg(test)]
mod tests {
    use super::utc;

    #[test]
    fn a_unix_time_is_shown_as_a_date() {
        for (time, shown) in [
            (0, "1970-01-01 00:00:00Z"),
            (951_782_399, "2000-02-28 23:59:59Z"),
            (951_782_400, "2000-02-29 00:00:00Z"),
            (951_868_800, "2000-03-01 00:00:00Z"),
            (1_795_356_131, "2026-11-22 14:02:11Z"),
            (4_107_542_399, "2100-02-28 23:59:59Z"),
            (4_107_542_400, "2100-03-01 00:00:00Z"),
            (u64::MAX, "18446744073709551615"),
        ] {
            assert_eq!(utc(time), shown, "{time}");
        }
    }
}
