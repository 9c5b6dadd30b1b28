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

/// Watchers at most.
pub(super) const MAX_WATCHERS: usize = 16;

/// What is told although it is below the level of what is logged: that a door's time is over.
pub(super) const CLOSING: &str = "closing";

/// An event that says nothing: whether a watcher is there shows when it is sent.
const EMPTY: &[u8] = b"{}";

/// This process's.
static WATCHERS: Mutex<Vec<Watcher>> = Mutex::new(Vec::new());

/// Somebody who watches.
struct Watcher {
    socket: OwnedFd,
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

/// Tells one more of what happens, from now on; `false` if there are too many already.
pub(super) fn add(socket: OwnedFd) -> bool {
    let mut watchers = watchers();
    watchers.retain(|watcher| watcher.send(EMPTY) != Sent::Gone);
    let has_room = watchers.len() < MAX_WATCHERS;
    if has_room {
        watchers.push(Watcher { socket, lost: 0 });
    }
    has_room
}

/// Tells one who is turned away why.
pub(super) fn turn_away(socket: OwnedFd) {
    let event = Event::new("knockq", "error", &format!("{MAX_WATCHERS} others watch already"));
    Watcher { socket, lost: 0 }.send(&event.json());
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

    fn json(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
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

    use super::{CLOSING, Event, MAX_WATCHERS, ToWatchers, add};

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
        assert!(add(ours.into()));
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
        for _ in 1..MAX_WATCHERS {
            let (ours, theirs) = pair();
            assert!(add(ours.into()));
            others.push(theirs);
        }
        let (ours, late) = pair();
        assert!(!add(ours.into()));
        drop((others, late));
        let (ours, _theirs) = pair();
        assert!(add(ours.into()), "those who went have made room");
    }
}
