//! Takes over threads of running processes, as a debugger does: to do what their own code never would, or to hold them at
//! an exact instant.

use std::time::{Duration, Instant};
use std::{fs, thread};

use nix::errno::Errno;
use nix::libc::user_regs_struct;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::lab::PATIENCE;

/// Numbers of system calls, on x86_64.
pub(crate) const PWRITE64: u64 = 18;
pub(crate) const SENDTO: u64 = 44;
pub(crate) const SENDMSG: u64 = 46;
pub(crate) const FDATASYNC: u64 = 75;
pub(crate) const FTRUNCATE: u64 = 77;
pub(crate) const OPEN: u64 = 2;
pub(crate) const OPENAT: u64 = 257;
pub(crate) const PPOLL: u64 = 271;

pub(crate) fn threads(process: Pid) -> Vec<Pid> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap();
    tasks.map(|task| Pid::from_raw(task.unwrap().file_name().to_str().unwrap().parse().unwrap())).collect()
}

pub(crate) fn other_thread(process: Pid) -> Pid {
    threads(process).into_iter().find(|thread| *thread != process).unwrap()
}

/// A thread that goes from one system call to the next as the test says. Only the thread of the test that attached it may.
pub(crate) struct Traced {
    thread: Pid,
}

impl Traced {
    pub(crate) fn attach(thread: Pid) -> Self {
        ptrace::attach(thread).unwrap();
        let traced = Self { thread };
        let mut stop = traced.wait();
        if stop == WaitStatus::Stopped(thread, Signal::SIGTRAP) {
            ptrace::cont(thread, None).unwrap(); // its program was just about to begin
            stop = traced.wait();
        }
        assert_eq!(stop, WaitStatus::Stopped(thread, Signal::SIGSTOP));
        ptrace::setoptions(thread, Options::PTRACE_O_TRACESYSGOOD).unwrap();
        traced
    }

