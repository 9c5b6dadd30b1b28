//! Giving up privileges, for good, before anything from outside is read.

use std::fs::{self, File};
use std::io::{Read, Seek};
use std::path::Path;

use caps::{CapSet, Capability, CapsHashSet};
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, RestrictionStatus, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetError, RulesetStatus, Scope, path_beneath_rules,
};
use nix::unistd::{Gid, Uid, getgroups, setgroups, setresgid, setresuid};
use rustix::process::{DumpableBehavior, dumpable_behavior, set_dumpable_behavior};
use rustix::thread::{no_new_privs, set_no_new_privs};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::calls::{self, Call};

/// The local accounts.
const ACCOUNTS: &str = "/etc/passwd";

/// Bytes of `/proc/thread-self/status`, with room to spare.
const STATUS_LEN: u64 = 64 << 10;

/// The newest Landlock that is asked for; an older kernel does what it can.
const LANDLOCK: ABI = ABI::V9;

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
    #[error("users `{0}` and `{0}-gate` have the same user id: each process needs its own")]
    Shared(String),
    /// A step failed.
    #[error("cannot {step}: {cause}")]
    Step {
        /// What was to be done.
        step: &'static str,
        /// What the kernel said.
        cause: String,
    },
    /// The kernel does not tell how many filters there are.
    #[error("cannot prove that system calls are limited: this kernel is older than Linux 5.9, or has no seccomp")]
    Unprovable,
    /// A privilege is still there.
    #[error("{0}, after it was given up")]
    NotGone(&'static str),
}

/// A process that has given up its privileges, but may still make every system call.
#[must_use = "the system calls are not limited yet"]
pub struct Unprivileged {
    filters: Filters,
}

impl Unprivileged {
    /// Kills this process, all of its threads, at any system call that is not in the list; then proves it.
    ///
    /// # Errors
    /// When the kernel refuses, or no filter is in force.
    pub fn allow_only(self, calls: &[Call]) -> Result<(), SandboxError> {
        step("limit the system calls", calls::allow_only(calls))?;
        self.filters.prove_one_more()
    }
}

/// Becomes `identity` with no group, no capability but `kept`, no way to gain any, no file and no core dump; then proves it.
/// Where the kernel has no Landlock, only a list of system calls keeps files away.
///
/// # Errors
/// At the first step that fails or whose effect does not show.
pub fn give_up_privileges(identity: Identity, kept: Option<Capability>) -> Result<Unprivileged, SandboxError> {
    let filters = Filters::of_this_thread()?;
    let kept: CapsHashSet = kept.into_iter().collect();
    for capability in caps::runtime::thread_all_supported().difference(&kept) {
        step("cut the bounding set", caps::drop(None, CapSet::Bounding, *capability))?;
    }
    step("keep a capability over the change of user", caps::securebits::set_keepcaps(!kept.is_empty()))?;
    let (uid, gid) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
    step("leave all groups", setgroups(&[]))?;
    step("change the group", setresgid(gid, gid, gid))?;
    step("change the user", setresuid(uid, uid, uid))?;
    cut_capabilities(&kept)?;
    step("forbid core dumps", set_dumpable_behavior(DumpableBehavior::NotDumpable))?;
    let has_landlock = restrict(AccessFs::from_all(LANDLOCK), &[], true)?;
    prove_identity(identity)?;
    prove_capabilities(&kept)?;
    if step("read the bounding set", caps::read(None, CapSet::Bounding))? != kept {
        return Err(SandboxError::NotGone("the bounding set allows capabilities"));
    }
    if step("read whether core dumps are made", dumpable_behavior())? != DumpableBehavior::NotDumpable {
        return Err(SandboxError::NotGone("core dumps are made"));
    }
    if has_landlock && File::open("/").is_ok() {
        return Err(SandboxError::NotGone("files can be opened"));
    }
    Ok(Unprivileged { filters })
}

/// Keeps root's identity, but of the capabilities only those of `kept` that are there; then proves it. What the process runs
/// has no more either, for no_new_privs holds for root too. The bounding set stays: without CAP_NET_RAW in it the kernel
/// would refuse to run a file that carries it, which this binary may do.
///
/// # Errors
/// As [`give_up_privileges`].
pub fn keep_only(kept: &[Capability]) -> Result<(), SandboxError> {
    let permitted = step("read the capabilities", caps::read(None, CapSet::Permitted))?;
    let kept = kept.iter().copied().filter(|capability| permitted.contains(capability)).collect();
    cut_capabilities(&kept)?;
    prove_capabilities(&kept)
}

/// Kills this process, or one that it starts, at any of the system calls of one list, and has those of the other missing.
///
/// # Errors
/// As [`give_up_privileges`].
pub fn forbid(calls: &[Call], missing: &[Call]) -> Result<(), SandboxError> {
    let filters = Filters::of_this_thread()?;
    step("forbid system calls", calls::forbid(calls))?;
    filters.prove_one_more()?;
    let filters = Filters::of_this_thread()?;
    step("hide system calls", calls::hide(missing))?;
    filters.prove_one_more()
}

