//! Lines of the log, as the two programs with a privilege write them: in one go, without a library.

use std::io::{self, Write};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Time that the log may take for a line.
const LOG_TIME: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// Writes lines of one process.
#[derive(Clone, Copy)]
pub struct Lines {
    /// Whose they are.
    pub process: &'static str,
    /// Each begins with the priority of sd-daemon(3), as under systemd.
    pub priorities: bool,
}

impl Lines {
    /// Something went wrong.
    pub fn error(self, text: &str) {
        self.write(3, "error: ", text);
    }

    /// Why it ends, and what to do, as a command says it.
    pub fn last_words(self, text: &str, hint: Option<&str>) {
        let mark = if self.priorities { "<3>" } else { "" };
        let hint = hint.map(|hint| format!("{mark}Hint: {hint}\n")).unwrap_or_default();
        let _ = io::stderr().write_all(format!("{mark}{}: {text}\n{hint}", self.process).as_bytes());
    }

    /// Something may be wrong.
    pub fn warning(self, text: &str) {
        self.write(4, "warning: ", text);
    }

    /// What happened.
    pub fn info(self, text: &str) {
        self.write(6, "", text);
    }

    /// A log that stands still loses the line.
    fn write(self, priority: u8, word: &str, text: &str) {
        if poll(&mut [PollFd::new(&io::stderr(), PollFlags::OUT)], Some(&LOG_TIME)) == Ok(0) {
            return;
        }
        let (mark, word) = if self.priorities { (format!("<{priority}>"), "") } else { (String::new(), word) };
        let _ = io::stderr().write_all(format!("{mark}{}: {word}{text}\n", self.process).as_bytes());
    }
}
