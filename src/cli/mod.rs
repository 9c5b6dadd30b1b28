//! The command line: words into calls. `main` alone prints errors and picks exit codes.

mod check;
mod columns;
mod connect;
mod doctor;
mod explain;
mod failure;
mod grants;
mod host;
mod import;
mod init;
mod inspect;
mod keygen;
mod knock;
mod proxy;
mod recover;
mod ruleset;
mod send;
mod serve;
mod sockets;
mod status;
mod time;
mod user;
mod watch;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand};
use serde::Serialize;

use crate::client::send::give_up_raw_sockets;
use failure::{Failure, PERMISSION, USAGE};

/// Where the server's configuration is, unless `--config` names another file.
const CONFIG: &str = "/etc/knockq/knockq.toml";

#[derive(Parser)]
#[command(
    name = "knockq",
    version,
    about = "Hides network services: one SYN that looks like any other opens a closed port, for its sender, for a while",
    after_help = "Example, from nothing to an open door:\n  \
                  client$ knockq keygen\n  \
                  server# knockq init --protect tcp/22\n  \
                  server# knockq user add alice --key 'iMvpU…=' > alice.profile\n  \
                  server# knockq serve\n  \
                  client$ knockq host add home alice.profile\n  \
                  client$ knockq send home --wait\n\n\
                  Exit codes: 0 done, 1 failed, 64 usage, 77 permission, 78 configuration.",
    disable_help_subcommand = true
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Server: make key, configuration, counter store and nft include file
    Init(init::Init),
    /// Server: check configuration, keys and permissions
    Check(check::Check),
    /// Server: find out why a knock does not work
    Doctor(doctor::Doctor),
    /// Server: print the nft include file for this configuration
    Ruleset(ruleset::PrintRuleset),
    /// Server: run the daemon, in the foreground
    Serve(serve::Serve),
    /// Server: take the gate of `serve --try` for good
    Confirm(grants::Confirm),
    /// Server: which doors are open, for whom and how long
    Grants(grants::Grants),
    /// Server: shut open doors
    Revoke(grants::Revoke),
    /// Server: how the daemon is: what came, what became of it, who knocked last
    Status(status::Status),
    /// Server: what happens: grants, closings, refusals, reloads, faults
    Watch(watch::Watch),
    /// Server: what the SYNs were that were refused last, and what is wrong with them
    Explain(explain::Explain),
    /// Server: who may knock
    User(user::User),
    /// Server: take over the profiles of knockknock; on a client, that of one host
    Import(import::Import),
    /// Server: make a new counter store, after a restored backup or a lost one
    Recover(recover::Recover),
    /// Client: make this machine's key and print its public half
    Keygen(keygen::Keygen),
    /// Client: the hosts that one knocks at
    Host(host::Host),
    /// Client: knock
    Send(send::Send),
    /// Client: knock, connect, and pass standard input and output: a ProxyCommand for ssh
    Connect(connect::Connect),
    /// Client: a SOCKS 5 proxy that knocks at the hosts that one has a profile of
    Proxy(proxy::Proxy),
    /// One of the daemon's processes; only `knockq serve` can start it
    #[command(hide = true)]
    Configuration(serve::Configuration),
    /// One of the daemon's processes; only `knockq serve` can start it
    #[command(hide = true)]
    Engine(serve::Engine),
    /// What root has the include file written by
    #[command(hide = true)]
    Keep(serve::Keep),
}

impl Command {
    /// Whether it sends knocks.
    const fn knocks(&self) -> bool {
        match self {
            Self::Send(send) => !send.prints(),
            Self::Connect(_) | Self::Proxy(_) => true,
            _ => false,
        }
    }
}

#[derive(Args)]
struct ConfigArg {
    /// The server's configuration
    #[arg(long, value_name = "FILE", default_value = CONFIG)]
    config: PathBuf,
}

/// The commands with their options and words, hidden ones too: what manual pages, completions and tests are made from.
pub fn definition() -> clap::Command {
    Cli::command()
}

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(USAGE) } else { ExitCode::SUCCESS };
        }
    };
    // The binary may carry CAP_NET_RAW for what knocks, which gives it up itself; nothing else needs it. The daemon's
    // processes give up far more.
    if !cli.command.knocks()
        && let Err(error) = give_up_raw_sockets()
    {
        let _ = write!(io::stderr(), "{}", Failure::from(error));
        return ExitCode::from(PERMISSION);
    }
    let mark = if has_priorities(&cli.command) { "<3>" } else { "" };
    let done = match cli.command {
        Command::Init(init) => init.run(),
        Command::Check(check) => check.run(),
        Command::Doctor(doctor) => doctor.run(),
        Command::Ruleset(ruleset) => ruleset.run(),
        Command::Serve(serve) => serve.run(),
        Command::Confirm(confirm) => confirm.run(),
        Command::Grants(grants) => grants.run(),
        Command::Revoke(revoke) => revoke.run(),
        Command::Status(status) => status.run(),
        Command::Watch(watch) => watch.run(),
        Command::Explain(explain) => explain.run(),
        Command::User(user) => user.run(),
        Command::Import(import) => import.run(),
        Command::Recover(recover) => recover.run(),
        Command::Keygen(keygen) => keygen.run(),
        Command::Host(host) => host.run(),
        Command::Send(send) => send.run(),
        Command::Connect(connect) => connect.run(),
        Command::Proxy(proxy) => proxy.run(),
        Command::Configuration(configuration) => configuration.run(),
        Command::Engine(engine) => engine.run(),
        Command::Keep(keep) => keep.run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let text: String = failure.to_string().lines().map(|line| format!("{mark}{line}\n")).collect();
            let _ = write!(io::stderr(), "{text}");
            ExitCode::from(failure.code)
        }
    }
}

/// Whether the last words of a process of the daemon carry priorities, as its log does.
fn has_priorities(command: &Command) -> bool {
    match command {
        Command::Serve(serve) => serve.style().priorities,
        Command::Configuration(configuration) => configuration.style().priorities,
        Command::Engine(engine) => engine.style().priorities,
        _ => false,
    }
}

/// Prints what was asked for. A reader that went away before all was written is a failure, not a panic.
fn print(text: &str) -> Result<(), Failure> {
    write(text).map_err(unwritten)
}

/// Prints what is only looked at; `false` if its reader went away, as `head` does, who has seen enough.
fn print_view(text: &str) -> Result<bool, Failure> {
    match write(text) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        written => written.map(|()| true).map_err(unwritten),
    }
}

fn write(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush())
}

fn unwritten(error: io::Error) -> Failure {
    Failure::new(format!("stdout: {error}"))
}

/// Prints a result for programs to read, as much of it as they want.
fn print_json(value: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value).map_err(|error| Failure::new(format!("--json: {error}")))?;
    print_view(&(text + "\n")).map(drop)
}

/// Says something that is not the result.
fn note(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}