    /// Lets it run until it is about to make one of these calls, by their numbers; tells which.
    #[track_caller]
    pub(crate) fn run_to(&self, numbers: &[u64]) -> u64 {
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            let registers = self.next_stop();
            if is_entry(&registers) && numbers.contains(&registers.orig_rax) {
                return registers.orig_rax;
            }
        }
        panic!("the thread makes none of the calls {numbers:?}");
    }

    /// Lets it run until it starts a process, and holds that one where its program begins.
    #[track_caller]
    pub(crate) fn run_to_child(&self) -> Self {
        // A child has its parent's options.
        let options = Options::PTRACE_O_TRACEFORK | Options::PTRACE_O_TRACEVFORK | Options::PTRACE_O_TRACEEXEC;
        ptrace::setoptions(self.thread, Options::PTRACE_O_TRACESYSGOOD | options).unwrap();
        self.run_to_event();
        let child = Self { thread: Pid::from_raw(ptrace::getevent(self.thread).unwrap().try_into().unwrap()) };
        assert_eq!(child.wait(), WaitStatus::Stopped(child.thread, Signal::SIGSTOP));
        child.run_to_event();
        for thread in [self.thread, child.thread] {
            ptrace::setoptions(thread, Options::PTRACE_O_TRACESYSGOOD).unwrap();
        }
        child
    }

    #[track_caller]
    fn run_to_event(&self) {
        let mut signal = None;
        loop {
            ptrace::cont(self.thread, signal).unwrap();
            match self.wait() {
                WaitStatus::PtraceEvent(..) => return,
                WaitStatus::Stopped(_, sent) => signal = Some(sent),
                other => panic!("{other:?}"),
            }
        }
    }

    /// Kills its process, which never goes on.
    pub(crate) fn kill(self) {
        kill(self.thread, Signal::SIGKILL).unwrap();
        self.bury();
    }

    /// Lets it make the call that it is about to make; tells the result.
    pub(crate) fn finish(&self) -> i64 {
        self.next_stop().rax.cast_signed()
    }

    /// Has the call that it is about to make fail as if the kernel had refused it.
    pub(crate) fn refuse(&self, error: Errno) {
        let mut asked = ptrace::getregs(self.thread).unwrap();
        let descriptor = std::mem::replace(&mut asked.rdi, u64::MAX); // with which it does nothing
        ptrace::setregs(self.thread, asked).unwrap();
        let mut answered = self.next_stop();
        answered.rdi = descriptor; // which its code may still hold there
        answered.rax = (-i64::from(error as i32)).cast_unsigned();
        ptrace::setregs(self.thread, answered).unwrap();
    }

    /// Lets it run freely again.
    pub(crate) fn release(self) {
        ptrace::detach(self.thread, None).unwrap();
    }

    /// Sees it die, after its process was killed or has ended: until then its parent waits for it in vain.
    pub(crate) fn bury(self) {
        let end = self.wait();
        assert!(matches!(end, WaitStatus::Signaled(..) | WaitStatus::Exited(..)), "{end:?}");
    }

    #[track_caller]
    fn next_stop(&self) -> user_regs_struct {
        let mut signal = None;
        loop {
            ptrace::syscall(self.thread, signal).unwrap();
            match self.wait() {
                WaitStatus::PtraceSyscall(_) => return ptrace::getregs(self.thread).unwrap(),
                WaitStatus::Stopped(_, Signal::SIGTRAP) => signal = None, // another program begins
                WaitStatus::Stopped(_, sent) => signal = Some(sent),
                other => panic!("{other:?}"),
            }
        }
    }

    /// Waits for its next stop or its end, which must come.
    #[track_caller]
    fn wait(&self) -> WaitStatus {
        let start = Instant::now();
        loop {
            let status = waitpid(self.thread, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG)).unwrap();
            if status != WaitStatus::StillAlive {
                return status;
            }
            assert!(start.elapsed() < PATIENCE, "the thread does not get there");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// The kernel has this result in store for a call that it has not made.
fn is_entry(registers: &user_regs_struct) -> bool {
    const ENOSYS: i64 = -38;
    registers.rax.cast_signed() == ENOSYS
}

/// Makes a thread of another process do a system call, as one could who owns it: its result, or the signal that killed it.
pub(crate) fn call(thread: Pid, number: u64, arguments: [u64; 3]) -> Result<i64, Signal> {
    let mut before = stop_in_call(thread);
    before.rip -= SYSCALL_LEN; // the thread stands behind the instruction that brought it into the kernel
    let mut asked = before;
    [asked.rax, asked.orig_rax] = [number, u64::MAX];
    [asked.rdi, asked.rsi, asked.rdx] = arguments;
    ptrace::setregs(thread, asked).unwrap();
    ptrace::step(thread, None).unwrap();
    match waitpid(thread, Some(WaitPidFlag::__WALL)).unwrap() {
        WaitStatus::Signaled(_, signal, _) => return Err(signal),
        WaitStatus::Stopped(_, Signal::SIGTRAP) => {}
        other => panic!("{other:?}"),
    }
    let result = ptrace::getregs(thread).unwrap().rax.cast_signed();
    // Then what it was doing, again from the beginning.
    [before.rax, before.orig_rax] = [before.orig_rax, u64::MAX];
    ptrace::setregs(thread, before).unwrap();
    ptrace::detach(thread, None).unwrap();
    Ok(result)
}

/// Bytes of the instruction `syscall`.
const SYSCALL_LEN: u64 = 2;

/// Stops a thread while it waits in the kernel, which it nearly always does: then what it was doing can be begun again.
fn stop_in_call(thread: Pid) -> user_regs_struct {
    const INTERRUPTED: [i64; 5] = [-4, -512, -513, -514, -516]; // EINTR, ERESTARTSYS and its kind
    loop {
        ptrace::attach(thread).unwrap();
        let stopped = waitpid(thread, Some(WaitPidFlag::__WALL)).unwrap();
        assert_eq!(stopped, WaitStatus::Stopped(thread, Signal::SIGSTOP));
        let registers = ptrace::getregs(thread).unwrap();
        if registers.orig_rax != u64::MAX && INTERRUPTED.contains(&registers.rax.cast_signed()) {
            return registers;
        }
        ptrace::detach(thread, None).unwrap();
        thread::sleep(Duration::from_millis(10));
    }
}
