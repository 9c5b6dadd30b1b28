//! A child's distance from whoever started the keeper.

use std::ffi::CStr;
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

/// A session of its own, without the keeper's terminal: neither does its Ctrl-C come here, nor could anything be typed into
/// it from here. When it is time, the keeper hangs up, and so signals are ignored.
///
/// # Errors
/// The kernel's.
pub(super) fn leave(name: &CStr) -> io::Result<()> {
    rustix::thread::set_name(name)?; // it was `exe`
    rustix::process::setsid()?;
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::new(AtomicBool::new(false)))?;
    }
    Ok(())
}
