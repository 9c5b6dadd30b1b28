//! `knockq status`

use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::PathBuf;

use clap::Args;
use serde::{Serialize, Serializer};

use super::columns::columns;
use super::failure::{Failure, PERMISSION};
use super::grants::{runtime, time_left};
use super::{ConfigArg, print, print_json, print_view};
use crate::client::clock;
use crate::serve::control::ControlError;
use crate::serve::observers;
use crate::serve::report::{self, DaemonPart, DoorsPart, KnocksPart, LiveDoor, Queue, StoreHealth, Table};
use crate::service::Name;

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

/// What is shown. Times are Unix seconds.
#[derive(Serialize)]
struct Shown {
    version: &'static str,
    uptime_seconds: u64,
    users: usize,
    services: usize,
    reloaded: Option<Reloaded>,
    table: ShownTable,
    syns: Syns,
    #[serde(serialize_with = "as_object")]
    packets: Vec<Count>,
    doors: Doors,
    knocks: Vec<Knocks>,
    store: Store,
    clock: Clock,
    /// There was more to tell than there is room for.
    is_cut: bool,
}

#[derive(Serialize)]
struct Reloaded {
    at: u64,
    taken: bool,
}

#[derive(Serialize)]
struct ShownTable {
    mode: &'static str,
    right: bool,
    owned: bool,
    trial_seconds_left: Option<u64>,
}

#[derive(Serialize)]
struct Syns {
    seen: u64,
    queue: Option<u16>,
    waiting: Option<u64>,
    dropped_by_kernel: Option<u64>,
    dropped_by_relay: u64,
}

/// How many packets ended so.
struct Count {
    reason: &'static str,
    count: u64,
}

#[derive(Serialize)]
struct Doors {
    opened: u64,
    not_opened: u64,
    over_rate: u64,
    open: Vec<LiveDoor>,
}

#[derive(Serialize)]
struct Knocks {
    user: Name,
    granted: Option<LastGrant>,
    refused: Option<LastRefusal>,
}

#[derive(Serialize)]
struct LastGrant {
    at: u64,
    source: IpAddr,
    service: Name,
}

#[derive(Serialize)]
struct LastRefusal {
    at: u64,
    source: Option<IpAddr>,
    reason: &'static str,
    hint: Option<&'static str>,
}

#[derive(Serialize)]
struct Store {
    ok: bool,
    /// No knocks are accepted until then.
    in_doubt_until: Option<u64>,
    /// The same, as it is told.
    #[serde(skip)]
    doubt: Option<String>,
    #[serde(skip)]
    is_silent: bool,
    written: Option<u64>,
    failing_since: Option<u64>,
    waiting: usize,
    waiting_since: Option<u64>,
}

#[derive(Serialize)]
struct Clock {
    synchronized: bool,
    jumps: u64,
    last_jump: Option<Jump>,
    /// For whom.
    narrowed: Vec<Name>,
}

#[derive(Serialize)]
struct Jump {
    at: u64,
    seconds: i64,
}

fn as_object<S: Serializer>(packets: &[Count], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(packets.iter().map(|packets| (packets.reason, packets.count)))
}

/// Seconds that a counter may wait for the disk before that is a trouble.
const SLOW: u64 = 10;

