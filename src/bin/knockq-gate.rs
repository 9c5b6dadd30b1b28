//! The process of `knockq serve` that holds CAP_NET_ADMIN. It is a program of its own, so that nothing else is in it.

use std::process::{self, ExitCode};
use std::{env, panic};

use knockq::serve::gate::{self, write_line};

fn main() -> ExitCode {
    if env::args().nth(1).as_deref() != Some(env!("CARGO_PKG_VERSION")) {
        write_line(false, 3, "only `knockq serve` of the same version can start it");
        return ExitCode::FAILURE;
    }
    panic::set_hook(Box::new(|panic| {
        log(3, &format!("a fault in knockq: {}; stopping", panic.payload_as_str().unwrap_or("it panicked")));
        process::exit(101); // the default would make a call that kills
    }));
    match gate::run(log) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log(3, &error.to_string());
            error.hint().into_iter().for_each(|hint| log(3, &format!("Hint: {hint}")));
            ExitCode::FAILURE
        }
    }
}

/// Under systemd, lines have priorities.
fn log(priority: u8, text: &str) {
    write_line(env::args().nth(2).as_deref() == Some("--priorities"), priority, text);
}
