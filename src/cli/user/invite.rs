//! `knockq user invite`: the only command that prints a private key, and only once.

use std::io::{self, IsTerminal};

use clap::Args;
use qrcode::render::unicode::Dense1x2;
use qrcode::{EcLevel, QrCode};
use rustix::fs::{FileType, fstat};
use rustix::termios::tcgetwinsize;
use zeroize::Zeroizing;

use super::apply;
use super::entry::Entry;
use super::profile::profile;
use crate::cli::failure::{CONFIGURATION, Failure, USAGE};
use crate::cli::{note, print};
use crate::client::TokenProfile;
use crate::config::secure_file;
use crate::crypto::{KeyError, PrivateKey};

/// Black on white, whatever the terminal's own colours are: not every reader takes an inverted code.
const BLACK_ON_WHITE: &str = "\x1b[30;47m";
const OWN_COLOURS: &str = "\x1b[0m";

/// Mode bits: anything at all for the group or for others.
const OPEN_TO_OTHERS: u32 = 0o077;

#[derive(Args)]
#[command(
    after_help = "Examples:\n  knockq user invite alice --allow ssh | ssh alice@laptop knockq host add home -\n  \
                        knockq user invite alice-phone --qr\n\n\
                        For somebody who cannot send you a public key. The profile holds the user's private key: whoever reads it can \
                        knock as them. It is printed once, and this host keeps the public key alone. If the profile is lost, \
                        remove the user and invite again."
)]
pub(super) struct Invite {
    /// Show the profile as a QR code, for a terminal that is large enough
    #[arg(long)]
    qr: bool,
    #[command(flatten)]
    entry: Entry,
}

impl Invite {
    pub(super) fn run(self) -> Result<(), Failure> {
        let config = self.entry.configuration()?;
        let name = &self.entry.name;
        let allowed = self.entry.allowed_services(&config)?;
        let key = PrivateKey::generate().map_err(|error: KeyError| Failure::new(format!("user {name}: {error}")))?;
        let profile = profile(&config, &self.entry.holder(*key.public(), &allowed, false))?;
        // All that could keep it from being read, before anybody is told of the key.
        check_stdout()?;
        let text = if self.qr { qr_code(&profile, &key)? } else { self.text(&profile, &key) };

        let path = self.entry.write(key.public(), &allowed, None)?;
        note(&format!("Wrote {}: the public key alone", path.display()));
        self.entry.warn_if_expired();
        note(&format!(
            "This profile holds {name}'s private key and is not shown again. Whoever reads it can knock as {name}."
        ));
        note("It is for one machine, where `knockq host add HOSTNAME -` imports it, which must show this:");
        note(&format!("server key fingerprint: {}", config.private_key.public().fingerprint()));
        print(&text).map_err(|failure| match secure_file::remove(&path) {
            Ok(()) => failure.hint(format!("user {name} was not added: nobody has the private key. Invite again")),
            Err(_) => failure.hint(format!("nobody has the private key: knockq user remove {name}, and invite again")),
        })?;
        apply(self.entry.config())
    }

    fn text(&self, profile: &TokenProfile, key: &PrivateKey) -> Zeroizing<String> {
        let profile = profile.to_invitation(key);
        let head = format!("# knockq profile of {}: holds a private key, for one machine\n", self.entry.name);
        Zeroizing::new([head.as_str(), &profile].concat())
    }
}

/// A private key goes where nobody else reads it, and where somebody can.
fn check_stdout() -> Result<(), Failure> {
    let stdout = io::stdout();
    let stat = fstat(&stdout).map_err(|errno| Failure::new(format!("stdout: {errno}")))?;
    let mode = stat.st_mode & 0o7777;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile if mode & OPEN_TO_OTHERS != 0 => Err(Failure::new(format!(
            "stdout: is a file that others can read (mode {mode:04o}), and is to hold a private key"
        ))
        .hint("take it away, and say `umask 077` before you have another made")
        .code(CONFIGURATION)),
        FileType::CharacterDevice if !stdout.is_terminal() => {
            Err(Failure::new("stdout: is a device, where the private key would be lost".to_owned())
                .hint("leave it on the terminal, or pipe it to where the user is"))
        }
        _ => Ok(()),
    }
}

/// In half blocks, with the quiet zone that readers need.
fn qr_code(profile: &TokenProfile, key: &PrivateKey) -> Result<Zeroizing<String>, Failure> {
    let text = profile.to_invitation(key);
    let code = QrCode::with_error_correction_level(text.as_bytes(), EcLevel::L).map_err(|_| {
        Failure::new(format!("--qr: the profile has {} bytes, and no QR code holds as many", text.len()))
            .hint("leave out --qr, or allow fewer services, or write knock_ports as ranges")
            .code(USAGE)
    })?;
    let image = Zeroizing::new(code.render::<Dense1x2>().quiet_zone(true).build());
    let lines: Vec<&str> = image.lines().collect();
    // A line is said after it, and then the prompt comes.
    let width = lines.iter().map(|line| line.chars().count()).max().unwrap_or_default();
    check_room(width, lines.len() + 2)?;
    let coloured: Vec<Zeroizing<String>> =
        lines.iter().map(|line| Zeroizing::new([BLACK_ON_WHITE, line, OWN_COLOURS, "\n"].concat())).collect();
    Ok(Zeroizing::new(coloured.iter().map(|line| line.as_str()).collect::<Vec<_>>().concat()))
}

/// A code that is wrapped, or scrolls away, cannot be read. What is no terminal has no size.
fn check_room(width: usize, height: usize) -> Result<(), Failure> {
    let Ok(size) = tcgetwinsize(io::stdout()) else { return Ok(()) };
    let (columns, rows) = (usize::from(size.ws_col), usize::from(size.ws_row));
    if columns == 0 || rows == 0 || (width <= columns && height <= rows) {
        return Ok(());
    }
    Err(Failure::new(format!(
        "--qr: the terminal has {columns} columns and {rows} rows, and the code takes {width} and {height}"
    ))
    .hint("make the terminal larger, or its letters smaller; or leave out --qr"))
}
