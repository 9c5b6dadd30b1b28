//! A counter store that may have forgotten something: until when nobody gets in is said wherever somebody looks.

use std::fs;
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;

use super::count;
use super::knock::{self, Knock};
use crate::lab::{Daemon, FAMILIES, Family, Lab, eventually, succeeds};
use crate::unix_now;

/// What is said of the store before the start.
const OF_A_COPY_BEFORE: &str = "users can knock again a window after the start";

/// What the log says of it then.
const OF_A_COPY: &str = "is a copy of a counter store, restored or moved; to be safe, no knock of before is taken";

#[test]
fn a_copied_store_is_in_doubt_for_a_window_and_all_who_look_are_told_until_when() {
    is_told(Family::V4, OF_A_COPY, |lab| {
        let copy = lab.store().with_extension("copy");
        fs::copy(lab.store(), &copy).unwrap();
        fs::rename(copy, lab.store()).unwrap();
        lab.doctor().has("store", "problem", &[OF_A_COPY_BEFORE, "systemctl start knockq"]);
    });
}

#[test]
fn a_recovered_store_is_in_doubt_for_a_window_and_all_who_look_are_told_until_when() {
    is_told(Family::V6, "counters.redb: no knocks are accepted until ", |lab| {
        lab.control(&["recover", "--config", &lab.config().display().to_string()]);
    });
}

/// Nothing says that all is well, or that a later knock had come.
#[track_caller]
fn says(text: &str, sentence: &str) {
    assert!(text.contains(sentence), "not `{sentence}`: {text}");
    for wrong in ["nothing was to be written yet", "a later knock of this key", "last written"] {
        assert!(!text.contains(wrong), "{wrong}: {text}");
    }
}

fn refused(daemon: &Daemon, family: Family) -> usize {
    count(daemon, &format!("packet reason=in_doubt user=alice source={}", family.alice()))
}

fn is_told(family: Family, at_the_start: &str, lose: impl FnOnce(&Lab)) {
    let lab = Lab::with("open_for = \"1h\"");
    lab.set("window = \"90s\"");
    let daemon = knock::start(&lab);
    let never_sent = Knock::both(&lab);
    daemon.stop();
    lose(&lab);
    let daemon = knock::start(&lab);
    let config = lab.config().display().to_string();
    let until = lab.status()["store"]["in_doubt_until"].as_u64().expect("it is in doubt");
    assert!((unix_now()..unix_now() + 92).contains(&until), "{until}");
    let (hours, minutes, seconds) = (until / 3600 % 24, until / 60 % 60, until % 60);
    let sentence =
        format!("no knocks are accepted until {hours:02}:{minutes:02}:{seconds:02}Z (counter store in doubt)");
    let is_shut = |family: Family| {
        let before = refused(&daemon, family);
        lab.knock(family, &[]);
        eventually("a refusal", || refused(&daemon, family) > before);
        assert_eq!(lab.door(family.alice(), 22), None);
    };
    FAMILIES.into_iter().for_each(is_shut);
    // The same of one of before, which was never sent: nobody knows that.
    never_sent.iter().for_each(|knock| knock.is_in_doubt(&lab, &daemon));
    let hint = format!("hint=\"{sentence}\"");
    for family in FAMILIES {
        let line = format!("refused reason=in_doubt user=alice source={} {hint}", family.alice());
        eventually("the line", || daemon.log().contains(&line));
    }
    assert!(daemon.log().contains(at_the_start), "{}", daemon.log());

    says(&lab.control(&["status", "--config", &config]), &sentence);
    assert_eq!(lab.status()["store"]["ok"], false);
    let metric = format!("knockq_store_in_doubt_until_timestamp_seconds {until}\n");
    says(&lab.control(&["status", "--config", &config, "--prometheus"]), &metric);
    lab.doctor().has("store", "problem", &[&sentence]);
    let check = lab.knockq(&lab.server, &["check", "--config", &config]);
    succeeds(&check);
    says(&String::from_utf8_lossy(&check.stderr), &sentence);
    let explained = lab.control(&["explain", "--config", &config]);
    assert_eq!(explained.matches(&sentence).count(), FAMILIES.len(), "{explained}");
    says(&explained, &sentence);

    daemon.signal(Signal::SIGHUP);
    eventually("the reload", || daemon.log().contains("engine: reloaded"));
    let waits = lab.knockq(&lab.alice, &["send", "server", "ssh", family.flag(), "--wait"]);
    assert!(!waits.status.success());
    says(&String::from_utf8_lossy(&waits.stderr), "no knocks are accepted until HH:MM:SS (counter store in doubt)");
    assert!(refused(&daemon, family) > 2, "it is so after a reload, too");
    says(&lab.control(&["status", "--config", &config]), &sentence);

    thread::sleep(Duration::from_secs(until.saturating_sub(unix_now())));
    for family in FAMILIES {
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
    }
    assert_eq!((&lab.status()["store"]["ok"], &lab.status()["store"]["in_doubt_until"]), (&true.into(), &().into()));
    lab.doctor().has("store", "ok", &[]);
    let log = daemon.stop();
    says(&log, &sentence);
}
