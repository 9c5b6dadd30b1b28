//! `knockq status`

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args;

use super::columns::columns;
use super::failure::{Failure, PERMISSION};
use super::grants::{runtime, time_left};
use super::{ConfigArg, print, print_json, print_view};
use crate::client::clock;
use crate::serve::control::ControlError;
use crate::serve::observers;
use crate::serve::report::{self, ClockHealth, Doors, Knocks, Shut, StoreHealth, Syns, Table, TableMode};

#[derive(Args)]
#[command(after_help = "Examples:\n  knockq status\n  knockq status --json | jq .packets.unknown\n  \
                        knockq status --prometheus >knockq.prom.new; mv knockq.prom.new knockq.prom\n\n\
                        Root can ask, and the group of the daemon's account (`usermod -aG knockq NAME`), who can ask for \
                        nothing else. Numbers begin with the daemon's start.")]
pub(super) struct Status {
    /// As a JSON object
    #[arg(long, conflicts_with = "prometheus")]
    json: bool,
    /// As metrics, for the textfile collector of Prometheus' node_exporter
    #[arg(long)]
    prometheus: bool,
    #[command(flatten)]
    place: Place,
}

/// Where the daemon's sockets are.
#[derive(Args)]
pub(super) struct Place {
    #[command(flatten)]
    config: ConfigArg,
    /// The directory of the daemon's sockets, for who may not read the configuration (default: /run/knockq)
    #[arg(long, value_name = "DIR")]
    runtime: Option<PathBuf>,
}

impl Place {
    /// # Errors
    /// When a configuration that was named is not there.
    pub(super) fn directory(self) -> Result<PathBuf, Failure> {
        self.runtime.map_or_else(|| Ok(runtime(&self.config.config)?.0), Ok)
    }
}

impl Status {
    pub(super) fn run(self) -> Result<(), Failure> {
        let mut status = match observers::status(&self.place.directory()?) {
            Ok(status) => status,
            Err(error) => {
                if self.prometheus && matches!(error, ControlError::NotRunning { .. }) {
                    print(&metric(UP, &one(0)))?;
                }
                return Err(unseen(error));
            }
        };
        status.clock.synchronized = clock::is_synchronized();
        match (self.json, self.prometheus) {
            (true, _) => print_json(&status),
            (_, true) => print(&metrics(&status)),
            _ => print_view(&text(&status, clock::unix_now())).map(drop),
        }
    }
}

/// What those must do who may not look.
pub(super) fn unseen(error: ControlError) -> Failure {
    let failure = Failure::from(error);
    if failure.code == PERMISSION {
        return failure
            .hint("run this as root, or as a member of the group of the daemon's account: usermod -aG knockq NAME");
    }
    failure
}

/// For people.
fn text(status: &report::Status, now: u64) -> String {
    let mut text = String::new();
    for (head, line) in [
        ("up", up(status, now)),
        ("table", table(&status.table)),
        ("SYNs", syns(&status.syns)),
        ("doors", doors(&status.doors)),
        ("store", store(&status.store, now)),
        ("clock", clocks(&status.clock, now)),
    ] {
        let _ = writeln!(text, "{head:<6} {line}");
    }
    let counted = status.packets.iter().filter(|(_, count)| **count > 0);
    let rows: Vec<_> = counted.map(|(reason, count)| [reason.to_string(), count.to_string()]).collect();
    text += &under(["REASON", "PACKETS"], rows);
    let rows: Vec<_> = status.knocks.iter().map(|knocks| row(knocks, now)).collect();
    text += &under(["USER", "LAST OPENED", "FROM", "SERVICE", "LAST REFUSED", "FROM", "REASON"], rows);
    if status.is_cut {
        text += "\nThere are more users or doors than fit here.\n";
    }
    text
}

/// Rows below their head; nothing where there are none.
fn under<const N: usize>(head: [&str; N], mut rows: Vec<[String; N]>) -> String {
    if rows.is_empty() {
        return String::new();
    }
    rows.insert(0, head.map(str::to_owned));
    format!("\n{}", columns(&rows))
}