/// From here on this process, and what it runs, changes no file but these and those below them; then proves it. `false` where
/// the kernel has no Landlock.
///
/// # Errors
/// As [`give_up_privileges`].
pub fn write_only_to(paths: &[&Path]) -> Result<bool, SandboxError> {
    // Sockets by their path are a kind of writing to Landlock since Linux 7.1, and the service manager's lies elsewhere.
    let writing = AccessFs::from_write(LANDLOCK) & !BitFlags::from(AccessFs::ResolveUnix);
    let has_landlock = restrict(writing, paths, false)?;
    // A file that root could write, if only it were allowed to, and that opening does not change.
    if has_landlock && File::options().write(true).open("/proc/self/comm").is_ok() {
        return Err(SandboxError::NotGone("any file can be written"));
    }
    Ok(has_landlock)
}

/// How many filters of system calls a thread is under: there may be a service manager's already. The file stays open, for a
/// process without files could not open it again.
struct Filters {
    status: File,
    before: u32,
}

impl Filters {
    fn of_this_thread() -> Result<Self, SandboxError> {
        let status = step("read its own status", File::open("/proc/thread-self/status"))?;
        let before = Self::count(&status)?;
        Ok(Self { status, before })
    }

    fn prove_one_more(&self) -> Result<(), SandboxError> {
        let is_one_more = Self::count(&self.status)?.checked_sub(self.before) == Some(1);
        if is_one_more { Ok(()) } else { Err(SandboxError::NotGone("every system call can be made")) }
    }

    fn count(mut status: &File) -> Result<u32, SandboxError> {
        let mut text = String::new();
        let read = status.rewind().and_then(|()| status.take(STATUS_LEN).read_to_string(&mut text));
        step("read its own status", read)?;
        let count = text.lines().find_map(|line| line.strip_prefix("Seccomp_filters:")?.trim().parse().ok());
        count.ok_or(SandboxError::Unprovable)
    }
}

fn cut_capabilities(kept: &CapsHashSet) -> Result<(), SandboxError> {
    step("clear the ambient set", caps::clear(None, CapSet::Ambient))?;
    step("clear the inheritable set", caps::clear(None, CapSet::Inheritable))?;
    step("cut the effective set", caps::set(None, CapSet::Effective, kept))?;
    step("cut the permitted set", caps::set(None, CapSet::Permitted, kept))?;
    step("forbid new privileges", set_no_new_privs(true))
}

/// Takes these kinds of access to files away, but for what is at or below `except`; and, with `isolates`, TCP ports, abstract
/// sockets and signals to others.
fn restrict(access: BitFlags<AccessFs>, except: &[&Path], isolates: bool) -> Result<bool, SandboxError> {
    let restrict = || -> Result<RestrictionStatus, RulesetError> {
        let mut ruleset = Ruleset::default().handle_access(access)?;
        if isolates {
            ruleset = ruleset.handle_access(AccessNet::from_all(LANDLOCK))?.scope(Scope::from_all(LANDLOCK))?;
        }
        ruleset.create()?.add_rules(path_beneath_rules(except, access))?.restrict_self()
    };
    let status = step("leave the files", restrict())?;
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}

fn prove_identity(identity: Identity) -> Result<(), SandboxError> {
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
    if setgroups(&[Gid::from_raw(identity.gid)]).is_ok() || !step("read the groups", getgroups())?.is_empty() {
        return Err(SandboxError::NotGone("a supplementary group is left"));
    }
    Ok(())
}

fn prove_capabilities(kept: &CapsHashSet) -> Result<(), SandboxError> {
    let all = caps::runtime::thread_all_supported();
    if all.difference(kept).any(|capability| caps::raise(None, CapSet::Permitted, *capability).is_ok()) {
        return Err(SandboxError::NotGone("a capability can be taken back"));
    }
    let none = CapsHashSet::new();
    for (set, expected) in
        [(CapSet::Effective, kept), (CapSet::Permitted, kept), (CapSet::Inheritable, &none), (CapSet::Ambient, &none)]
    {
        if step("read the capabilities", caps::read(None, set))? != *expected {
            return Err(SandboxError::NotGone("another set of capabilities is left"));
        }
    }
    if set_no_new_privs(false).is_ok() || !step("read no_new_privs", no_new_privs())? {
        return Err(SandboxError::NotGone("new privileges are allowed"));
    }
    Ok(())
}

fn step<T, E: std::fmt::Display>(step: &'static str, result: Result<T, E>) -> Result<T, SandboxError> {
    result.map_err(|cause| SandboxError::Step { step, cause: cause.to_string() })
}
