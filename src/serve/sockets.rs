//! The sockets that others connect to, as the child makes them that reads the configuration: the engine accepts there.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::unistd::{Gid, setegid};
use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, socket_with};
use rustix::process::umask;

use super::control::{ControlError, control_path, status_path, watch_path};

/// Clients that wait to be accepted.
const BACKLOG: i32 = 64;

/// Where clients come.
pub(super) struct Sockets {
    /// Root, with commands.
    pub(super) control: OwnedFd,
    /// Who wants to know the status.
    pub(super) status: OwnedFd,
    /// Who watches.
    pub(super) watch: OwnedFd,
}

impl Sockets {
    /// Listens: for root alone, and for root and this group. What is made by one who is of the group belongs to that.
    ///
    /// # Errors
    /// When another daemon does, or the directory cannot be made.
    pub(super) fn listen(directory: &Path, group: Option<u32>) -> Result<Self, ControlError> {
        let control = control_path(directory);
        if UnixStream::connect(&control).is_ok() {
            return Err(ControlError::Taken { path: control });
        }
        fs::create_dir_all(directory).map_err(|cause| ControlError::Io { path: control.clone(), cause })?;
        let (own, others) = (Gid::effective(), group.map_or(Gid::effective(), Gid::from_raw));
        Ok(Self {
            control: listener(control, SocketType::STREAM, Mode::XUSR | Mode::RWXG | Mode::RWXO, own)?,
            status: listener(status_path(directory), SocketType::STREAM, FOR_GROUP, others)?,
            watch: listener(watch_path(directory), SocketType::SEQPACKET, FOR_GROUP, others)?,
        })
    }
}

/// What others than user and group may not.
const FOR_GROUP: Mode = Mode::XUSR.union(Mode::XGRP).union(Mode::RWXO);

fn listener(path: PathBuf, kind: SocketType, mask: Mode, group: Gid) -> Result<OwnedFd, ControlError> {
    let _ = fs::remove_file(&path); // of a daemon before
    let listen = || -> io::Result<OwnedFd> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, kind, flags, None)?;
        let (address, own) = (SocketAddrUnix::new(&path)?, Gid::effective());
        if group != own {
            setegid(group)?;
        }
        let before = umask(mask);
        let bound = bind(&socket, &address);
        umask(before);
        if group != own {
            setegid(own)?;
        }
        bound?;
        rustix::net::listen(&socket, BACKLOG)?;
        Ok(socket)
    };
    listen().map_err(|cause| ControlError::Io { path: path.clone(), cause })
}