fn up(status: &report::Status, now: u64) -> String {
    let report::Status { version, uptime_seconds, users, services, reloaded, .. } = status;
    let reloaded = reloaded.map_or(String::new(), |reload| {
        let what = if reload.taken { "reloaded" } else { "a reload was refused" };
        format!("; {what} {}", ago(reload.at, now))
    });
    let up = time_left(*uptime_seconds);
    format!("{up}, knockq {version}, users {users}, services {services}{reloaded}")
}

/// A time in the past.
pub(super) fn ago(at: u64, now: u64) -> String {
    format!("{} ago", time_left(now.saturating_sub(at)))
}

fn table(table: &Table) -> String {
    let state = match (table.right, table.mode, table.owned) {
        (false, ..) => "NOT what it should be: guarded ports may be open, see the log",
        (true, TableMode::Managed, true) => "loaded; nobody else can change it",
        (true, TableMode::Managed, false) => "loaded; others can flush it",
        (true, TableMode::External, _) => "loaded by others, and as it should be",
    };
    let left = table.trial_seconds_left.map(|left| format!("; ON TRIAL: gone in {} unless confirmed", time_left(left)));
    format!("{state}{}", left.unwrap_or_default())
}

fn syns(syns: &Syns) -> String {
    let kernel = match (syns.waiting, syns.dropped_by_kernel) {
        (Some(waiting), Some(dropped)) => format!("{waiting} waiting, {dropped} dropped by the kernel"),
        _ => "the kernel does not tell of the queue".to_owned(),
    };
    format!("{} seen, {kernel}, {} by the relay", syns.seen, syns.dropped_by_relay)
}

fn doors(Doors { opened, not_opened, over_rate, open }: &Doors) -> String {
    let open = open.len();
    format!("{open} open; {opened} opened, {not_opened} not for a fault, {over_rate} not for grants_per_minute")
}

fn store(store: &StoreHealth, now: u64) -> String {
    let waiting = match (store.waiting, store.waiting_since) {
        (1.., Some(since)) => format!("; {} wait for the disk, the first came {}", store.waiting, ago(since, now)),
        _ => String::new(),
    };
    let doubt = store.in_doubt_until.map(|until| Shut::new(until, now).to_string());
    let state = match (store.failing_since, store.written) {
        (Some(since), _) => Some(format!("CANNOT be written, since {}", ago(since, now))),
        (None, _) if !store.answers => Some("the disk does NOT answer".to_owned()),
        (None, Some(written)) => Some(format!("last written {}", ago(written, now))),
        (None, None) if doubt.is_some() => None,
        (None, None) => Some("nothing was to be written yet".to_owned()),
    };
    let told: Vec<String> = doubt.into_iter().chain(state).collect();
    format!("{}{waiting}", told.join("; "))
}

fn clocks(clock: &ClockHealth, now: u64) -> String {
    let state = if clock.synchronized { "synchronized" } else { "NOT synchronized, as the kernel says" };
    let jump = clock.last_jump.map(|jump| {
        let way = if jump.seconds < 0 { "back" } else { "forward" };
        let by = time_left(jump.seconds.unsigned_abs());
        format!("; jumped {} times, the last {} by {by}, {way}", clock.jumps, ago(jump.at, now))
    });
    let narrowed = match clock.narrowed.as_slice() {
        [] => String::new(),
        [user] => format!("; many wrong tags for {user}: only clocks within 5 s count"),
        users => format!("; many wrong tags for {} users: only clocks within 5 s count for them", users.len()),
    };
    format!("{state}{}{narrowed}", jump.unwrap_or_default())
}

fn row(Knocks { user, granted, refused }: &Knocks, now: u64) -> [String; 7] {
    let granted = granted.as_ref().map(|last| [ago(last.at, now), last.source.to_string(), last.service.to_string()]);
    let refused = refused.as_ref().map(|last| {
        let source = last.source.map_or_else(String::new, |source| source.to_string());
        [ago(last.at, now), source, last.reason.to_string()]
    });
    let [opened, from, service] = granted.unwrap_or_default();
    let [refused, elsewhere, reason] = refused.unwrap_or_default();
    [user.to_string(), opened, from, service, refused, elsewhere, reason]
}

/// What a metric is called, and what it says.
type Title = (&'static str, &'static str);

