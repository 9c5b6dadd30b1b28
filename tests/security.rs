//! What docs/security.md computes: its numbers, and its bound in a world so small that forgeries happen.

#[path = "support/numbers.rs"]
mod numbers;

use std::collections::HashMap;
use std::fs;

use numbers::Numbers;

/// Of docs/security.md: what makes up the chance of a stranger.
#[derive(Clone, Copy)]
struct Setup {
    users: f64,
    services: f64,
    window: f64,
    knock_ports: f64,
    /// Forms of `source` that count: 2, or 1 where binding is demanded.
    forms: f64,
}

const USUAL: Setup = Setup { users: 100.0, services: 3.0, window: 60.0, knock_ports: 1024.0, forms: 2.0 };
const TOKEN_HALF: f64 = 4_294_967_296.0;
const SYNS_A_SECOND: f64 = 350_000.0;
const DAY: f64 = 86_400.0;
const YEAR: f64 = 365.25 * DAY;

impl Setup {
    fn live(self) -> f64 {
        self.users * self.services * (2.0 * self.window + 1.0)
    }

    /// That one SYN has a live sequence number and its knock port: of 2^32 choices at most this share fall on one port.
    fn hit(self) -> f64 {
        self.live() / TOKEN_HALF * (TOKEN_HALF / self.knock_ports).ceil() / TOKEN_HALF
    }

    fn forgery(self) -> f64 {
        self.forms * self.hit() / TOKEN_HALF
    }

    fn year(self) -> f64 {
        self.forgery() * SYNS_A_SECOND * YEAR
    }
}

fn cells(line: &str) -> Vec<&str> {
    line.trim_matches('|').split('|').map(str::trim).collect()
}

#[test]
fn the_numbers_of_the_security_page_are_those_of_its_formula() {
    let page = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/security.md")).unwrap();
    let rows: HashMap<&str, Vec<&str>> =
        page.lines().filter(|line| line.starts_with("| ")).map(cells).map(|row| (row[0], row)).collect();
    for users in [1_u32, 10, 100, 1000, 10_000] {
        let setup = Setup { users: users.into(), ..USUAL };
        let expected = [
            users.to_string(),
            setup.live().to_string(),
            format!("{:.1e}", setup.forgery()),
            format!("{:.1e}", setup.year()),
            format!("{:.2}", setup.hit() * SYNS_A_SECOND * 60.0),
        ];
        assert_eq!(rows.get(expected[0].as_str()), Some(&expected.each_ref().map(String::as_str).to_vec()));
    }
    for (what, setup) in [
        ("as above, 100 users", USUAL),
        ("binding demanded of all", Setup { forms: 1.0, ..USUAL }),
        ("window of 10 minutes", Setup { window: 600.0, ..USUAL }),
        ("window narrowed to 5 s", Setup { window: 5.0, ..USUAL }),
        ("one knock port", Setup { knock_ports: 1.0, ..USUAL }),
        ("16384 knock ports", Setup { knock_ports: 16384.0, ..USUAL }),
    ] {
        assert_eq!(rows.get(what), Some(&vec![what, &format!("{:.1e}", setup.year())]));
    }
    let page = page.split_whitespace().collect::<Vec<_>>().join(" ");
    let tries = 3.0 * 2.0 / TOKEN_HALF;
    assert!(page.contains(&format!("{tries:.1e} for each knock that is held back")), "{tries:.1e}");
    let switching = YEAR * YEAR / 2.0_f64.powi(129);
    assert!(page.contains(&format!("{switching:.1e} for each key and year")), "{switching:.1e}");
}

/// docs/protocol.md section 3 with functions drawn at random, 6 bits where a sequence number has 32, 5 where a tag has, and
/// 4 knock ports: the checks 3, 5, 6 and 9, and the tries.
struct SmallWorld {
    numbers: Numbers,
    /// One for each (user, n).
    pads: Vec<Pad>,
    /// (place of the pad, selector, source) -> tag; source 0 stands for "not bound".
    tags: HashMap<(usize, u64, u8), u64>,
}

struct Pad {
    /// For selector 0.
    sequence: u64,
    port: u64,
    mask: u64,
    wrong_tags: u32,
}

const SEQUENCES: u64 = 64;
const TAGS: u64 = 32;
const KNOCK_PORTS: u64 = 4;
const PADS: usize = 8;
const SELECTORS: u64 = 2;
const TRIES: u32 = 3;

/// What became of one SYN.
#[derive(PartialEq)]
enum End {
    Opened,
    WrongTag,
    Nothing,
}

#[derive(Clone, Copy)]
struct Syn {
    sequence: u64,
    port: u64,
    tsval: u64,
    source: u8,
}

