//! `knockq keygen`

use clap::Args;

use super::failure::Failure;
use super::{note, print};
use crate::client::Home;

#[derive(Args)]
#[command(
    after_help = "Example:\n  knockq keygen\n\nThe private key stays in ~/.config/knockq/key. One key belongs to one machine,\nand is good for every server."
)]
pub(super) struct Keygen {
    /// Print the public half of the key that is there
    #[arg(long)]
    show: bool,
}

impl Keygen {
    pub(super) fn run(self) -> Result<(), Failure> {
        let home = Home::of_environment()?;
        if self.show {
            return print(&format!("{}\n", home.key()?.public()));
        }
        if home.key_path().exists() {
            return Err(Failure::new(format!("{}: there is a key already", home.key_path().display()))
                .hint(
                    "`knockq keygen --show` prints its public half, which is good for every server; another device makes a key \
                     of its own. To replace this one, move it away",
                ));
        }
        let key = home.make_key()?;
        note("Send this public key to the administrator of the server, who runs `knockq user add`:");
        print(&format!("{}\n", key.public()))
    }
}
