//! The system calls that each process may make, and why: what a stranger who takes a process over can still say to the kernel.

use std::collections::BTreeMap;
use std::env::consts::ARCH;
use std::ffi::c_int;

use libc::{
    AF_NETLINK, AF_UNIX, CLONE_NEWUSER, ENOSYS, F_DUPFD_CLOEXEC, F_GET_SEALS, F_GETFD, F_SETFD, NETLINK_NETFILTER,
    PROT_EXEC, SHUT_RD, SO_PEERCRED, SOL_SOCKET, SYS_accept4, SYS_add_key, SYS_bind, SYS_bpf, SYS_brk,
    SYS_clock_gettime, SYS_clock_nanosleep, SYS_clone, SYS_clone3, SYS_close, SYS_connect, SYS_delete_module,
    SYS_epoll_ctl, SYS_epoll_pwait, SYS_exit, SYS_exit_group, SYS_fcntl, SYS_fdatasync, SYS_finit_module, SYS_flock,
    SYS_fsmount, SYS_fstat, SYS_ftruncate, SYS_futex, SYS_getrandom, SYS_getsockname, SYS_getsockopt, SYS_init_module,
    SYS_io_uring_setup, SYS_ioctl, SYS_kexec_load, SYS_keyctl, SYS_lseek, SYS_madvise, SYS_mmap, SYS_mount,
    SYS_mount_setattr, SYS_move_mount, SYS_mprotect, SYS_mremap, SYS_munmap, SYS_nanosleep, SYS_open_by_handle_at,
    SYS_open_tree, SYS_perf_event_open, SYS_pivot_root, SYS_ppoll, SYS_pread64, SYS_process_vm_readv,
    SYS_process_vm_writev, SYS_ptrace, SYS_pwrite64, SYS_read, SYS_reboot, SYS_recvfrom, SYS_recvmsg, SYS_request_key,
    SYS_restart_syscall, SYS_rt_sigprocmask, SYS_rt_sigreturn, SYS_sched_yield, SYS_sendmsg, SYS_sendto, SYS_setns,
    SYS_shutdown, SYS_sigaltstack, SYS_socket, SYS_swapon, SYS_umount2, SYS_unshare, SYS_userfaultfd, SYS_write,
};
#[cfg(target_arch = "x86_64")]
use libc::{SYS_epoll_wait, SYS_kexec_file_load, SYS_poll};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};

/// One system call, as libc's header names it. A list may hold it several times, for different arguments.
pub struct Call {
    /// Its name.
    pub name: &'static str,
    /// Its number on this architecture.
    pub number: i64,
    /// What its arguments must be like, all of it.
    pub only: &'static [Argument],
    /// What for.
    pub why: &'static str,
}

/// What an argument, counted from 0, must be like.
#[derive(Clone, Copy)]
pub enum Argument {
    /// This value.
    Is(u8, c_int),
    /// Any value but this.
    IsNot(u8, c_int),
    /// None of these bits.
    Lacks(u8, c_int),
    /// All of these bits.
    Has(u8, c_int),
}
use Argument::{Has, Is, IsNot, Lacks};

/// FIONBIO, whose type differs between C libraries.
const NON_BLOCKING: c_int = 0x5421;

