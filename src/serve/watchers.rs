//! Those who watch: what a process logs goes to them too, each event as a JSON object in one message.
//!
//! Nobody waits for a watcher: what one does not take in time is lost to that one, counted, and told with the next event that
//! fits. Nothing is ever read from them.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;
use tracing::field::{Field, Visit};
use tracing::{Level, Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

/// Places of those who watch, and as many of those whose status is on its way. The last are for root alone, and no other user
/// has all that are left.
const PLACES: usize = 16;
const OF_ROOT: usize = 4;
const OF_ONE: usize = 6;

/// The user id of who is let in whatever others do.
const ROOT: u32 = 0;

/// What is told although it is below the level of what is logged: that a door's time is over.
pub(super) const CLOSING: &str = "closing";

/// Bytes of the longest event, which `knockq watch` has room for.
pub(super) const MAX_EVENT: usize = 4096;

/// What stands for the rest of a text that was cut.
const CUT: &str = " [...]";

/// An event that says nothing: whether a watcher is there shows when it is sent.
const EMPTY: &[u8] = b"{}";

/// This process's.
static WATCHERS: Mutex<Vec<Watcher>> = Mutex::new(Vec::new());

/// Somebody who watches.
struct Watcher {
    socket: OwnedFd,
    /// The user who connected.
    uid: u32,
    lost: u64,
}

/// What became of a message.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sent {
    Yes,
    /// It does not fit now.
    No,
    /// Nobody is there any more.
    Gone,
}

/// What happened: names and values, in order. Nothing in it is trusted.
#[derive(Default, Debug)]
pub struct Event(pub Vec<(String, Value)>);

/// Whether there is a place for one more of a user's, beside these users'.
pub(super) fn has_place(uid: u32, others: impl Iterator<Item = u32>) -> bool {
    let others: Vec<u32> = others.collect();
    let count = |is_meant: &dyn Fn(u32) -> bool| others.iter().filter(|other| is_meant(**other)).count();
    let may_come =
        uid == ROOT || (count(&|other| other != ROOT) < PLACES - OF_ROOT && count(&|other| other == uid) < OF_ONE);
    may_come && others.len() < PLACES
}

/// Tells one more of what happens, from now on, if there is a place for this user.
pub(super) fn admit(socket: OwnedFd, uid: u32) -> bool {
    let mut watchers = watchers();
    watchers.retain(|watcher| watcher.send(EMPTY) != Sent::Gone);
    let has_place = has_place(uid, watchers.iter().map(|watcher| watcher.uid));
    if has_place {
        watchers.push(Watcher { socket, uid, lost: 0 });
    } else {
        turn_away(socket);
    }
    has_place
}

/// Tells one who is turned away why.
fn turn_away(socket: OwnedFd) {
    let event = Event::new("engine", "error", "too many watch already");
    Watcher { socket, uid: ROOT, lost: 0 }.send(&event.json());
}

fn watchers() -> MutexGuard<'static, Vec<Watcher>> {
    WATCHERS.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Watcher {
    /// `false` when nobody is there any more.
    fn tell(&mut self, process: &str, event: &[u8]) -> bool {
        if self.lost > 0 {
            let mut lost = Event::new(process, "warning", "events were lost, for this watcher is too slow");
            lost.0.push(("count".to_owned(), self.lost.into()));
            match self.send(&lost.json()) {
                Sent::Yes => self.lost = 0,
                Sent::No => {}
                Sent::Gone => return false,
            }
        }
        let sent = if self.lost > 0 { Sent::No } else { self.send(event) };
        if sent == Sent::No {
            self.lost = self.lost.saturating_add(1);
        }
        sent != Sent::Gone
    }

    fn send(&self, message: &[u8]) -> Sent {
        match send(&self.socket, message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(_) => Sent::Yes,
            Err(Errno::AGAIN | Errno::MSGSIZE | Errno::NOBUFS) => Sent::No,
            Err(_) => Sent::Gone,
        }
    }
}

/// The layer of the log that tells the watchers.
pub(super) struct ToWatchers {
    /// Whose log it is.
    pub(super) process: &'static str,
}

impl ToWatchers {
    /// Whether watchers are told of such events.
    pub(super) fn are_told(metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::INFO || metadata.target() == CLOSING
    }
}

impl<S: Subscriber> Layer<S> for ToWatchers {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        let mut watchers = watchers();
        if watchers.is_empty() {
            return;
        }
        let level = match *event.metadata().level() {
            Level::ERROR => "error",
            Level::WARN => "warning",
            Level::INFO => "info",
            _ => "debug",
        };
        let mut told = Event::new(self.process, level, "");
        event.record(&mut told);
        let json = told.json();
        watchers.retain_mut(|watcher| watcher.tell(self.process, &json));
    }
}

impl Event {
    fn new(process: &str, level: &str, message: &str) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let fields: [(&str, Value); 4] = [
            ("time", now.as_secs().into()),
            ("process", process.into()),
            ("level", level.into()),
            ("message", message.into()),
        ];
        Self(fields.map(|(name, value)| (name.to_owned(), value)).to_vec())
    }

    /// As JSON; its longest texts are cut until it fits.
    fn json(mut self) -> Vec<u8> {
        loop {
            let json = serde_json::to_vec(&self).unwrap_or_default();
            let texts = self.0.iter_mut().filter_map(|(_, value)| match value {
                Value::String(text) if text.len() > 2 * CUT.len() => Some(text),
                _ => None,
            });
            match texts.max_by_key(|text| text.len()) {
                Some(text) if json.len() > MAX_EVENT => {
                    text.truncate(text.floor_char_boundary(text.len() / 2));
                    text.push_str(CUT);
                }
                _ => return json,
            }
        }
    }

    /// The value of this name.
    pub fn of(&self, name: &str) -> Option<&Value> {
        self.0.iter().find(|(other, _)| other == name).map(|(_, value)| value)
    }

    fn set(&mut self, field: &Field, value: Value) {
        match self.0.iter_mut().find(|(name, _)| name == field.name()) {
            Some((_, message)) => *message = value,
            None => self.0.push((field.name().to_owned(), value)),
        }
    }
}