impl Status {
    pub(super) fn run(self) -> Result<(), Failure> {
        let status = match observers::status(&self.place.directory()?) {
            Ok(status) => status,
            Err(error) => {
                if self.prometheus && matches!(error, ControlError::NotRunning { .. }) {
                    print(&metric("knockq_up", "gauge", "Whether the daemon runs", &[(String::new(), 0)]))?;
                }
                return Err(unseen(error));
            }
        };
        let now = clock::unix_now();
        let shown = Shown::of(status, now);
        match (self.json, self.prometheus) {
            (true, _) => print_json(&shown),
            (_, true) => print(&shown.metrics()),
            _ => print_view(&shown.text(now)).map(drop),
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

impl Shown {
    fn of(status: report::Status, now: u64) -> Self {
        let report::Status { daemon, knocks: verifier, doors } = status;
        let DaemonPart { uptime, users, services, table, queue, reloaded, waits_for_disk } = daemon;
        let DoorsPart { seen, lost, opened, not_opened, doors, is_cut } = doors;
        let is_cut = is_cut || verifier.is_cut;
        let packets = verifier.counts().map(|(reason, count)| Count { reason: reason.as_str(), count });
        let packets: Vec<Count> = packets.collect();
        let over_rate = packets.iter().find(|count| count.reason == "over_rate").map_or(0, |count| count.count);
        let clock = Clock {
            synchronized: clock::is_synchronized(),
            jumps: verifier.jumps,
            last_jump: verifier.last_jump.map(|(at, seconds)| Jump { at, seconds }),
            narrowed: verifier.narrowed.clone(),
        };
        Self {
            version: env!("CARGO_PKG_VERSION"),
            uptime_seconds: uptime,
            users,
            services,
            reloaded: reloaded.map(|(at, taken)| Reloaded { at, taken }),
            table: ShownTable::of(&table),
            syns: Syns::of(seen, lost, queue),
            packets,
            doors: Doors { opened, not_opened, over_rate, open: sorted(doors) },
            store: Store::of(&verifier, waits_for_disk, now),
            clock,
            knocks: knocks(verifier),
            is_cut,
        }
    }
}

fn sorted(mut doors: Vec<LiveDoor>) -> Vec<LiveDoor> {
    doors.sort_by_key(|door| (door.source, door.port, door.once));
    doors
}

impl ShownTable {
    const fn of(table: &Table) -> Self {
        let mode = if table.is_managed { "managed" } else { "external" };
        Self { mode, right: table.is_right, owned: table.is_owned, trial_seconds_left: table.trial }
    }
}

impl Syns {
    fn of(seen: u64, lost: u64, queue: Option<Queue>) -> Self {
        Self {
            seen,
            queue: queue.map(|queue| queue.number),
            waiting: queue.map(|queue| queue.waiting),
            dropped_by_kernel: queue.map(|queue| queue.dropped_full.saturating_add(queue.dropped_unsent)),
            dropped_by_relay: lost,
        }
    }
}

impl Store {
    fn of(verifier: &KnocksPart, waits_for_disk: bool, now: u64) -> Self {
        let StoreHealth { written, failing, waiting, waiting_since } = verifier.store;
        let is_slow = waiting_since.is_some_and(|since| now.saturating_sub(since) > SLOW);
        let is_silent = is_slow || waits_for_disk;
        let shut = verifier.floor.shut(now);
        Self {
            ok: failing.is_none() && !is_silent && shut.is_none(),
            in_doubt_until: shut.map(|shut| shut.until),
            doubt: shut.map(|shut| shut.to_string()),
            is_silent,
            written,
            failing_since: failing,
            waiting,
            waiting_since,
        }
    }
}

fn knocks(verifier: KnocksPart) -> Vec<Knocks> {
    let knocks = verifier.users.into_iter().map(|(user, seen)| Knocks {
        user,
        granted: seen.granted.map(|(at, source, service)| LastGrant { at, source, service }),
        refused: seen.refused.map(|(at, source, reason)| LastRefusal {
            at,
            source,
            reason: reason.as_str(),
            hint: reason.explanation(),
        }),
    });
    knocks.collect()
}

// Text for people.
impl Shown {
    fn text(&self, now: u64) -> String {
        let mut text = String::new();
        for (head, line) in [
            ("up", self.up(now)),
            ("table", self.table.text()),
            ("SYNs", self.syns.text()),
            ("doors", self.doors.text()),
            ("store", self.store.text(now)),
            ("clock", self.clock.text(now)),
        ] {
            let _ = writeln!(text, "{head:<6} {line}");
        }
        if self.packets.iter().any(|packets| packets.count > 0) {
            let counted = self.packets.iter().filter(|packets| packets.count > 0);
            let rows = counted.map(|packets| [packets.reason.to_owned(), packets.count.to_string()]);
            let head = ["REASON", "PACKETS"].map(str::to_owned);
            text += &format!("\n{}", columns(&std::iter::once(head).chain(rows).collect::<Vec<_>>()));
        }
        if !self.knocks.is_empty() {
            let head = ["USER", "LAST OPENED", "FROM", "SERVICE", "LAST REFUSED", "FROM", "REASON"].map(str::to_owned);
            let rows = self.knocks.iter().map(|knocks| knocks.row(now));
            text += &format!("\n{}", columns(&std::iter::once(head).chain(rows).collect::<Vec<_>>()));
        }
        if self.is_cut {
            text += "\nThere are more users or doors than fit here.\n";
        }
        text
    }

    fn up(&self, now: u64) -> String {
        let reloaded = self.reloaded.as_ref().map_or(String::new(), |reload| {
            let what = if reload.taken { "reloaded" } else { "a reload was refused" };
            format!("; {what} {}", ago(reload.at, now))
        });
        let up = time_left(self.uptime_seconds);
        format!("{up}, knockq {}, users {}, services {}{reloaded}", self.version, self.users, self.services)
    }
}

/// A time in the past.
pub(super) fn ago(at: u64, now: u64) -> String {
    format!("{} ago", time_left(now.saturating_sub(at)))
}

impl ShownTable {
    fn text(&self) -> String {
        let state = match (self.right, self.mode) {
            (false, _) => "NOT what it should be: guarded ports may be open, see the log",
            (true, "managed") if self.owned => "loaded; nobody else can change it",
            (true, "managed") => "loaded; others can flush it",
            _ => "loaded by others, and as it should be",
        };
        let left =
            self.trial_seconds_left.map(|left| format!("; ON TRIAL: gone in {} unless confirmed", time_left(left)));
        format!("{state}{}", left.unwrap_or_default())
    }
}

impl Syns {
    fn text(&self) -> String {
        let kernel = match (self.waiting, self.dropped_by_kernel) {
            (Some(waiting), Some(dropped)) => format!("{waiting} waiting, {dropped} dropped by the kernel"),
            _ => "the kernel does not tell of the queue".to_owned(),
        };
        format!("{} seen, {kernel}, {} by the relay", self.seen, self.dropped_by_relay)
    }
}

impl Doors {
    fn text(&self) -> String {
        let Self { opened, not_opened, over_rate, open } = self;
        format!(
            "{} open; {opened} opened, {not_opened} not for a fault, {over_rate} not for grants_per_minute",
            open.len()
        )
    }
}

impl Store {
    fn text(&self, now: u64) -> String {
        let waiting = match (self.waiting, self.waiting_since) {
            (1.., Some(since)) => format!("; {} wait for the disk, the first came {}", self.waiting, ago(since, now)),
            _ => String::new(),
        };
        let state = match (self.failing_since, self.written) {
            (Some(since), _) => Some(format!("CANNOT be written, since {}", ago(since, now))),
            (None, _) if self.is_silent => Some("the disk does NOT answer".to_owned()),
            (None, Some(written)) => Some(format!("last written {}", ago(written, now))),
            (None, None) if self.doubt.is_some() => None,
            (None, None) => Some("nothing was to be written yet".to_owned()),
        };
        let told: Vec<String> = self.doubt.clone().into_iter().chain(state).collect();
        format!("{}{waiting}", told.join("; "))
    }
}

impl Clock {
    fn text(&self, now: u64) -> String {
        let state = if self.synchronized { "synchronized" } else { "NOT synchronized, as the kernel says" };
        let jump = self.last_jump.as_ref().map(|jump| {
            let way = if jump.seconds < 0 { "back" } else { "forward" };
            let by = time_left(jump.seconds.unsigned_abs());
            format!("; jumped {} times, the last {} by {by}, {way}", self.jumps, ago(jump.at, now))
        });
        let narrowed = match self.narrowed.as_slice() {
            [] => String::new(),
            [user] => format!("; many wrong tags for {user}: only clocks within 5 s count"),
            users => format!("; many wrong tags for {} users: only clocks within 5 s count for them", users.len()),
        };
        format!("{state}{}{narrowed}", jump.unwrap_or_default())
    }
}

impl Knocks {
    fn row(&self, now: u64) -> [String; 7] {
        let granted =
            self.granted.as_ref().map(|last| [ago(last.at, now), last.source.to_string(), last.service.to_string()]);
        let refused = self.refused.as_ref().map(|last| {
            let source = last.source.map_or_else(String::new, |source| source.to_string());
            [ago(last.at, now), source, last.reason.to_owned()]
        });
        let [opened, from, service] = granted.unwrap_or_default();
        let [refused, elsewhere, reason] = refused.unwrap_or_default();
        [self.user.to_string(), opened, from, service, refused, elsewhere, reason]
    }
}

// Metrics (https://prometheus.io/docs/instrumenting/exposition_formats/). No value needs to be escaped: names of users have
// neither quotes nor backslashes.
impl Shown {
    fn metrics(&self) -> String {
        let one = |value: u64| vec![(String::new(), value)];
        let of = |name: &str, value: &str| format!("{{{name}=\"{value}\"}}");
        let reasons = self.packets.iter().map(|packets| (of("reason", packets.reason), packets.count)).collect();
        let knocks = |last: fn(&Knocks) -> Option<u64>| {
            let known =
                self.knocks.iter().filter_map(move |knocks| Some((of("user", knocks.user.as_str()), last(knocks)?)));
            known.collect::<Vec<_>>()
        };
        let granted = knocks(|knocks| knocks.granted.as_ref().map(|last| last.at));
        let refused = knocks(|knocks| knocks.refused.as_ref().map(|last| last.at));
        let metrics = [
            ("knockq_up", "gauge", "Whether the daemon runs", one(1)),
            ("knockq_info", "gauge", "The daemon's version", vec![(of("version", self.version), 1)]),
            ("knockq_uptime_seconds", "gauge", "Time since the daemon was ready", one(self.uptime_seconds)),
            ("knockq_users", "gauge", "Configured users", one(self.users as u64)),
            ("knockq_services", "gauge", "Configured services", one(self.services as u64)),
            ("knockq_reload_ok", "gauge", "Whether the last reload was taken", self.reload()),
            ("knockq_table_ok", "gauge", "Whether the table is what it should be", one(self.table.right.into())),
            ("knockq_syns_total", "counter", "SYNs taken from the queue", one(self.syns.seen)),
            ("knockq_queue_length", "gauge", "SYNs that wait in the queue", optional(self.syns.waiting)),
            (
                "knockq_queue_dropped_total",
                "counter",
                "SYNs that the kernel dropped",
                optional(self.syns.dropped_by_kernel),
            ),
            (
                "knockq_relay_dropped_total",
                "counter",
                "SYNs that the engine never saw",
                one(self.syns.dropped_by_relay),
            ),
            ("knockq_packets_total", "counter", "Packets by their end", reasons),
            ("knockq_doors", "gauge", "Doors that are open", one(self.doors.open.len() as u64)),
            ("knockq_doors_opened_total", "counter", "Doors opened or renewed", one(self.doors.opened)),
            ("knockq_doors_failed_total", "counter", "Doors that could not be opened", one(self.doors.not_opened)),
            (
                "knockq_doors_over_rate_total",
                "counter",
                "Knocks that grants_per_minute forbade",
                one(self.doors.over_rate),
            ),
            (
                "knockq_store_ok",
                "gauge",
                "Whether counters can be written, and knocks are accepted",
                one(self.store.ok.into()),
            ),
            (
                "knockq_store_in_doubt_until_timestamp_seconds",
                "gauge",
                "When knocks are accepted again, of a counter store in doubt",
                optional(self.store.in_doubt_until),
            ),
            ("knockq_store_waiting", "gauge", "Counters that wait for the disk", one(self.store.waiting as u64)),
            (
                "knockq_store_written_timestamp_seconds",
                "gauge",
                "When counters were last written",
                optional(self.store.written),
            ),
            (
                "knockq_clock_synchronized",
                "gauge",
                "Whether the kernel calls the clock synchronized",
                one(self.clock.synchronized.into()),
            ),
            ("knockq_clock_jumps_total", "counter", "Times that the clock jumped", one(self.clock.jumps)),
            (
                "knockq_window_narrowed",
                "gauge",
                "Users for whom wrong tags abound",
                one(self.clock.narrowed.len() as u64),
            ),
            ("knockq_user_granted_timestamp_seconds", "gauge", "When a user last opened something", granted),
            ("knockq_user_refused_timestamp_seconds", "gauge", "When a knock of a user's was last refused", refused),
        ];
        metrics.iter().map(|(name, kind, help, values)| metric(name, kind, help, values)).collect()
    }

    fn reload(&self) -> Vec<(String, u64)> {
        optional(self.reloaded.as_ref().map(|reload| reload.taken.into()))
    }
}

fn optional(value: Option<u64>) -> Vec<(String, u64)> {
    value.into_iter().map(|value| (String::new(), value)).collect()
}

/// One metric with its values by their labels; nothing where there are none.
fn metric(name: &str, kind: &str, help: &str, values: &[(String, u64)]) -> String {
    if values.is_empty() {
        return String::new();
    }
    let values = values.iter().map(|(labels, value)| format!("{name}{labels} {value}\n"));
    format!("# HELP {name} {help}\n# TYPE {name} {kind}\n{}", values.collect::<String>())
}
