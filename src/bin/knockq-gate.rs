//! The process of `knockq serve` that holds CAP_NET_ADMIN. It is a program of its own, so that nothing else is in it.

use std::process::{self, ExitCode};
use std::{env, panic};

use knockq::serve::gate;
use knockq::serve::line::Lines;

fn main() -> ExitCode {
    let priorities = env::args().nth(2).as_deref() == Some("--priorities");
    let lines = Lines { process: "gate", priorities };
    if env::args().nth(1).as_deref() != Some(env!("CARGO_PKG_VERSION")) {
        lines.error("only `knockq serve` of the same version can start it");
        return ExitCode::FAILURE;
    }
    panic::set_hook(Box::new(move |panic| {
        lines.error(&format!("a fault in knockq: {}; stopping", panic.payload_as_str().unwrap_or("it panicked")));
        process::exit(101); // the default would make a call that kills
    }));
    match gate::run(lines) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            lines.last_words(&error.to_string(), error.hint());
            ExitCode::FAILURE
        }
    }
}
