//! What a flood costs, and where.

use std::thread;
use std::time::Duration;

use crate::lab::Lab;
use crate::machine::{self, Times};
use crate::{FLOODS, Row, Scale, flood, users};

pub fn rows(scale: &Scale) -> Vec<Row> {
    let lab = Lab::network();
    lab.configure("[services.ssh]\nports = [\"tcp/22\"]\n");
    users::add(&lab, 1);
    let daemon = lab.start();
    let processes = daemon.processes();
    let times = || processes.map(|(_, pid)| machine::times(pid));
    let rate = FLOODS[FLOODS.len() - 1];
    let ((before, after, interrupts), flooded) = flood::during(&lab, rate, || {
        let (before, interrupts) = (times(), machine::software_interrupts());
        thread::sleep(scale.flood);
        (before, times(), machine::software_interrupts() - interrupts)
    });
    daemon.stop();
    let share = |time: Duration| time.as_secs_f64() / scale.flood.as_secs_f64();
    let used = |place: usize| {
        let (Times { user, system }, before) = (after[place], before[place]);
        [share(user - before.user), share(system - before.system)]
    };
    let used = [0, 1, 2].map(used);
    let sum: f64 = used.as_flattened().iter().sum();
    let mut rows = vec![Row(format!("CPU at {rate} SYN/s, all processes"), "< 1 core", format!("{sum:.2} cores"))];
    for ((name, _), [user, system]) in processes.iter().zip(used) {
        rows.push(Row(format!("CPU of the {name}"), "", format!("{user:.2} user, {system:.2} system")));
    }
    rows.push(Row("software interrupts, whole machine".to_owned(), "", format!("{:.2} cores", share(interrupts))));
    rows.push(Row("the flood meanwhile".to_owned(), "", flooded.show()));
    rows
}
