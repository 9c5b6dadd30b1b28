//! Giving up privileges, for good, before anything from outside is read.

use std::fs;

use caps::{CapSet, Capability, CapsHashSet};
use nix::unistd::{Gid, Uid, getgroups, setgroups, setresgid, setresuid};
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The local accounts.
const ACCOUNTS: &str = "/etc/passwd";

/// Whom a process becomes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Identity {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

impl Identity {
    /// The identity of an account in /etc/passwd; `None` where there is none by that name.
    ///
    /// Read as a file, for the accounts of daemons are local: the C library would load whatever modules nsswitch.conf
    /// names into a process that is root.
    ///
    /// # Errors
    /// When the account is root's, or its line cannot be read.
    pub fn of_account(name: &str) -> Result<Option<Self>, SandboxError> {
        let accounts = fs::read_to_string(ACCOUNTS).unwrap_or_default();
        let line = accounts.lines().find(|line| line.split(':').next() == Some(name));
        let Some(line) = line else { return Ok(None) };
        let mut ids = line.split(':').skip(2).map_while(|id| id.parse().ok());
        match (ids.next(), ids.next()) {
            (Some(0), _) | (_, Some(0)) => Err(SandboxError::Root(name.to_owned())),
            (Some(uid), Some(gid)) => Ok(Some(Self { uid, gid })),
            _ => Err(SandboxError::Account(name.to_owned())),
        }
    }
}

/// Why privileges could not be given up. Then nothing else may be done.
#[derive(Debug, Error)]
pub enum SandboxError {
    /// The account's line has no ids.
    #[error("user `{0}`: its line in {ACCOUNTS} has no user and group id")]
    Account(String),
    /// The daemon's user must not be root.
    #[error("user `{0}` is root: the daemon's processes must not be")]
    Root(String),
    /// Both accounts have one user id.
    #[error("users `{0}` and `{0}-monitor` have the same user id: each process needs its own")]
    Shared(String),
    /// A step failed.
    #[error("cannot {step}: {cause}")]
    Step {
        /// What was to be done.
        step: &'static str,
        /// What the kernel said.
        cause: String,
    },
    /// A privilege is still there.
    #[error("{0}, after it was given up")]
    NotGone(&'static str),
}

/// Becomes `identity` with no group, no capability but `kept`, no way to gain any, and no core dump; then proves it.
///
/// Filters of system calls and files have their place after this call.
///
/// # Errors
/// At the first step that fails or whose effect does not show.
pub fn give_up_privileges(identity: Identity, kept: Option<Capability>) -> Result<(), SandboxError> {
    let kept: CapsHashSet = kept.into_iter().collect();
    for capability in caps::runtime::thread_all_supported().difference(&kept) {
        step("cut the bounding set", caps::drop(None, CapSet::Bounding, *capability))?;
    }
    step("keep a capability over the change of user", caps::securebits::set_keepcaps(!kept.is_empty()))?;
    let (uid, gid) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
    step("leave all groups", setgroups(&[]))?;
    step("change the group", setresgid(gid, gid, gid))?;
    step("change the user", setresuid(uid, uid, uid))?;
    step("clear the ambient set", caps::clear(None, CapSet::Ambient))?;
    step("clear the inheritable set", caps::clear(None, CapSet::Inheritable))?;
    step("cut the effective set", caps::set(None, CapSet::Effective, &kept))?;
    step("cut the permitted set", caps::set(None, CapSet::Permitted, &kept))?;
    step("forbid new privileges", rustix::thread::set_no_new_privs(true))?;
    step("forbid core dumps", set_dumpable_behavior(DumpableBehavior::NotDumpable))?;
    prove(identity, &kept)
}

fn prove(identity: Identity, kept: &CapsHashSet) -> Result<(), SandboxError> {
    if setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0)).is_ok()
        || Uid::current().as_raw() != identity.uid
    {
        return Err(SandboxError::NotGone("the user is root"));
    }
    if setresgid(Gid::from_raw(0), Gid::from_raw(0), Gid::from_raw(0)).is_ok()
        || Gid::current().as_raw() != identity.gid
    {
        return Err(SandboxError::NotGone("the group is root's"));
    }
    if !step("read the groups", getgroups())?.iter().all(|group| group.as_raw() == identity.gid) {
        return Err(SandboxError::NotGone("a supplementary group is left"));
    }
    for set in [CapSet::Effective, CapSet::Permitted, CapSet::Bounding] {
        if step("read the capabilities", caps::read(None, set))? != *kept {
            return Err(SandboxError::NotGone("another set of capabilities is left"));
        }
    }
    if !step("read no_new_privs", rustix::thread::no_new_privs())? {
        return Err(SandboxError::NotGone("new privileges are allowed"));
    }
    Ok(())
}

fn step<T, E: std::fmt::Display>(step: &'static str, result: Result<T, E>) -> Result<T, SandboxError> {
    result.map_err(|cause| SandboxError::Step { step, cause: cause.to_string() })
}
