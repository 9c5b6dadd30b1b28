//! Runs a command up to its n-th system call and no further, as a crash would have it.

use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

/// Kills the command when it is about to make its call of this number, counted from 0. If it ends before: what it printed.
///
/// It must have one thread, and print no more than a pipe holds.
#[track_caller]
pub fn run_until_call(command: Command, call: usize) -> Option<String> {
    // A shell that waits for a line can be taken hold of before it becomes the command.
    let mut shell = Command::new("/bin/sh");
    shell
        .args(["-c", "echo ready; read line; exec \"$@\" </dev/null", "sh"])
        .arg(command.get_program())
        .args(command.get_args());
    let set = command.get_envs().filter_map(|(name, value)| Some((name, value?)));
    shell.env_clear().envs(set).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = shell.spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 6]).unwrap(); // it is a shell by now
    let process = Pid::from_raw(child.id().cast_signed());
    ptrace::attach(process).unwrap();
    assert_eq!(waitpid(process, None).unwrap(), WaitStatus::Stopped(process, Signal::SIGSTOP));
    use ptrace::Options;
    let options = Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_TRACEEXEC | Options::PTRACE_O_EXITKILL;
    ptrace::setoptions(process, options).unwrap();
    child.stdin.take().unwrap().write_all(b"go\n").unwrap();

    ptrace::cont(process, None).unwrap();
    assert!(matches!(waitpid(process, None).unwrap(), WaitStatus::PtraceEvent(..)), "it becomes the command");
    ptrace::syscall(process, None).unwrap();
    assert_eq!(waitpid(process, None).unwrap(), WaitStatus::PtraceSyscall(process), "the end of exec");
    let is_killed = (0..=call).all(|number| goes_to_next_call(process, number > 0));
    if is_killed {
        child.kill().unwrap();
    }
    let end = child.wait().ok().and_then(|status| status.signal()); // one that has ended was waited for already
    assert_eq!(end.is_some(), is_killed);
    let mut printed = String::new();
    stdout.read_to_string(&mut printed).unwrap();
    (!is_killed).then_some(printed)
}

/// Lets it make the call that it stands before, if there is one, and run to the next; false if it ended well.
fn goes_to_next_call(process: Pid, is_before_call: bool) -> bool {
    for _ in 0..if is_before_call { 2 } else { 1 } {
        ptrace::syscall(process, None).unwrap();
        match waitpid(process, None).unwrap() {
            WaitStatus::PtraceSyscall(_) => {}
            WaitStatus::Exited(_, 0) => return false,
            other => panic!("{other:?}"),
        }
    }
    true
}
