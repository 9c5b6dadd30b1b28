//! How long a guarded port is open when somebody deletes the table.

use std::thread;
use std::time::{Duration, Instant};

use crate::lab::{Family, Lab};
use crate::prober::Prober;
use crate::{Row, Scale, millis};

/// Time in which the table must be back.
const PATIENCE: Duration = Duration::from_secs(5);

/// Time between two SYNs of the stranger.
const PAUSE: Duration = Duration::from_micros(100);

pub fn rows(scale: &Scale) -> Vec<Row> {
    [Family::V4, Family::V6].map(|family| row(scale, family)).into()
}

fn row(scale: &Scale, family: Family) -> Row {
    let mut windows: Vec<Duration> = (0..scale.restorations).map(|_| window(family)).collect();
    windows.sort_unstable();
    let [shortest, median, longest] = [0, windows.len() / 2, windows.len() - 1].map(|place| millis(windows[place]));
    let figure = format!(
        "a table without an owner is deleted: from a stranger's first SYN that is answered to his last, {family:?}: shortest, p50, longest"
    );
    Row(figure, "< 50 ms", format!("{shortest}, {median}, {longest} of {}", windows.len()))
}

fn window(family: Family) -> Duration {
    let lab = Lab::network();
    lab.configure("[services.ssh]\nports = [\"tcp/22\"]\nopen_for = \"30s\"\n");
    lab.server.serve(22);
    lab.server.nft(&["add table inet knockq"]); // a plain table, which a daemon cannot own
    let daemon = lab.start();
    let prober = Prober::start(&lab, family, PAUSE);
    thread::sleep(Duration::from_millis(100));
    let start = Instant::now();
    lab.server.nft(&["delete table inet knockq"]);
    while !daemon.log().contains("it is loaded again") {
        assert!(start.elapsed() < PATIENCE, "{}", daemon.log());
        thread::sleep(Duration::from_millis(1));
    }
    thread::sleep(Duration::from_millis(100));
    let probed = prober.stop();
    daemon.stop();
    let window = probed.window(start, Instant::now()).expect("the gate was never open");
    assert!(!lab.mallory.reaches(family.server(), 22), "the gate stands");
    window
}
