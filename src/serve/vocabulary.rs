//! What a child may say to root, and when. All else is a breach.
//!
//! | child | may say | when |
//! |---|---|---|
//! | `configuration` | `Ready`, with plan, settings and limits | once |
//! | `engine` | `Ready` | once after each `Start`, `Enforce`, `Release` and `Revoke`, and the first `Loaded` |
//! | `engine` | `Prepared` or `Unable` | once after each `Settings`, whatever else it was asked |
//! | `engine` | `Reported` | once after each `Report` and `Explain`, whatever else it was asked |
//! | `engine` | `Lost` | once after each `Loaded`, the first time not before its `Ready`; no more once it has answered `Release` |
//! | `gate` | `Bound` | once after `Start` |
//! | `gate` | `Ready` | once after each `Loaded`, `Settings`, `Enforce` and `Release` |

use thiserror::Error;

use super::channel::Message;

/// Descriptors of what `configuration` hands over.
const HANDED_OVER: usize = 3;

/// What one child may say next.
pub(super) struct Vocabulary {
    child: &'static str,
    /// What it was told and has not answered.
    asked: Option<Message>,
    /// It was told to report, and has not.
    owes_report: bool,
    /// It was told to prepare, and has not.
    owes_preparation: bool,
    /// It has said that it serves.
    serves: bool,
    /// It may say that the table is lost.
    may_lose: bool,
}

/// What no child of ours would do.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum Breach {
    /// Another number of bytes, or another byte.
    #[error("it sent what is no message")]
    NoMessage,
    /// A message at the wrong time.
    #[error("it said {0:?}, which nobody waits for")]
    Unasked(Message),
    /// Descriptors that do not belong there, or too few.
    #[error("the number of descriptors with its {0:?} is {1}")]
    Descriptors(Message, usize),
    /// Its messages pile up.
    #[error("it does not read what it is told")]
    Deaf,
    /// What it handed over is no sealed memory, or holds another value.
    #[error("what it handed over cannot be read")]
    Unreadable,
}

impl Vocabulary {
    /// Of a child that was just started. What `configuration` shall do, it is told by its arguments.
    pub(super) fn new(child: &'static str) -> Self {
        let asked = (child == "configuration").then_some(Message::Start);
        Self { child, asked, owes_report: false, owes_preparation: false, serves: false, may_lose: false }
    }

    /// The child is told this.
    pub(super) fn tell(&mut self, message: Message) {
        match message {
            Message::Loaded if self.serves => self.may_lose = true,
            Message::Settings if self.is_engine() => self.owes_preparation = true,
            Message::Report | Message::Explain => self.owes_report = true,
            Message::Watch => {} // no answer
            message => self.asked = Some(message),
        }
    }

    fn is_engine(&self) -> bool {
        self.child == "engine"
    }

    /// Whatever the child says now is a breach, until it is told something.
    pub(super) const fn is_to_be_silent(&self) -> bool {
        self.asked.is_none() && !self.may_lose && !self.owes_report && !self.owes_preparation
    }

    /// The child says this, with so many descriptors.
    ///
    /// # Errors
    /// When it may not.
    pub(super) fn hear(&mut self, said: Message, descriptors: usize) -> Result<(), Breach> {
        if said == Message::Lost && self.may_lose {
            self.may_lose = false;
        } else if said == Message::Reported && self.owes_report {
            self.owes_report = false;
        } else if matches!(said, Message::Prepared | Message::Unable) && self.owes_preparation {
            self.owes_preparation = false;
        } else {
            let asked = self.asked.take();
            if !asked.is_some_and(|asked| answers(self.child, asked).contains(&said)) {
                return Err(Breach::Unasked(said));
            }
            match asked.filter(|_| self.is_engine()) {
                Some(Message::Loaded) => (self.serves, self.may_lose) = (true, true),
                Some(Message::Release) => self.may_lose = false, // what is lost now is loaded anyway
                _ => {}
            }
        }
        let expected = if self.child == "configuration" { HANDED_OVER } else { 0 };
        if descriptors == expected { Ok(()) } else { Err(Breach::Descriptors(said, descriptors)) }
    }
}