macro_rules! calls {
    ($($(#[$where:meta])? $name:ident $([$($only:expr),+])? $why:literal)*) => {
        &[$($(#[$where])? Call { name: stringify!($name), number: $name, only: &[$($($only),+)?], why: $why }),*]
    };
}

/// What the engine may do, all of its threads. No call of these takes a path, makes a socket or a process, or reaches
/// another one but where that has connected.
pub const ENGINE: &[Call] = calls! {
    SYS_read "records from the relay; new settings; being woken by the other thread"
    SYS_write "the log; waking the other thread"
    SYS_recvmsg "what root says, with the descriptors of new settings"
    SYS_recvfrom "what changed in the tables; the gate's answers; what root's commands want"
    SYS_sendmsg "what root is to do"
    SYS_sendto "commands to the gate; replies; events to those who watch"
    SYS_accept4 "who connects to the sockets that it was given"
    SYS_getsockopt [Is(1, SOL_SOCKET), Is(2, SO_PEERCRED)] "whose they are"
    SYS_shutdown [Is(1, SHUT_RD)] "who watches has nothing to say"
    SYS_close "settings that were read; watchers who went; the store, to open it anew after a failed write"
    SYS_fcntl [Is(1, F_GET_SEALS)] "new settings: nobody can change them any more"
    SYS_fcntl [Is(1, F_DUPFD_CLOEXEC)] "the store, to open it anew after a failed write"
    SYS_fcntl [Is(1, F_SETFD)] "the same (musl)"
    SYS_fcntl [Is(1, F_GETFD)] "a development build looks whether what it closes is open"

    SYS_pread64 "the store: pages"
    SYS_pwrite64 "the store: pages"
    SYS_lseek "the lengths of the store and of new settings; the proof that this list is in force"
    SYS_ftruncate "the store: it grows"
    SYS_fdatasync "the store: durable before anything is opened"
    SYS_flock "the store: no other process has it open"
    SYS_fstat "the store: whether it was deleted"

    SYS_epoll_pwait "waiting"
    #[cfg(target_arch = "x86_64")]
    SYS_epoll_wait "waiting"
    SYS_epoll_ctl "descriptors that are waited for no more, at the end"
    SYS_ppoll "waiting for the gate"
    #[cfg(target_arch = "x86_64")]
    SYS_poll "waiting for the gate"
    SYS_futex "waiting for the other thread, and for its end"
    SYS_sched_yield "waiting for the other thread, when it is about to be ready"
    SYS_clock_nanosleep "records gather under load (glibc)"
    SYS_nanosleep "records gather under load (musl)"
    SYS_restart_syscall "waiting goes on after SIGSTOP and SIGCONT"
    SYS_clock_gettime "the time, where the kernel does not lend it as memory"
    SYS_getrandom "seeds of hash tables"

    SYS_brk "memory"
    SYS_mmap [Lacks(2, PROT_EXEC)] "memory, never code"
    SYS_mprotect [Lacks(2, PROT_EXEC)] "memory, never code"
    SYS_mremap "memory"
    SYS_munmap "memory"
    SYS_madvise "memory"

    SYS_rt_sigreturn "the signals that are ignored"
    SYS_rt_sigprocmask "the end of a thread"
    SYS_sigaltstack "the end of a thread"
    SYS_exit "the end of a thread"
    SYS_exit_group "the end"
};

/// What the gate may do. It makes sockets to the packet filter and no others, and runs no program.
pub const GATE: &[Call] = calls! {
    SYS_recvfrom "packets from the queue; the kernel's answers"
    SYS_sendto "verdicts; doors"
    SYS_write "records to the relay; the log"
    SYS_recvmsg "commands; what root says, with the descriptors of new limits"
    SYS_sendmsg "answers to root and the engine"
    SYS_read "new limits"
    SYS_lseek "the length of new limits; the proof that this list is in force"
    SYS_close "limits that were read; a socket that owned the table, or had something listed"
    SYS_fcntl [Is(1, F_GET_SEALS)] "new limits: nobody can change them any more"
    SYS_fcntl [Is(1, F_GETFD)] "a development build looks whether what it closes is open"
    SYS_ppoll "waiting"
    #[cfg(target_arch = "x86_64")]
    SYS_poll "waiting"

    SYS_socket [Is(0, AF_NETLINK), Is(2, NETLINK_NETFILTER)] "another socket for doors, where the one before owned the table; one to have something listed"
    SYS_bind "that socket"
    SYS_getsockname "that socket: its number"
    SYS_connect "that socket, to the kernel"
    SYS_ioctl [Is(1, NON_BLOCKING)] "that socket: it never waits"

    SYS_restart_syscall "waiting goes on after SIGSTOP and SIGCONT"
    SYS_clock_gettime "the time, where the kernel does not lend it as memory"

    SYS_brk "memory"
    SYS_mmap [Lacks(2, PROT_EXEC)] "memory, never code"
    SYS_mprotect [Lacks(2, PROT_EXEC)] "memory, never code"
    SYS_mremap "memory"
    SYS_munmap "memory"
    SYS_madvise "memory"

    SYS_rt_sigreturn "the signals that are ignored"
    SYS_rt_sigprocmask "the end"
    SYS_sigaltstack "the end"
    SYS_exit_group "the end"
};

/// What root's process and what it runs, nft among it, never do. A list of what they may would be a list of what every
/// version of nft and its libraries does.
pub const NEVER: &[Call] = calls! {
    SYS_socket [IsNot(0, AF_UNIX), IsNot(0, AF_NETLINK)] "a network: nothing from outside is seen here"
    SYS_ptrace "another process's memory"
    SYS_process_vm_readv "another process's memory"
    SYS_process_vm_writev "another process's memory"
    SYS_mount "other files under known names"
    SYS_umount2 "other files under known names"
    SYS_fsmount "other files under known names"
    SYS_open_tree "other files under known names"
    SYS_move_mount "other files under known names"
    SYS_mount_setattr "other files under known names"
    SYS_pivot_root "other files under known names"
    SYS_setns "another's view of the machine"
    SYS_unshare "a namespace of its own, with all capabilities in it"
    SYS_clone [Has(0, CLONE_NEWUSER)] "the same"
    SYS_open_by_handle_at "files past their directories"
    SYS_init_module "code in the kernel"
    SYS_finit_module "code in the kernel"
    SYS_delete_module "code in the kernel"
    SYS_kexec_load "another kernel"
    #[cfg(target_arch = "x86_64")]
    SYS_kexec_file_load "another kernel"
    SYS_bpf "code in the kernel"
    SYS_perf_event_open "a large part of the kernel that nobody here needs"
    SYS_io_uring_setup "a large part of the kernel that nobody here needs"
    SYS_userfaultfd "a part of the kernel that nobody here needs"
    SYS_add_key "a part of the kernel that nobody here needs"
    SYS_request_key "a part of the kernel that nobody here needs"
    SYS_keyctl "a part of the kernel that nobody here needs"
    SYS_reboot "the machine's end"
    SYS_swapon "memory on disk"
};

/// What root's process and what it runs find missing, as on an older kernel. A filter cannot look at its arguments, which lie in
/// memory: it could make a namespace. C libraries then use `clone`.
pub const MISSING: &[Call] = calls! {
    SYS_clone3 "a namespace of its own, with all capabilities in it"
};

/// Kills this process, all of its threads, at any call that is not in the list.
///
/// # Errors
/// When the kernel has no such filters, or this architecture is not one of x86_64, aarch64 and riscv64.
pub fn allow_only(calls: &[Call]) -> Result<(), seccompiler::Error> {
    apply(calls, SeccompAction::KillProcess, SeccompAction::Allow)
}

/// Kills this process, or one that it starts, at any call that is in the list.
///
/// # Errors
/// As [`allow_only`].
pub fn forbid(calls: &[Call]) -> Result<(), seccompiler::Error> {
    apply(calls, SeccompAction::Allow, SeccompAction::KillProcess)
}

/// Answers this process, and those that it starts, as if the kernel had none of these system calls.
///
/// # Errors
/// As [`allow_only`].
pub fn hide(calls: &[Call]) -> Result<(), seccompiler::Error> {
    apply(calls, SeccompAction::Allow, SeccompAction::Errno(ENOSYS.cast_unsigned()))
}

fn apply(calls: &[Call], others: SeccompAction, these: SeccompAction) -> Result<(), seccompiler::Error> {
    let mut rules = BTreeMap::<i64, Vec<SeccompRule>>::new();
    for call in calls {
        rules.entry(call.number).or_default().extend(call.rule()?);
    }
    let program: BpfProgram = SeccompFilter::new(rules, others, these, ARCH.try_into()?)?.try_into()?;
    seccompiler::apply_filter_all_threads(&program)
}

impl Call {
    /// `None` where any arguments will do.
    fn rule(&self) -> Result<Option<SeccompRule>, BackendError> {
        let conditions = self.only.iter().map(Argument::condition).collect::<Result<Vec<_>, _>>()?;
        if conditions.is_empty() { Ok(None) } else { SeccompRule::new(conditions).map(Some) }
    }
}

impl Argument {
    fn condition(&self) -> Result<SeccompCondition, BackendError> {
        let (place, operator, value) = match *self {
            Is(place, value) => (place, SeccompCmpOp::Eq, value),
            IsNot(place, value) => (place, SeccompCmpOp::Ne, value),
            Lacks(place, bits) => (place, SeccompCmpOp::MaskedEq(u64::from(bits.cast_unsigned())), 0),
            Has(place, bits) => (place, SeccompCmpOp::MaskedEq(u64::from(bits.cast_unsigned())), bits),
        };
        SeccompCondition::new(place, SeccompCmpArgLen::Dword, operator, u64::from(value.cast_unsigned()))
    }
}
