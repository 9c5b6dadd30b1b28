//! `knockq watch`

use clap::Args;
use serde_json::Value;

use super::failure::Failure;
use super::print_view;
use super::status::{Place, unseen};
use super::time::utc;
use crate::serve::observers;
use crate::serve::watchers::Event;

#[derive(Args)]
#[command(after_help = "Examples:\n  knockq watch\n  knockq watch --json | jq 'select(.message == \"granted\")'\n\n\
                        What the daemon logs, as it happens, and the closing of doors. Refusals are told as the log tells \
                        them: the first of a kind, then a count. Who reads too slowly loses events, and is told how many. \
                        Root can watch, and the group of the daemon's account.")]
pub(super) struct Watch {
    /// As JSON, an object a line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    place: Place,
}

impl Watch {
    pub(super) fn run(self) -> Result<(), Failure> {
        let watching = observers::watch(&self.place.directory()?).map_err(unseen)?;
        while let Some(event) = watching.event()? {
            let line = if self.json { plain(&serde_json::to_string(&event).unwrap_or_default()) } else { line(&event) };
            if !print_view(&format!("{line}\n"))? {
                return Ok(());
            }
        }
        Err(Failure::new("watch: the daemon has ended, or lets nobody else watch".to_owned())
            .hint("systemctl status knockq"))
    }
}

/// An event as the log has it, with its time.
fn line(event: &Event) -> String {
    let text = |name| event.of(name).and_then(Value::as_str).unwrap_or_default().escape_debug().to_string();
    let time = event.of("time").and_then(Value::as_u64).map(utc).unwrap_or_default();
    let level = match text("level").as_str() {
        level @ ("error" | "warning") => format!("{level}: "),
        _ => String::new(),
    };
    let mut line = format!("{time} {}: {level}{}", text("process"), text("message"));
    let told = ["time", "process", "level", "message"];
    for (name, value) in event.0.iter().filter(|(name, _)| !told.contains(&name.as_str())) {
        line += &format!(" {}={}", name.escape_debug(), shown(value));
    }
    line
}

/// A word as it is, anything else in quotation marks.
fn shown(value: &Value) -> String {
    let is_word = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_graphic() && c != '"');
    match value {
        Value::String(text) if is_word(text) => text.clone(),
        Value::String(text) => format!("{text:?}"),
        other => plain(&other.to_string()),
    }
}

/// JSON in which all but printable ASCII is escaped: terminals obey more than the control characters of ASCII.
fn plain(json: &str) -> String {
    let mut plain = String::with_capacity(json.len());
    for c in json.chars() {
        if c.is_ascii_graphic() || c == ' ' {
            plain.push(c);
        } else {
            plain.extend(c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")));
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::{line, plain};

    #[test]
    fn json_that_is_made_plain_says_the_same() {
        let json = "{\"x\":\"\u{9b}2J \u{7f} \u{202e} \u{1f600} \\\\ \"}";
        let plain = plain(json);
        assert!(plain.is_ascii() && !plain.contains(char::is_control), "{plain}");
        let values: [serde_json::Value; 2] = [json, &plain].map(|text| serde_json::from_str(text).unwrap());
        assert_eq!(values[0], values[1]);
    }

    #[test]
    fn an_event_is_shown_as_the_log_has_it_and_nothing_in_it_reaches_the_terminal_unseen() {
        for (event, shown) in [
            (
                r#"{"time":0,"process":"engine","level":"info","message":"granted","user":"alice","seconds":6}"#,
                "1970-01-01 00:00:00Z engine: granted user=alice seconds=6",
            ),
            (
                r#"{"time":1,"process":"engine","level":"warning","message":"refused","hint":"a b"}"#,
                "1970-01-01 00:00:01Z engine: warning: refused hint=\"a b\"",
            ),
            (
                r#"{"process":"\u001b[2J","message":"\n","\u0007":"\u001b[m","x":{"y":"\u001b\u009b"}}"#,
                r#" \u{1b}[2J: \n \u{7}="\u{1b}[m" x={"y":"\u001b\u009b"}"#,
            ),
        ] {
            assert_eq!(line(&serde_json::from_str(event).unwrap()), shown);
        }
    }
}