/// What a child may answer to what it has one answer to.
fn answers(child: &str, asked: Message) -> &'static [Message] {
    use Message as M;
    match (child, asked) {
        ("gate", M::Start) => &[M::Bound],
        ("configuration", M::Start)
        | ("gate", M::Loaded | M::Settings | M::Enforce | M::Release)
        | ("engine", M::Start | M::Loaded | M::Enforce | M::Release | M::Revoke) => &[M::Ready],
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::Message::{
        self, Bound, Enforce, Explain, Loaded, Lost, Prepared, Ready, Release, Report, Reported, Revoke, Settings,
        Start, Stop, Unable, Watch,
    };
    use super::{Breach, Vocabulary};

    const ALL: [Message; 16] = [
        Start, Bound, Loaded, Ready, Lost, Settings, Unable, Enforce, Release, Revoke, Stop, Report, Reported, Explain,
        Watch, Prepared,
    ];

    /// What a child with this past may say now.
    fn may_say(child: &'static str, past: &[(Message, Message)]) -> Vec<Message> {
        let after = |past: &[(Message, Message)]| {
            let mut vocabulary = Vocabulary::new(child);
            for (told, said) in past {
                vocabulary.tell(*told);
                if told != said {
                    assert_eq!(vocabulary.hear(*said, 0), Ok(()), "{told:?} {said:?}");
                }
            }
            vocabulary
        };
        let descriptors = if child == "configuration" { 3 } else { 0 };
        ALL.into_iter().filter(|said| after(past).hear(*said, descriptors).is_ok()).collect()
    }

    /// Told, and not answered.
    const fn only(told: Message) -> (Message, Message) {
        (told, told)
    }

    /// What an engine that serves may say after this.
    fn engine(more: &[(Message, Message)]) -> Vec<Message> {
        may_say("engine", &[&[(Start, Ready), (Loaded, Ready)], more].concat())
    }

    #[test]
    fn a_child_may_only_answer_and_only_what_it_was_asked() {
        assert_eq!(may_say("configuration", &[]), [Ready]);
        assert_eq!(may_say("engine", &[]), []);
        assert_eq!(may_say("gate", &[]), []);
        assert_eq!(may_say("engine", &[only(Start)]), [Ready]);
        for told in [Enforce, Release, Revoke] {
            assert_eq!(engine(&[only(told)]), [Ready, Lost], "{told:?}");
        }
        assert_eq!(may_say("gate", &[only(Start)]), [Bound]);
        for told in [Loaded, Settings, Enforce, Release] {
            assert_eq!(may_say("gate", &[(Start, Bound), only(told)]), [Ready], "{told:?}");
        }
        assert_eq!(may_say("gate", &[(Start, Bound), only(Stop)]), []);
        assert_eq!(may_say("stranger", &[only(Start)]), []);
    }

    #[test]
    fn an_answer_is_good_once() {
        assert_eq!(may_say("engine", &[(Start, Ready)]), []);
        assert_eq!(engine(&[(Settings, Unable)]), [Lost]);
        assert_eq!(engine(&[(Settings, Prepared)]), [Lost]);
        assert_eq!(engine(&[(Revoke, Ready)]), [Lost]);
        assert_eq!(may_say("gate", &[(Start, Bound)]), []);
        assert_eq!(may_say("gate", &[(Start, Bound), (Loaded, Ready)]), []);
        let mut configuration = Vocabulary::new("configuration");
        assert_eq!(configuration.hear(Ready, 3), Ok(()));
        assert_eq!(configuration.hear(Ready, 3), Err(Breach::Unasked(Ready)));
    }

    #[test]
    fn the_table_is_lost_once_for_each_time_that_it_was_loaded_and_never_before_the_engine_serves() {
        assert_eq!(may_say("engine", &[(Start, Ready), only(Loaded)]), [Ready]);
        assert_eq!(engine(&[]), [Lost]);
        assert_eq!(engine(&[(Revoke, Lost)]), [Ready], "once; the answer may still come");
        assert_eq!(engine(&[(Revoke, Lost), only(Loaded)]), [Ready, Lost]);
        assert_eq!(engine(&[only(Loaded), only(Loaded)]), [Lost]);
        assert_eq!(engine(&[(Release, Ready)]), [], "what is lost now is loaded anyway");
        assert_eq!(engine(&[(Release, Ready), only(Loaded)]), [Lost]);
    }

    #[test]
    fn reports_and_preparations_are_good_once_and_beside_any_other_answer() {
        assert_eq!(engine(&[only(Report)]), [Lost, Reported]);
        assert_eq!(engine(&[(Report, Reported)]), [Lost]);
        assert_eq!(engine(&[only(Watch)]), [Lost]);
        assert_eq!(engine(&[only(Revoke), only(Watch)]), [Ready, Lost]);
        assert_eq!(may_say("engine", &[(Start, Ready), only(Explain)]), [Reported]);
        assert_eq!(engine(&[only(Revoke), only(Report)]), [Ready, Lost, Reported]);
        assert_eq!(engine(&[only(Revoke), (Report, Reported)]), [Ready, Lost], "the answer may still come");
        assert_eq!(engine(&[only(Settings), only(Revoke)]), [Ready, Lost, Unable, Prepared]);
        assert_eq!(engine(&[only(Settings), only(Revoke), (Report, Prepared)]), [Ready, Lost, Reported]);
    }

    #[test]
    fn descriptors_come_from_configuration_alone_and_are_three() {
        for count in [0, 2, 4] {
            assert_eq!(Vocabulary::new("configuration").hear(Ready, count), Err(Breach::Descriptors(Ready, count)));
        }
        let mut engine = Vocabulary::new("engine");
        engine.tell(Start);
        assert_eq!(engine.hear(Ready, 1), Err(Breach::Descriptors(Ready, 1)));
    }
}
