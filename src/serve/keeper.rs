//! The keeper: root, but it sees no packet and no frame. It reads the configuration, starts the others, loads the table,
//! and stops all when one of them dies.

use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use caps::{CapSet, Capability};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::low_level::pipe;
use thiserror::Error;
use tracing::{info, warn};

use super::channel::{Channel, Message, message_pair};
use super::handover;
use super::log::{self, Style};
use super::policy::{Opening, Policy};
use super::process::Process;
use super::sandbox::{Identity, SandboxError};
use super::verifier::Settings;
use crate::config::secure_file::{self, Privacy};
use crate::config::{ConfigError, FileError, ServerConfig};
use crate::nft::{self, Doors, ElementError, NftError, Ownership, Ruleset};
use crate::queue::relay;

/// Ids of the verifier where the configured account does not exist: `nobody`'s, as everywhere.
const VERIFIER_FALLBACK: u32 = 65_534;

/// Ids of the monitor where its account does not exist: it must not be the verifier's.
const MONITOR_FALLBACK: u32 = 65_533;

/// Time that a child has to become ready: ten thousand users take two seconds.
const START: Duration = Duration::from_secs(60);

/// Times that the table is loaded again before giving up, and the time between.
const RESTORE_TRIES: u32 = 100;
const RESTORE_PAUSE: Duration = Duration::from_millis(10);

/// Where the kernel lists who has which queue.
const QUEUES: &str = "/proc/net/netfilter/nfnetlink_queue";

