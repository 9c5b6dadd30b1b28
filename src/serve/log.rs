//! One line an event on standard error: text for people, with `<N>` priorities under systemd.

use std::cell::Cell;
use std::panic::{self, PanicHookInfo};
use std::{fmt, io, process};

use tracing::{Event, Level, Subscriber, error};
use tracing_subscriber::filter::{LevelFilter, filter_fn};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::prelude::*;
use tracing_subscriber::registry::LookupSpan;

use super::watchers::ToWatchers;

/// How lines look.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Style {
    /// Each line begins with the priority of sd-daemon(3).
    pub priorities: bool,
    /// Lines for every packet too.
    pub debug: bool,
}

impl Style {
    /// As options of a child.
    pub fn flags(self) -> impl Iterator<Item = &'static str> {
        let flags = [("--priorities", self.priorities), ("--debug", self.debug)];
        flags.into_iter().filter(|(_, is_set)| *is_set).map(|(flag, _)| flag)
    }

    /// Under systemd, standard error is the journal's.
    pub fn of_environment(debug: bool) -> Self {
        Self { priorities: std::env::var_os("JOURNAL_STREAM").is_some(), debug }
    }
}

struct Lines {
    process: &'static str,
    priorities: bool,
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut line: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let (priority, word) = match *event.metadata().level() {
            Level::ERROR => (3, "error: "),
            Level::WARN => (4, "warning: "),
            Level::INFO => (6, ""),
            Level::DEBUG | Level::TRACE => (7, "debug: "),
        };
        if self.priorities {
            write!(line, "<{priority}>")?;
        }
        write!(line, "{}: {}", self.process, if self.priorities { "" } else { word })?;
        context.format_fields(line.by_ref(), event)?;
        writeln!(line)
    }
}

/// Sends this process's lines to standard error, and to those who watch.
pub fn start(process: &'static str, style: Style) {
    let level = if style.debug { Level::DEBUG } else { Level::INFO };
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(false)
        .with_writer(io::stderr)
        .log_internal_errors(false) // it would panic where standard error is a terminal that has gone
        .event_format(Lines { process, priorities: style.priorities })
        .with_filter(LevelFilter::from_level(level));
    let told = filter_fn(ToWatchers::are_told).with_max_level_hint(Level::DEBUG);
    let subscriber = tracing_subscriber::registry().with(lines).with(ToWatchers { process }.with_filter(told));
    // A second call in one process leaves the first in charge.
    let _ = tracing::subscriber::set_global_default(subscriber);
}

/// The exit code of a process that panicked.
const PANICKED: i32 = 101;

thread_local! {
    /// What is most likely at fault if this thread panics now.
    static SUSPECT: Cell<Option<&'static str>> = const { Cell::new(None) };
}

/// Does some work; if it panics, that is the most likely reason.
pub fn suspect<T>(reason: &'static str, work: impl FnOnce() -> T) -> T {
    SUSPECT.set(Some(reason));
    let done = work();
    SUSPECT.set(None);
    done
}

/// From here on a panic is a line like any other, and the end of this process by a call that it may make: the standard
/// library would first ask the kernel for the thread's number, and die of that without a word.
pub fn end_on_panic() {
    panic::set_hook(Box::new(|panic: &PanicHookInfo<'_>| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        let reason = SUSPECT.get().unwrap_or("a fault in knockq");
        error!(place, "{reason}: {}; stopping", panic.payload_as_str().unwrap_or("it panicked"));
        process::exit(PANICKED);
    }));
}
