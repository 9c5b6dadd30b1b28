//! The process of `knockq serve` that stays root. It is a program of its own, so that nothing else is in it.

use std::path::PathBuf;
use std::process::{self, ExitCode};
use std::{env, panic};

use knockq::serve::line::Lines;
use knockq::serve::root::{self, Start};

fn main() -> ExitCode {
    close_fds::set_fds_cloexec(3, &[]); // what we inherited is not for the children
    let mut arguments = env::args_os().skip(1);
    let mut text = || arguments.next().map(|argument| argument.to_string_lossy().into_owned()).unwrap_or_default();
    let (version, trial, knockq, gate) = (text(), text(), text(), text());
    let Some(config) = arguments.next().map(PathBuf::from).filter(|_| version == env!("CARGO_PKG_VERSION")) else {
        Lines { process: "knockq", priorities: false }.error("only `knockq serve` of the same version can start it");
        return ExitCode::FAILURE;
    };
    let flags: Vec<String> = arguments.map(|argument| argument.to_string_lossy().into_owned()).collect();
    let lines = Lines { process: "knockq", priorities: flags.iter().any(|flag| flag == "--priorities") };
    panic::set_hook(Box::new(move |panic| {
        lines.error(&format!("a fault in knockq: {}; stopping", panic.payload_as_str().unwrap_or("it panicked")));
        process::exit(101);
    }));
    let [knockq, gate] = [knockq, gate].map(|number| PathBuf::from(format!("/proc/self/fd/{number}")));
    match root::run(Start { config, trial: trial.parse().ok(), flags, knockq, gate, lines }) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if !matches!(error, root::RootError::ChildFailed { .. }) {
                lines.last_words(&error.to_string(), error.hint());
            }
            ExitCode::from(error.code())
        }
    }
}