impl Visit for Event {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.set(field, format!("{value:?}").into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.set(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.set(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.set(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.set(field, value.into());
    }
}

impl Serialize for Event {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, value)))
    }
}

impl<'de> Deserialize<'de> for Event {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;

        impl<'de> Visitor<'de> for Fields {
            type Value = Event;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an event")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Event, M::Error> {
                let mut event = Event::default();
                while let Some(field) = map.next_entry()? {
                    event.0.push(field);
                }
                Ok(event)
            }
        }

        deserializer.deserialize_map(Fields)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use tracing::{debug, info};
    use tracing_subscriber::filter::filter_fn;
    use tracing_subscriber::prelude::*;

    use super::{CLOSING, CUT, Event, MAX_EVENT, OF_ONE, OF_ROOT, PLACES, ROOT, ToWatchers, admit, has_place};

    fn next(watcher: &UnixDatagram) -> Option<Event> {
        let mut bytes = [0; 4096];
        loop {
            let length = watcher.recv(&mut bytes).ok()?;
            let event: Event = serde_json::from_slice(&bytes[..length]).unwrap();
            if !event.0.is_empty() {
                return Some(event);
            }
        }
    }

    fn pair() -> (UnixDatagram, UnixDatagram) {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        (ours, theirs)
    }

    /// One test, for the watchers are the process's.
    #[test]
    fn watchers_are_told_what_is_logged_and_that_they_were_too_slow_and_the_gone_are_forgotten() {
        let layer = ToWatchers { process: "test" }.with_filter(filter_fn(ToWatchers::are_told));
        let subscriber = tracing_subscriber::registry().with(layer);
        let _logs = tracing::subscriber::set_default(subscriber);
        let (ours, watcher) = pair();
        assert!(admit(ours.into(), ROOT));
        info!(user = %"alice", seconds = 6, hint = "a\nb", "granted");
        debug!("a packet");
        debug!(target: CLOSING, "its time is over");
        let event = next(&watcher).unwrap();
        let names: Vec<&str> = event.0.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["time", "process", "level", "message", "user", "seconds", "hint"]);
        assert_eq!((event.of("message").unwrap(), event.of("user").unwrap()), (&"granted".into(), &"alice".into()));
        assert_eq!((event.of("seconds").unwrap(), event.of("hint").unwrap()), (&6.into(), &"a\nb".into()));
        assert_eq!(next(&watcher).unwrap().of("level").unwrap(), "debug");
        assert!(next(&watcher).is_none());

        (0..5000).for_each(|number| info!(number, "too many"));
        let mut taken = 0_u64;
        while next(&watcher).is_some() {
            taken += 1;
        }
        info!("one more");
        assert_eq!(next(&watcher).unwrap().of("count").unwrap().as_u64(), Some(5000 - taken));
        assert_eq!(next(&watcher).unwrap().of("message").unwrap(), "one more");

        let mut others = Vec::new();
        for _ in 1..PLACES {
            let (ours, theirs) = pair();
            assert!(admit(ours.into(), ROOT));
            others.push(theirs);
        }
        let (ours, late) = pair();
        assert!(!admit(ours.into(), ROOT));
        drop((others, late));
        let (ours, _theirs) = pair();
        assert!(admit(ours.into(), ROOT), "those who went have made room");
    }

    #[test]
    fn an_event_that_is_too_long_is_cut_where_it_is_longest_and_shows_it() {
        for long in ["x".repeat(5000), "\u{1b}\u{20ac}\"".repeat(5000)] {
            let mut event = Event::new("test", "error", "refused");
            event.0.extend([("cause".to_owned(), long.into()), ("hint".to_owned(), "a file".into())]);
            let json = event.json();
            assert!((MAX_EVENT / 4..=MAX_EVENT).contains(&json.len()), "{}", json.len());
            let event: Event = serde_json::from_slice(&json).unwrap();
            assert_eq!(
                (event.of("message").unwrap(), event.of("hint").unwrap()),
                (&"refused".into(), &"a file".into())
            );
            assert!(event.of("cause").unwrap().as_str().unwrap().ends_with(CUT));
        }
    }

    #[test]
    fn no_user_takes_all_places_and_none_takes_roots() {
        let mut taken: Vec<u32> = Vec::new();
        for uid in 1000..1010 {
            while has_place(uid, taken.iter().copied()) {
                taken.push(uid);
            }
        }
        assert_eq!(taken.iter().filter(|uid| **uid == 1000).count(), OF_ONE);
        assert_eq!(taken.len(), PLACES - OF_ROOT);
        while has_place(ROOT, taken.iter().copied()) {
            taken.push(ROOT);
        }
        assert_eq!(taken.len(), PLACES);
        assert!(has_place(1000, std::iter::repeat_n(ROOT, PLACES - 1)), "root's own are root's affair");
    }
}
