//! The table itself: when it is loaded, what of it is lost, and what others have put into it.

use std::io;
use std::time::Instant;

use tracing::info;

use super::Reconciler;
use crate::nft::{Door, Element, Loss};
use crate::serve::commands::{BATCH, Command, monotonic};
use crate::serve::ledger::Hold;

impl Reconciler {
    /// The table is loaded: the first time, takes over the doors that are open, and shuts those that nobody may open any more;
    /// later, opens those that went with the old one.
    ///
    /// # Errors
    /// Whatever makes it useless to go on.
    pub fn loaded(&mut self) -> io::Result<()> {
        self.gate.call(&[Command::Count]).ok(); // it has another number now
        if self.serves {
            return self.take_table_back();
        }
        self.watch.loss(self.gate.numbers())?; // the loading has deleted the rules of before
        self.watch.take_loaded(); // they are listed
        self.loss = self.take_unmended();
        if self.loss != Loss::Nothing {
            self.ask_for_load();
        }
        self.forget_begun();
        let compared = self.compare(true);
        self.gate.check()?;
        compared.map_err(io::Error::other)?;
        let (ledger, clock, now) = (&self.ledger, monotonic(), Instant::now());
        let known = ledger.ends(now).map(|(door, left)| Command::Known(Element::Opens(*door), clock + left));
        let known: Vec<_> = known.collect();
        known.chunks(BATCH).for_each(|some| drop(self.gate.call(some)));
        self.look_at_sets();
        self.shut_what_policy_forbids()?;
        self.serves = true;
        self.drain_table_events()?; // what was lost meanwhile is to be told
        self.gate.check()
    }

    /// Root is to load the table again; told once.
    pub const fn take_lost(&mut self) -> bool {
        std::mem::replace(&mut self.is_to_be_loaded, false)
    }

    /// Whoever owns the table: root takes it from the gate before it loads another.
    fn ask_for_load(&mut self) {
        self.expect_load();
        self.is_to_be_loaded = true;
    }

    /// From here on what is changed besides the load may have been changed after it.
    fn expect_load(&mut self) {
        self.is_loading = true;
        self.watch.take_unmended(0);
    }

    /// What others have changed of the table since a load was expected.
    fn take_unmended(&mut self) -> Loss {
        // Those who load a table themselves do so before root looks at it.
        let loads = usize::from(self.policy.owns_table);
        self.watch.take_unmended(loads)
    }

    /// Reads what was changed of the table, and what of it was lost. A door that somebody deleted by hand is taken back: it must
    /// not come again with the next restoration.
    ///
    /// # Errors
    /// The kernel's.
    pub fn drain_table_events(&mut self) -> io::Result<()> {
        self.read_changes()?;
        let now = Instant::now();
        let made = self.watch.take_new_sets();
        self.layouts.retain(|set, _| !made.contains(set));
        self.ledger.mark_sets(&made);
        let loaded = self.watch.take_loaded();
        for door in self.watch.take_deleted() {
            let gone = self.ledger.remove_door(&door);
            for (Door { source, port, .. }, Hold { user, service, .. }) in gone.iter().filter(|gone| gone.1.until > now)
            {
                info!(%user, %service, %source, %port, "shut by somebody else");
            }
            self.past.add(&gone, now);
        }
        if loaded.begun {
            self.forget_begun();
        }
        self.mark_loaded(&loaded.doors, now);
        let of_ours = loaded.members.into_iter().filter(|member| self.sets.contains(&member.set));
        of_ours.for_each(|member| self.ledger.mark_member(member));
        if loaded.are_missed {
            self.layouts.clear(); // sets may have been made anew
        }
        if loaded.are_missed || std::mem::take(&mut self.is_unlisted) {
            // There is nothing to list until the table is loaded again.
            self.is_unlisted = self.compare(false).is_err();
        }
        // Nobody can take away what we own, nor could root load it.
        if self.loss != Loss::Nothing && self.serves && !self.gate.last().owns_table && !self.is_loading {
            self.ask_for_load();
        }
        Ok(())
    }

    fn read_changes(&mut self) -> io::Result<()> {
        let loss = self.watch.loss(self.gate.numbers())?;
        if !self.gate.last().owns_table {
            self.lose(loss); // nobody can take away what we own; what was missed is listed
        }
        Ok(())
    }

    fn lose(&mut self, loss: Loss) {
        if loss == Loss::Doors && self.loss != Loss::Doors {
            self.ledger.lose_doors();
        }
        self.loss = self.loss.max(loss);
    }

    /// Root is about to load another table, which the gate has let go of, or is about to.
    ///
    /// # Errors
    /// The kernel's.
    pub fn released(&mut self) -> io::Result<()> {
        self.read_changes()?;
        self.gate.released();
        if !self.is_loading {
            self.is_loading = true; // what is lost now is loaded anyway
            self.drain_table_events()?;
            self.expect_load();
        }
        Ok(())
    }

    fn take_table_back(&mut self) -> io::Result<()> {
        self.drain_table_events()?;
        let loss = self.loss;
        self.is_loading = false;
        // The loading itself has deleted rules, and added them. What others have changed meanwhile is another loss.
        let unmended = self.take_unmended();
        if unmended == Loss::Nothing {
            self.loss = Loss::Nothing;
            if loss == Loss::Doors {
                self.ledger.mark_all();
            }
            self.ledger.resume();
        } else {
            self.lose(unmended);
            self.ask_for_load();
        }
        self.drain_table_events()
    }
}
