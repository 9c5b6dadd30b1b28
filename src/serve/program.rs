//! Running a program for root: one at a time, with a text, for a minute at most.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::handover;

/// Where every distribution has it; never looked up by name, for this runs as root.
const NFT: &str = "/usr/sbin/nft";

/// Time after which it is killed.
pub(super) const TIME: Duration = Duration::from_secs(60);

/// Bytes that it may write: nft lists 65,535 doors in a sixth of it.
const ROOM: u64 = 64 << 20;

/// What a program says that has failed.
#[derive(PartialEq, Eq, Debug)]
pub(super) struct Failed {
    pub(super) said: String,
    /// Its exit code; 1 if it was killed.
    pub(super) code: u8,
}

/// Has nft do this with this text: what it has written.
///
/// # Errors
/// What it says is wrong, or why it cannot be run.
pub(super) fn nft(arguments: &[&str], text: &str) -> Result<String, Failed> {
    run(Path::new(NFT), arguments, text)
}

/// Runs a program with these arguments, no environment, and this text as standard input.
///
/// # Errors
/// As [`nft`].
pub(super) fn run(program: &Path, arguments: &[&str], text: &str) -> Result<String, Failed> {
    let failed = |error| Failed { said: format!("{}: {error}", program.display()), code: 1 };
    try_to_run(program, arguments, text).map_err(failed)?
}

fn try_to_run(program: &Path, arguments: &[&str], text: &str) -> io::Result<Result<String, Failed>> {
    let [output, said] = [memory()?, memory()?];
    let mut command = Command::new(program);
    command.args(arguments).env_clear().env("LC_ALL", "C").current_dir("/");
    command.stdin(handover::seal_bytes(text.as_bytes())?).stdout(output.try_clone()?).stderr(said.try_clone()?);
    let mut child = command.spawn()?;
    let process = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
    let deadline = Instant::now() + TIME;
    let left = || Timespec::try_from(deadline.saturating_duration_since(Instant::now())).unwrap_or_default();
    while poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&left())) == Err(Errno::INTR) {}
    let _ = child.kill(); // if it goes on
    let status = child.wait()?;
    if status.success() {
        return Ok(Ok(written(output)?));
    }
    let said = written(said)?;
    let said = if said.is_empty() { status.to_string() } else { said.trim_end().to_owned() };
    Ok(Err(Failed { said, code: status.code().and_then(|code| code.try_into().ok()).unwrap_or(1) }))
}

/// Memory for what a program writes, which does not grow.
fn memory() -> io::Result<File> {
    let memory = memfd_create("knockq", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&memory, ROOM)?;
    fcntl_add_seals(&memory, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok(memory.into())
}

/// What was written up to where the program stopped, whose place in it is ours.
fn written(mut memory: File) -> io::Result<String> {
    let length = memory.stream_position()?;
    memory.seek(SeekFrom::Start(0))?;
    let mut bytes = Vec::new();
    memory.take(length).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{Failed, run};

    fn sh(script: &str, text: &str) -> Result<String, (String, u8)> {
        run(Path::new("/bin/sh"), &["-c", script], text).map_err(|Failed { said, code }| (said, code))
    }

    #[test]
    fn what_a_program_writes_and_says_is_told_apart_and_has_its_bounds() {
        assert_eq!(sh("cat; echo said >&2", "text"), Ok("text".to_owned()));
        assert_eq!(sh("echo written; echo said >&2; exit 1", ""), Err(("said".to_owned(), 1)));
        assert_eq!(sh("exit 3", ""), Err(("exit status: 3".to_owned(), 3)));
        assert!(sh("head -c 70000000 /dev/zero", "").is_err());
        assert!(run(Path::new("/no/such/program"), &[], "").is_err());
    }
}