impl SmallWorld {
    fn new(seed: u64) -> Self {
        let mut numbers = Numbers(seed);
        let mut pad = || {
            let [sequence, port, mask] = [SEQUENCES, KNOCK_PORTS, TAGS].map(|end| numbers.below(end));
            Pad { sequence, port, mask, wrong_tags: 0 }
        };
        let pads = (0..PADS).map(|_| pad()).collect();
        Self { numbers, pads, tags: HashMap::new() }
    }

    fn tag(&mut self, pad: usize, selector: u64, source: u8) -> u64 {
        let numbers = &mut self.numbers;
        *self.tags.entry((pad, selector, source)).or_insert_with(|| numbers.below(TAGS))
    }

    /// A knock that somebody else made, bound to the source that it came from.
    fn issue(&mut self, pad: usize, selector: u64, source: u8) -> Syn {
        let tag = self.tag(pad, selector, source);
        let Pad { sequence, port, mask, .. } = self.pads[pad];
        Syn { sequence: sequence ^ selector, port, tsval: tag ^ mask, source }
    }

    fn receive(&mut self, syn: Syn) -> End {
        let mut wrong = Vec::new();
        for (place, selector) in (0..PADS).flat_map(|place| (0..SELECTORS).map(move |selector| (place, selector))) {
            let Pad { sequence, port, mask, wrong_tags } = self.pads[place];
            if sequence ^ selector != syn.sequence || wrong_tags >= TRIES || port != syn.port {
                continue;
            }
            if [syn.source, 0].into_iter().any(|source| self.tag(place, selector, source) == syn.tsval ^ mask) {
                return End::Opened;
            }
            wrong.push(place);
        }
        wrong.iter().for_each(|&place| self.pads[place].wrong_tags += 1);
        if wrong.is_empty() { End::Nothing } else { End::WrongTag }
    }

    fn any_syn(&mut self) -> Syn {
        let [sequence, port, tsval] = [SEQUENCES, KNOCK_PORTS, TAGS].map(|end| self.numbers.below(end));
        Syn { sequence, port, tsval, source: 1 }
    }
}

/// In how many of many worlds an attack opens something.
fn frequency(attack: impl Fn(&mut SmallWorld) -> bool) -> f64 {
    const WORLDS: u32 = 60_000;
    let opened = (0..WORLDS).filter(|&world| attack(&mut SmallWorld::new(u64::from(world) << 20))).count();
    f64::from(u32::try_from(opened).unwrap()) / f64::from(WORLDS)
}

#[test]
fn the_bound_holds_and_is_nearly_reached_in_a_small_world() {
    const SYNS: u32 = 12;
    #[expect(clippy::cast_precision_loss, reason = "these are small")]
    let (live, space, tags) = ((PADS as u64 * SELECTORS) as f64, (SEQUENCES * KNOCK_PORTS * TAGS) as f64, TAGS as f64);
    let (a, m) = (2.0, f64::from(TRIES));
    let noise = 0.007; // more than four standard deviations

    let stranger = a * live * f64::from(SYNS) / space;
    let silent = frequency(|world| {
        (0..SYNS).any(|_| {
            let syn = world.any_syn();
            world.receive(syn) == End::Opened
        })
    });
    assert!((stranger * 0.9 - noise..stranger + noise).contains(&silent), "{silent} of {stranger}");

    // Told of a wrong tag, she stays where it was. That gains something, and never more than the number of tries.
    let told = frequency(|world| {
        let mut left = SYNS;
        let mut syn = world.any_syn();
        while left > 0 {
            match world.receive(syn) {
                End::Opened => return true,
                End::WrongTag => syn = Syn { tsval: (syn.tsval + 1) % TAGS, source: syn.source + 1, ..syn },
                End::Nothing => syn = world.any_syn(),
            }
            left -= 1;
        }
        false
    });
    println!("stranger {silent:.4} of {stranger:.4}, told {told:.4}");
    assert!((2.0 * silent..m * stranger).contains(&told), "{told} of {stranger}");

    // A knock that is held back: its sequence number and port are known, and more SYNs than the tries gain nothing.
    let held_back = a * m / tags;
    for syns in [TRIES, 20] {
        let redirected = frequency(|world| {
            let knock = world.issue(0, 1, 200);
            (0..syns).any(|place| {
                let tsval = (knock.tsval + 1 + u64::from(place)) % TAGS;
                let source = 1 + u8::try_from(place).unwrap();
                world.receive(Syn { tsval, source, ..knock }) == End::Opened
            })
        });
        println!("held back, {syns} SYNs: {redirected:.4} of {held_back:.4}");
        assert!((held_back * 0.85..held_back + noise).contains(&redirected), "{redirected} of {held_back}");
    }
}