const UP: Title = ("up", "Whether the daemon runs");

/// Metrics (<https://prometheus.io/docs/instrumenting/exposition_formats/>). No value needs to be escaped: names of users have
/// neither quotes nor backslashes.
fn metrics(status: &report::Status) -> String {
    let report::Status { syns, doors, store, clock, .. } = status;
    let of = |name: &str, value: &str| format!("{{{name}=\"{value}\"}}");
    let reasons = status.packets.iter().map(|(reason, count)| (of("reason", reason.as_str()), *count)).collect();
    let knocks = |last: fn(&Knocks) -> Option<u64>| -> Vec<(String, u64)> {
        let known = status.knocks.iter().filter_map(|knocks| Some((of("user", knocks.user.as_str()), last(knocks)?)));
        known.collect()
    };
    let granted = knocks(|knocks| knocks.granted.as_ref().map(|last| last.at));
    let refused = knocks(|knocks| knocks.refused.as_ref().map(|last| last.at));
    let reload = optional(status.reloaded.map(|reload| reload.taken.into()));
    let metrics: [(Title, Vec<(String, u64)>); 25] = [
        (UP, one(1)),
        (("info", "The daemon's version"), vec![(of("version", &status.version), 1)]),
        (("uptime_seconds", "Time since the daemon was ready"), one(status.uptime_seconds)),
        (("users", "Configured users"), one(status.users as u64)),
        (("services", "Configured services"), one(status.services as u64)),
        (("reload_ok", "Whether the last reload was taken"), reload),
        (("table_ok", "Whether the table is what it should be"), one(status.table.right.into())),
        (("syns_total", "SYNs taken from the queue"), one(syns.seen)),
        (("queue_length", "SYNs that wait in the queue"), optional(syns.waiting)),
        (("queue_dropped_total", "SYNs that the kernel dropped"), optional(syns.dropped_by_kernel)),
        (("relay_dropped_total", "SYNs that the engine never saw"), one(syns.dropped_by_relay)),
        (("packets_total", "Packets by their end"), reasons),
        (("doors", "Doors that are open"), one(doors.open.len() as u64)),
        (("doors_opened_total", "Doors opened or renewed"), one(doors.opened)),
        (("doors_failed_total", "Doors that could not be opened"), one(doors.not_opened)),
        (("doors_over_rate_total", "Knocks that grants_per_minute forbade"), one(doors.over_rate)),
        (("store_ok", "Whether counters can be written, and knocks are accepted"), one(store.ok.into())),
        (
            ("store_in_doubt_until_timestamp_seconds", "When knocks are accepted again, of a counter store in doubt"),
            optional(store.in_doubt_until),
        ),
        (("store_waiting", "Counters that wait for the disk"), one(store.waiting as u64)),
        (("store_written_timestamp_seconds", "When counters were last written"), optional(store.written)),
        (("clock_synchronized", "Whether the kernel calls the clock synchronized"), one(clock.synchronized.into())),
        (("clock_jumps_total", "Times that the clock jumped"), one(clock.jumps)),
        (("window_narrowed", "Users for whom wrong tags abound"), one(clock.narrowed.len() as u64)),
        (("user_granted_timestamp_seconds", "When a user last opened something"), granted),
        (("user_refused_timestamp_seconds", "When a knock of a user's was last refused"), refused),
    ];
    metrics.iter().map(|(title, values)| metric(*title, values)).collect()
}

fn one(value: u64) -> Vec<(String, u64)> {
    vec![(String::new(), value)]
}

fn optional(value: Option<u64>) -> Vec<(String, u64)> {
    value.map_or_else(Vec::new, one)
}

/// One metric with its values by their labels; nothing where there are none.
fn metric((name, help): Title, values: &[(String, u64)]) -> String {
    if values.is_empty() {
        return String::new();
    }
    let kind = if name.ends_with("_total") { "counter" } else { "gauge" };
    let values = values.iter().map(|(labels, value)| format!("knockq_{name}{labels} {value}\n"));
    format!("# HELP knockq_{name} {help}\n# TYPE knockq_{name} {kind}\n{}", values.collect::<String>())
}
