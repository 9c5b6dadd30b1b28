//! A child's distance from whoever started root.

use std::ffi::CStr;
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::fs::{Mode, OFlags};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

/// A session of its own, without root's terminal: neither does its Ctrl-C come here, nor could anything be typed into
/// it from here. When it is time, root hangs up, and so signals are ignored.
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

/// Another descriptor of a terminal that can only be written; `None` of what is no terminal. Whoever holds the terminal's own
/// reads what is typed there, in whatever session.
///
/// # Errors
/// The kernel's.
pub(super) fn writing_end(output: impl AsFd) -> io::Result<Option<OwnedFd>> {
    let output = output.as_fd();
    if !output.is_terminal() {
        return Ok(None);
    }
    let flags = OFlags::WRONLY | OFlags::NOCTTY | OFlags::CLOEXEC;
    Ok(Some(rustix::fs::open(format!("/proc/self/fd/{}", output.as_raw_fd()), flags, Mode::empty())?))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;

    use rustix::io::Errno;

    use super::writing_end;

    #[test]
    fn what_is_typed_at_a_terminal_is_not_for_who_writes_to_it() {
        let terminal = File::options().read(true).write(true).open("/dev/ptmx").unwrap();
        let mut end = File::from(writing_end(&terminal).unwrap().unwrap());
        let refused = end.read(&mut [0]).unwrap_err();
        assert_eq!(Errno::from_io_error(&refused), Some(Errno::BADF));
        assert!(writing_end(File::open("/dev/null").unwrap()).unwrap().is_none());
    }
}
