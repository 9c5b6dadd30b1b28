//! What becomes of the first packet of a connection in a chain that somebody else made.
//!
//! Each condition is met, is not, or may be: what it depends on, such as the sender, is not known here. So a chain has several
//! possible ends, and nothing is called allowed that may be dropped.

use std::cell::RefCell;
use std::collections::BTreeMap;

use super::field::{Field, Is, Packet, field};
use super::listing::{Chain, Rule, Table, items};

/// Chains that call each other deeper than the kernel allows are not followed.
const DEPTH: u8 = 16;

/// What may become of it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum End {
    /// It goes on to the next chain.
    Passed,
    /// Silence.
    Dropped,
    /// The answer of a closed port.
    Reset,
    /// Another answer.
    Rejected,
    /// Another program decides, or what is not followed here.
    Elsewhere,
}

/// The ends that are possible, each with the first that leads to it.
pub(super) type Ends = BTreeMap<End, String>;

/// What a rule does.
enum Then {
    Return,
    End(End),
    Jump(String),
    Goto(String),
    Next,
}

/// Ends, and whether the packet may go on in the chain that called this one.
type Outcome = (Ends, bool);

/// The ends of a base chain.
pub(super) fn ends(table: &Table, name: &str, chain: &Chain, packet: Packet) -> Ends {
    let walk = Walk { table, packet, known: RefCell::default() };
    let (mut ends, goes_on) = walk.chain(name, 0);
    if goes_on {
        let end = if chain.drops { End::Dropped } else { End::Passed };
        ends.insert(end, "its policy".to_owned());
    }
    ends
}

struct Walk<'a> {
    table: &'a Table,
    packet: Packet,
    /// Of chains that were followed.
    known: RefCell<BTreeMap<String, Outcome>>,
}

impl Walk<'_> {
    fn chain(&self, name: &str, depth: u8) -> Outcome {
        if let Some(known) = self.known.borrow().get(name) {
            return known.clone();
        }
        let Some(chain) = self.table.chains.get(name).filter(|_| depth <= DEPTH) else {
            return (Ends::from([(End::Elsewhere, format!("chain {name}"))]), true);
        };
        let (mut ends, mut goes_on, mut returns) = (Ends::new(), true, false);
        let rules = chain.rules.iter().flat_map(|rule| self.rule(rule).into_iter().map(move |does| (rule, does)));
        for (rule, (is, then)) in rules {
            returns |= matches!(then, Then::Return);
            let (more, comes_back) = match then {
                Then::Next => (Ends::new(), true),
                Then::Return => (Ends::new(), false),
                Then::End(end) => (Ends::from([(end, rule.text())]), false),
                Then::Jump(target) => self.chain(&target, depth.saturating_add(1)),
                Then::Goto(target) => {
                    let (more, comes_back) = self.chain(&target, depth.saturating_add(1));
                    returns |= comes_back;
                    (more, false)
                }
            };
            goes_on = comes_back || is == Is::Possible;
            add(&mut ends, more, goes_on);
            if !goes_on {
                break;
            }
        }
        let outcome = (ends, goes_on || returns);
        self.known.borrow_mut().insert(name.to_owned(), outcome.clone());
        outcome
    }

    /// What the rule does, if its conditions may be met: of a map of verdicts each that may be looked up.
    fn rule(&self, rule: &Rule) -> Vec<(Is, Then)> {
        let mut words = rule.0.as_slice();
        let mut all = Is::So;
        while let [first, rest @ ..] = words {
            match first.as_str() {
                "counter" => {
                    let is_named = rest.first().is_some_and(|word| word == "name");
                    words = rest.get(if is_named { 2 } else { 0 }..).unwrap_or_default();
                }
                "comment" => words = rest.get(1..).unwrap_or_default(),
                "log" => words = after_log(rest),
                // What iptables has and nft has no words for.
                "#" => return vec![(Is::Possible, Then::End(End::Elsewhere))],
                "xt" if rest.first().is_some_and(|word| word == "target") => {
                    return vec![(Is::Possible, Then::End(End::Elsewhere))];
                }
                verdict => {
                    if let Some(then) = verdict_of(verdict, rest) {
                        return vec![(all, then)];
                    }
                    let (field, rest) = field(words, self.packet);
                    if let [vmap, map, ..] = rest
                        && vmap == "vmap"
                    {
                        return self.look_up(&field, all, map);
                    }
                    let (is, rest) = field.compare(rest, |set| self.elements(set));
                    words = rest;
                    all = match (all, is) {
                        (_, Is::Not) => return Vec::new(),
                        (Is::So, Is::So) => Is::So,
                        _ => Is::Possible,
                    };
                }
            }
        }
        Vec::new()
    }

    /// `{ 22 : accept, 25 : jump mail }`, or `@name` of such a map.
    fn look_up(&self, field: &Field, all: Is, map: &str) -> Vec<(Is, Then)> {
        let Some(entries) = self.elements(map) else { return vec![(Is::Possible, Then::End(End::Elsewhere))] };
        let mut found = Vec::new();
        for entry in entries {
            let Some((key, verdict)) = entry.split_once(" : ") else { continue };
            let is = field.is(key);
            if is == Is::Not {
                continue;
            }
            let words: Vec<String> = verdict.split_whitespace().map(str::to_owned).collect();
            let then = words.split_first().and_then(|(verdict, rest)| verdict_of(verdict, rest));
            let is = if all == Is::So { is } else { Is::Possible };
            found.push((is, then.unwrap_or(Then::End(End::Elsewhere))));
            if is == Is::So {
                break;
            }
        }
        found
    }

    /// What is in braces, or in a set that has this name; `None` if nobody knows.
    fn elements(&self, set: &str) -> Option<Vec<String>> {
        match set.strip_prefix('@') {
            Some(name) => self.table.sets.get(name).cloned(),
            None => Some(items(set)),
        }
    }
}

