//! What root needs of a configuration, made by the child that reads it: texts, which root hands on and does not look into.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use super::handover;

/// What root does for one configuration. In memory its parts stand one after the other, with a zero byte between them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plan {
    /// Root loads the table, not the host's nftables.conf.
    pub is_managed: bool,
    /// What is ready, in one line.
    pub summary: String,
    /// The include file. It begins with a table that is added, if it is not there.
    pub ruleset: String,
    /// The same under another name: to be checked or, where others load the table, to be compared with theirs.
    pub check: String,
    /// What the next configuration is compared with, by the child that reads it.
    pub before: Vec<u8>,
}

/// So many parts; the last may have zero bytes.
const PARTS: usize = 5;

impl Plan {
    /// In sealed memory.
    ///
    /// # Errors
    /// The kernel's.
    pub fn seal(&self) -> io::Result<OwnedFd> {
        let mode = if self.is_managed { "managed" } else { "external" };
        let texts = [mode, &self.summary, &self.ruleset, &self.check];
        let mut bytes = texts.iter().flat_map(|text| text.bytes().chain([0])).collect::<Vec<u8>>();
        bytes.extend(&self.before);
        handover::seal_bytes(&bytes)
    }

    /// Reads it.
    ///
    /// # Errors
    /// When it is no sealed memory, or holds something else.
    pub fn read(memory: impl AsFd) -> io::Result<Self> {
        let bytes = handover::unseal_bytes(memory.as_fd().try_clone_to_owned()?)?;
        let parts: Vec<&[u8]> = bytes.splitn(PARTS, |byte| *byte == 0).collect();
        let [mode @ (b"managed" | b"external"), summary, ruleset, check, before] = *parts else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).map_err(|_| io::ErrorKind::InvalidData);
        let [summary, ruleset, check] = [text(summary)?, text(ruleset)?, text(check)?];
        Ok(Self { is_managed: mode == b"managed", summary, ruleset, check, before: before.to_vec() })
    }
}

#[cfg(test)]
mod tests {
    use super::{Plan, handover};

    #[test]
    fn a_plan_survives_the_way_and_what_is_none_is_refused() {
        let plan = |is_managed| Plan {
            is_managed,
            summary: "ready: users 1".to_owned(),
            ruleset: "add table inet knockq\n".to_owned(),
            check: String::new(),
            before: vec![0, 1, 0],
        };
        for plan in [plan(false), plan(true)] {
            let memory = plan.seal().unwrap();
            assert_eq!(Plan::read(&memory).unwrap(), plan);
            assert_eq!(Plan::read(&memory).unwrap(), plan, "it is there still");
        }
        for bytes in [&b""[..], b"managed", b"managed\0\0\0", b"other\0\0\0\0", b"managed\0\xff\0\0\0"] {
            assert!(Plan::read(handover::seal_bytes(bytes).unwrap()).is_err(), "{bytes:?}");
        }
    }
}
