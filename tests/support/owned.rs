//! knockq, but for one of its processes, which belongs to an attacker. It hands its end of the channel to the test, which
//! plays it from then on, and sits there: it ends for no word of root, only with the test.
//!
//! Which process, and where the test listens, is in a file beside the program. If nobody listens there, the process is what it
//! should be.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use knockq::serve::channel::{Channel, Message};

fn main() -> ExitCode {
    let name = std::env::args().next().unwrap_or_default();
    match name.strip_prefix("knockq: ").and_then(player) {
        Some(test) => be_played(test),
        None => knockq::cli::main(),
    }
}

/// The test, if it plays this process and listens.
fn player(role: &str) -> Option<UnixStream> {
    let owned = fs::read_to_string(std::env::current_exe().ok()?.with_file_name("owned")).ok()?;
    let (owned, path) = owned.split_once(':')?;
    (owned == role).then(|| UnixStream::connect(path).ok())?
}

fn be_played(mut test: UnixStream) -> ExitCode {
    let channel = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    rustix::stdio::dup2_stdin(File::open("/dev/null").unwrap()).unwrap();
    Channel::new(test.try_clone().unwrap().into()).send(Message::Start, &[channel.as_fd()]).unwrap();
    drop(channel);
    let mut code = [0];
    let _ = test.read(&mut code);
    ExitCode::from(code[0])
}
