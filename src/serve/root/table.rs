//! The table: nft is run with the texts of the plan, and with these.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::{Ended, Message, Root, RootError};
use crate::serve::handover;
use crate::serve::program::{self, Failed, nft, run as run_program};

/// Times that the table is loaded again before giving up, and the time between.
const LOAD_TRIES: u32 = 100;
const LOAD_PAUSE: Duration = Duration::from_millis(10);

/// What makes the table, where it does not persist without an owner.
const ADD: &str = "add table inet knockq\n";
pub(super) const DELETE: &str = "delete table inet knockq\n";

/// What of a table of before this one does not have. Not a part of the include file: kernels refuse a new chain in the transaction
/// in which a table wakes.
const OUTDATED: &str = "delete chain inet knockq ended\ndelete set inet knockq ended4\ndelete set inet knockq ended6\n";

/// Takes away the table that is made for comparison, if it is there.
const CLEAR: &str = "add table inet knockq_check\ndelete table inet knockq_check\n";

impl Root {
    /// Whether the table of what was read would load; where others load it, what there is, and what there should be.
    pub(super) fn check(&mut self) -> Result<(), Ended> {
        self.pace();
        let Some((current, _)) = &self.plan else { return Ok(()) };
        let next = self.next.as_ref().map_or(current, |(next, ..)| next);
        if !next.is_managed {
            return match listed(&next.check) {
                Ok(listed) => {
                    let listed = [handover::seal_bytes(listed.as_bytes())?];
                    Ok(self.children.tell("engine", Message::Ready, &listed)?)
                }
                Err(Failed { said, .. }) => Ok(self.refuse(&said)?),
            };
        }
        if next.ruleset == current.ruleset {
            return Ok(self.children.tell("engine", Message::Same, &[])?);
        }
        match nft(&["-c", "-f", "-"], &next.check) {
            Ok(_) => Ok(self.children.tell("engine", Message::Ready, &[])?),
            Err(Failed { said, .. }) => {
                let said = said.replace('\n', " ");
                Ok(self.refuse(&format!("nft: {said}\nknockq ruleset --check"))?)
            }
        }
    }

    /// Loads the table of what is in force, of which the gate lets go. Whoever deleted one that was loaded may be at it still.
    pub(super) fn load(&mut self) -> Result<(), Ended> {
        let mut tries = if self.has_loaded { LOAD_TRIES } else { 1 };
        while let Err(failed) = self.try_to_load()? {
            tries = tries.saturating_sub(1);
            if tries == 0 {
                return Err(self.explain(failed.said).into());
            }
            sleep(LOAD_PAUSE);
        }
        if !std::mem::replace(&mut self.has_loaded, true) {
            let _ = nft(&["-f", "-"], OUTDATED); // it is not there, most often
        }
        Ok(())
    }

    fn try_to_load(&mut self) -> Result<Result<String, Failed>, Ended> {
        let released = self.ask_gate(Message::Release, &[])?;
        self.persists = released != Message::Ready;
        let loaded = self.load_once(self.persists);
        if loaded.is_err() && released == Message::Made {
            let _ = nft(&["-f", "-"], DELETE); // one that is empty looks like a gate, and is none
        }
        Ok(loaded)
    }

    /// nft before 1.1 cannot name the flags of a table that persists, so it must not try to add it.
    pub(super) fn load_once(&self, persists: bool) -> Result<String, Failed> {
        let Some((plan, _)) = &self.plan else { return Ok(String::new()) };
        let text = if persists { plan.ruleset.replacen(ADD, "", 1) } else { plan.ruleset.clone() };
        nft(&["-f", "-"], &text)
    }

    /// nft says little of what a kernel lacks; the command that makes the table for people says more.
    fn explain(&self, said: String) -> RootError {
        let config = self.start.config.display().to_string();
        let explained = run_program(&self.start.knockq, &["ruleset", "--check", "--config", &config], "");
        match explained {
            Err(Failed { said, code }) => {
                let _ = io::stderr().write_all(format!("{said}\n").as_bytes());
                RootError::ChildFailed { process: "nft", code }
            }
            Ok(_) => RootError::Nft(said),
        }
    }

    /// Keeps in the include file beside the configuration what was loaded last: the next boot begins with it. What others load is
    /// theirs to write.
    pub(super) fn keep(&self) {
        let Some((plan, _)) = self.plan.as_ref().filter(|(plan, _)| plan.is_managed) else { return };
        let path = self.start.config.with_file_name("knockq.nft").display().to_string();
        if let Err(Failed { said, .. }) = run_program(&self.start.knockq, &["keep", "--output", &path], &plan.ruleset) {
            self.start.lines.warning(&format!("the next boot begins with the gate of before: {said}"));
        }
    }
}

/// The table that is there, and the one that this text makes under another name, each as JSON and as text, with a zero byte after
/// each. One that is not there has no text.
fn listed(check: &str) -> Result<String, Failed> {
    let made = nft(&["-f", "-"], &format!("{CLEAR}{check}"));
    let (mut listed, began) = (String::new(), Instant::now());
    for (table, how) in [("knockq", "-j"), ("knockq", "-t"), ("knockq_check", "-j"), ("knockq_check", "-t")] {
        if began.elapsed() < program::TIME {
            let text = nft(&[how, "list", "table", "inet", table], "").unwrap_or_default();
            let _ = write!(listed, "{text}\0");
        }
    }
    let _ = nft(&["-f", "-"], CLEAR);
    made.map(|_| listed)
}