/// Of several rules with one end, the first is told, unless there is one that lets nothing go on.
fn add(ends: &mut Ends, more: Ends, goes_on: bool) {
    for (end, rule) in more {
        if goes_on {
            ends.entry(end).or_insert(rule);
        } else {
            ends.insert(end, rule);
        }
    }
}

/// Past what a log statement says of itself.
fn after_log(mut words: &[String]) -> &[String] {
    while let [option, _, rest @ ..] = words
        && matches!(option.as_str(), "prefix" | "level" | "group" | "snaplen" | "queue-threshold" | "flags")
    {
        words = rest;
    }
    words
}

fn verdict_of(verdict: &str, rest: &[String]) -> Option<Then> {
    let target = || rest.first().cloned().unwrap_or_default();
    Some(match verdict {
        "accept" | "dnat" | "redirect" => Then::End(End::Passed),
        "drop" => Then::End(End::Dropped),
        "reject" if rest.join(" ").starts_with("with tcp reset") => Then::End(End::Reset),
        "reject" => Then::End(End::Rejected),
        "continue" => Then::Next,
        "return" => Then::Return,
        "jump" => Then::Jump(target()),
        "goto" => Then::Goto(target()),
        "queue" | "tproxy" | "fwd" | "synproxy" => Then::End(End::Elsewhere),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::super::{listing, translation};
    use super::{End, Packet, ends};

    /// Rules of iptables, of ufw and of Docker, as nft 1.0.6 shows them. This machine may have no iptables to make them with.
    const LISTING: &str = "\
table ip filter {
	chain ufw-before-input {
		iifname \"lo\" counter accept
		ct state related,established counter accept
		ct state invalid counter jump ufw-logging-deny
		ct state invalid counter drop
		meta l4proto icmp icmp type echo-request counter accept
		udp sport 67 udp dport 68 counter accept
		counter jump ufw-not-local
		ip daddr 224.0.0.251 udp dport 5353 counter accept
		counter jump ufw-user-input
	}

	chain ufw-logging-deny {
		limit rate 3/minute burst 10 packets counter log prefix \"[UFW BLOCK] \"
	}

	chain ufw-not-local {
		fib daddr type local counter return
		fib daddr type multicast counter return
		limit rate 3/minute burst 10 packets counter jump ufw-logging-deny
		counter drop
	}

	chain ufw-user-input {
		tcp dport 22 counter accept
		meta l4proto tcp tcp dport { 80, 443 } counter accept
		tcp dport 2200 xt match \"recent\" counter drop
		tcp dport 2200 counter accept
		tcp dport 2201 counter xt target \"TARPIT\"
		ip saddr 192.0.2.0/24 tcp dport 2202 counter accept
	}

	chain INPUT {
		type filter hook input priority filter; policy drop;
		counter jump ufw-before-input
	}
}
table ip nat {
	chain DOCKER {
		iifname \"docker0\" counter return
		ip daddr 127.0.0.1 iifname != \"docker0\" tcp dport 9000 counter dnat to 172.17.0.3:80
		iifname != \"docker0\" tcp dport 8080 counter dnat to 172.17.0.2:80
	}

	chain PREROUTING {
		type nat hook prerouting priority dstnat; policy accept;
		fib daddr type local counter jump DOCKER
	}

	chain OUTPUT {
		type nat hook output priority dstnat; policy accept;
		tcp dport 3128 counter redirect to :22
	}
}
";

    fn packet(port: &str) -> Packet {
        Packet { is_ipv6: false, port: port.parse().unwrap(), is_translated: false }
    }

    #[test]
    fn rules_of_iptables_are_followed_and_what_nft_has_no_words_for_is_never_called_allowed() {
        let tables = listing::read(LISTING);
        let ends =
            |port| ends(&tables[0], "INPUT", &tables[0].chains["INPUT"], packet(port)).into_keys().collect::<Vec<_>>();
        for port in ["tcp/22", "tcp/80", "tcp/443"] {
            assert_eq!(ends(port), [End::Passed], "{port}");
        }
        for port in ["tcp/25", "udp/22", "udp/68", "udp/5353"] {
            assert!(ends(port).contains(&End::Dropped), "{port}");
        }
        assert_eq!(ends("tcp/25"), [End::Dropped]);
        assert_eq!(ends("tcp/2200"), [End::Passed, End::Dropped]);
        assert_eq!(ends("tcp/2201"), [End::Dropped, End::Elsewhere]);
        assert_eq!(ends("tcp/2202"), [End::Passed, End::Dropped]);
    }

    #[test]
    fn ports_that_containers_publish_are_those_that_others_get_to() {
        let tables = listing::read(LISTING);
        let found = translation::of(&tables);
        let covered: Vec<u16> = (1..=u16::MAX)
            .filter(|number| found.iter().any(|one| one.covers(packet(&format!("tcp/{number}")).port)))
            .collect();
        assert_eq!(covered, [8080]);
        assert_eq!((found[0].target.as_str(), found[0].target_port()), ("dnat to 172.17.0.2:80", Some(80)));
    }
}