/// Why the daemon does not start, or stops.
#[derive(Debug, Error)]
pub enum ServeError {
    /// Not enough privileges to begin with.
    #[error("serve: needs root with CAP_NET_ADMIN")]
    NotRoot,
    /// The configuration is refused.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The counter store is not there or not safe.
    #[error(transparent)]
    Store(FileError),
    /// The account is unusable.
    #[error(transparent)]
    Account(#[from] SandboxError),
    /// Another process has the queue.
    #[error("queue {number}: already bound by {owner}")]
    QueueTaken {
        /// Its number.
        number: u16,
        /// The process, as far as the kernel tells.
        owner: String,
    },
    /// nft did not load the table.
    #[error(transparent)]
    Nft(#[from] NftError),
    /// The table could not be made.
    #[error(transparent)]
    Table(#[from] ElementError),
    /// A child reported its own error and ended with this code.
    #[error("{process} could not start")]
    ChildFailed {
        /// Which.
        process: &'static str,
        /// Its exit code.
        code: u8,
    },
    /// A child died.
    #[error("{process} {end}; stopping all, and every door closes by its own timeout")]
    ChildDied {
        /// Which.
        process: &'static str,
        /// How.
        end: String,
    },
    /// A child did not become ready.
    #[error("{0} did not become ready within a minute")]
    TooSlow(&'static str),
    /// The kernel refused something.
    #[error("serve: {0}")]
    Io(#[from] io::Error),
}

/// Runs the daemon until it is told to stop.
///
/// # Errors
/// [`ServeError`]. Doors that are open stay open for the time that they have left; the gate stays shut.
pub fn run(config_path: &Path, style: Style) -> Result<(), ServeError> {
    log::start("knockq", style);
    let may = caps::has_cap(None, CapSet::Effective, Capability::CAP_NET_ADMIN).unwrap_or(false);
    if !rustix::process::geteuid().is_root() || !may {
        return Err(ServeError::NotRoot);
    }
    close_fds::set_fds_cloexec(3, &[]); // what we inherited is not for the children
    let config = ServerConfig::load(config_path)?;
    let mut keeper = Keeper::start(&config, config_path, style)?;
    let is_up = keeper.bring_up(&config);
    drop(config); // and with it the server's private key
    let served = is_up.and_then(|()| keeper.watch());
    if keeper.is_ready && matches!(served, Err(Ended::Failed(_))) {
        // Whatever it was: if the table is gone too, the gate must not stay open. If we own it, it cannot be.
        let _ = nft::load(&keeper.ruleset.to_string());
    }
    keeper.stop();
    match served {
        Err(Ended::Asked) | Ok(()) => {
            info!("stopped; doors that are open keep the time that they have left");
            Ok(())
        }
        Err(Ended::Failed(error)) => Err(error),
    }
}

/// Why the keeper leaves its work.
enum Ended {
    /// SIGTERM or SIGINT.
    Asked,
    Failed(ServeError),
}

impl<E: Into<ServeError>> From<E> for Ended {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

struct Keeper {
    monitor: Process,
    verifier: Process,
    ruleset: Ruleset,
    /// What `init` wrote beside the configuration.
    include_file: PathBuf,
    signals: [(i32, UnixStream); 3],
    /// What the children have said so far.
    said: Vec<(&'static str, Message)>,
    is_ready: bool,
}

/// What woke the keeper.
enum Event {
    Signal(i32),
    Message(&'static str, Message),
    Gone,
}

impl Keeper {
    /// Starts both children and hands each what is its own.
    fn start(config: &ServerConfig, config_path: &Path, style: Style) -> Result<Self, ServeError> {
        let [verifier, monitor] = accounts(config)?;
        let settings = handover::seal(&verifier_settings(config, verifier)?)?;
        let policy = handover::seal(&monitor_policy(config, monitor))?;
        let store = open_store(&config.store_path())?;
        refuse_taken_queue(config.queue)?;

        let signals = [SIGTERM, SIGINT, SIGHUP].map(|signal| {
            let (ours, handlers) = UnixStream::pair()?;
            pipe::register(signal, handlers)?;
            io::Result::Ok((signal, ours))
        });
        let [terminate, interrupt, hangup] = signals;
        let (relay_reader, relay_writer) = relay::pipe()?;
        let (frames_of_verifier, frames_of_monitor) = message_pair()?;
        let verifier = Process::spawn("verifier", style)?;
        let monitor = Process::spawn("monitor", style)?;
        verifier.send(Message::Start, &[&relay_reader, &frames_of_verifier, &settings, &store])?;
        monitor.send(Message::Start, &[&relay_writer, &frames_of_monitor, &policy])?;
        let ruleset = config.ruleset();
        Ok(Self {
            monitor,
            verifier,
            ruleset,
            include_file: config_path.with_file_name("knockq.nft"),
            signals: [terminate?, interrupt?, hangup?],
            said: Vec::new(),
            is_ready: false,
        })
    }

    /// The order matters: the verifier understands knocks, then the queue is bound, then the table sends it packets.
    fn bring_up(&mut self, config: &ServerConfig) -> Result<(), Ended> {
        self.wait_for("verifier", Message::Ready)?;
        self.wait_for("monitor", Message::Bound)?;
        let persists = load_table(&self.ruleset)?;
        self.monitor.send(Message::Loaded, &[])?;
        self.wait_for("monitor", Message::Ready)?;
        self.is_ready = true;
        if !persists {
            let hint = format!("include \"{}\" in /etc/nftables.conf", self.include_file.display());
            info!(
                hint,
                "others can flush the gate, for this kernel is older than Linux 6.9 or a plain table was there"
            );
        }
        let (users, services) = (config.users.len(), config.services.len());
        info!(users, services, knock_ports = %config.knock_ports, queue = config.queue, "ready");
        sd_notify::notify(&[sd_notify::NotifyState::Ready])?;
        Ok(())
    }

    /// Waits until it is told to stop or a child dies.
    fn watch(&mut self) -> Result<(), Ended> {
        loop {
            match self.next_event(None)? {
                Some(Event::Signal(SIGHUP)) => {
                    warn!("reload is not built yet: restart to apply a changed configuration");
                }
                Some(Event::Signal(_)) => return Err(Ended::Asked),
                Some(Event::Gone) => return Err(Ended::Failed(self.bury())),
                Some(Event::Message("monitor", Message::Lost)) => self.restore_table()?,
                Some(Event::Message(..)) | None => {}
            }
        }
    }

    /// The gate is open until this is done, so nothing comes before it. Whoever deleted the table may still be at it.
    fn restore_table(&mut self) -> Result<(), Ended> {
        let mut tries = 0;
        while let Err(error) = nft::load(&self.ruleset.to_string()) {
            tries += 1;
            if tries == RESTORE_TRIES {
                return Err(error.into());
            }
            std::thread::sleep(RESTORE_PAUSE);
        }
        self.monitor.send(Message::Loaded, &[])?;
        warn!("somebody else changed or deleted table inet knockq: it is loaded again, and open doors are open again");
        Ok(())
    }

    /// Waits until a child has said something, which it may have done already.
    fn wait_for(&mut self, process: &'static str, message: Message) -> Result<(), Ended> {
        let deadline = Instant::now() + START;
        while !self.said.contains(&(process, message)) {
            match self.next_event(Some(deadline))? {
                Some(Event::Message(from, said)) => self.said.push((from, said)),
                Some(Event::Signal(SIGHUP)) => {}
                Some(Event::Signal(_)) => return Err(Ended::Asked),
                Some(Event::Gone) => return Err(Ended::Failed(self.bury())),
                None => return Err(Ended::Failed(ServeError::TooSlow(process))),
            }
        }
        Ok(())
    }

    fn next_event(&self, deadline: Option<Instant>) -> io::Result<Option<Event>> {
        loop {
            let signals = self.signals.iter().map(|(_, stream)| stream.as_fd());
            let children = [&self.monitor, &self.verifier];
            let channels = children.iter().filter_map(|child| child.channel.as_ref()).map(AsFd::as_fd);
            let mut sources: Vec<PollFd<'_>> =
                signals.chain(channels).map(|source| PollFd::from_borrowed_fd(source, PollFlags::IN)).collect();
            let timeout = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            match poll(&mut sources, timeout.and_then(|time| Timespec::try_from(time).ok()).as_ref()) {
                Ok(0) => return Ok(None),
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            let is_ready: Vec<bool> = sources.iter().map(|source| !source.revents().is_empty()).collect();
            if let Some(((signal, stream), _)) = self.signals.iter().zip(&is_ready).find(|(_, ready)| **ready) {
                let mut byte = [0];
                (&mut &*stream).read_exact(&mut byte)?;
                return Ok(Some(Event::Signal(*signal)));
            }
            let is_ready = is_ready.iter().skip(self.signals.len());
            if let Some((child, _)) = children.iter().zip(is_ready).find(|(_, ready)| **ready) {
                return Ok(Some(match child.channel.as_ref().map(Channel::receive) {
                    Some(Ok(Some((message, _)))) => Event::Message(child.name, message),
                    _ => Event::Gone,
                }));
            }
        }
    }

    /// Ends both children and tells the cause: one that was killed, or else one that failed. A child whose peer is gone
    /// ends quietly.
    fn bury(&mut self) -> ServeError {
        let ends = self.end_children();
        let killed = ends.iter().find_map(|(process, status)| Some((*process, status.as_ref()?.signal()?)));
        let failed = ends
            .iter()
            .find_map(|(process, status)| Some((*process, status.as_ref()?.code().filter(|code| *code != 0)?)));
        match (killed, failed) {
            (Some((process, signal)), _) => {
                ServeError::ChildDied { process, end: format!("was killed by signal {signal}") }
            }
            (None, Some((process, code))) => ServeError::ChildFailed { process, code: u8::try_from(code).unwrap_or(1) },
            (None, None) => ServeError::ChildDied { process: "a child", end: "ended".to_owned() },
        }
    }

    fn stop(&mut self) {
        if self.is_ready {
            let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
        }
        self.end_children();
    }

    fn end_children(&mut self) -> [(&'static str, Option<ExitStatus>); 2] {
        for child in [&mut self.monitor, &mut self.verifier] {
            child.hang_up();
        }
        [&mut self.monitor, &mut self.verifier].map(|child| (child.name, child.end()))
    }
}

/// Whom verifier and monitor become, in this order.
///
/// # Errors
/// When an account is root's, or both have one user id: then each could reach into the other.
pub fn accounts(config: &ServerConfig) -> Result<[Identity; 2], ServeError> {
    let monitor = format!("{}-monitor", config.account);
    let accounts = [(&config.account, VERIFIER_FALLBACK), (&monitor, MONITOR_FALLBACK)];
    let [verifier, monitor] = accounts.map(|(account, fallback)| {
        let (identity, exists) = Identity::of_account(account, fallback)?;
        if !exists {
            let hint = format!("useradd --system --no-create-home --shell /usr/sbin/nologin {account}");
            warn!(hint, "there is no user `{account}`, so uid {fallback} stands in for it");
        }
        Ok::<_, SandboxError>(identity)
    });
    let (verifier, monitor) = (verifier?, monitor?);
    if verifier.uid == monitor.uid {
        return Err(SandboxError::Shared(config.account.clone()).into());
    }
    Ok([verifier, monitor])
}

fn verifier_settings(config: &ServerConfig, identity: Identity) -> Result<Settings, ServeError> {
    Ok(Settings {
        identity,
        server: *config.private_key.public(),
        store_path: config.store_path().display().to_string(),
        registry: config.registry()?,
    })
}

fn monitor_policy(config: &ServerConfig, identity: Identity) -> Policy {
    let openings = config.services.iter().flat_map(|service| {
        let (once, seconds) = (service.once, service.open_for);
        service.ports.iter().map(move |&port| Opening { port, once, seconds })
    });
    Policy { identity, queue: config.queue, openings: openings.collect() }
}

fn open_store(path: &Path) -> Result<OwnedFd, ServeError> {
    let file = secure_file::open(path, Privacy::Secret, OpenOptions::new().read(true).write(true));
    Ok(file.map_err(ServeError::Store)?.into())
}

/// The kernel would only say that it is not permitted.
///
/// # Errors
/// When a process has the queue, most likely a daemon that runs.
pub fn refuse_taken_queue(number: u16) -> Result<(), ServeError> {
    let queues = fs::read_to_string(QUEUES).unwrap_or_default();
    for line in queues.lines() {
        let mut fields = line.split_whitespace();
        if fields.next().and_then(|field| field.parse().ok()) == Some(number) {
            let port = fields.next().unwrap_or("?");
            let name = fs::read_to_string(format!("/proc/{port}/comm")).unwrap_or_default();
            let owner = match name.trim_end() {
                "" => format!("netlink port {port}"),
                name => format!("process {port} ({name})"),
            };
            return Err(ServeError::QueueTaken { number, owner });
        }
    }
    Ok(())
}

/// Loads the table, all or nothing; `true` if it persists without us and nobody else can flush it.
fn load_table(ruleset: &Ruleset) -> Result<bool, ServeError> {
    // Made and let go at once: nft fills the orphan, then the monitor adopts it.
    let ownership = Doors::new()?.own_table()?;
    let persists = ownership != Ownership::Unsupported;
    let loaded = nft::load(&if persists { ruleset.for_table_that_persists() } else { ruleset.to_string() });
    if loaded.is_err() && ownership == Ownership::Made {
        let _ = Doors::new()?.delete_table(); // it is empty; the error that is reported is the cause
    }
    loaded?;
    Ok(persists)
}
