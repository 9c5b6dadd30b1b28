//! The clock that counters come from.

use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rtime_clock::adjtime::{Timex, adjtimex};

/// Unix seconds; a clock before 1970 is 1970.
pub fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Whether the kernel says that somebody keeps its clock right; `true` where it does not say.
pub fn is_synchronized() -> bool {
    let mut timex = Timex::new();
    adjtimex(&mut timex).is_err() || timex.0.status & libc::STA_UNSYNC == 0
}

/// Sleeps until this Unix second; `tell` is called before with the seconds that it takes, if any.
pub fn wait_until(time: u64, tell: impl Fn(u64)) {
    let wait = time.saturating_sub(unix_now());
    if wait > 0 {
        tell(wait);
        thread::sleep(Duration::from_secs(wait));
    }
}
