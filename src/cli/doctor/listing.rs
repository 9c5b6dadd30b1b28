//! What nft lists of other tables, as far as it says what becomes of a packet.

use std::collections::BTreeMap;

/// A table that is in force.
#[derive(Default)]
pub(super) struct Table {
    /// `ip`, `ip6`, `inet`, `netdev`...
    pub(super) family: String,
    pub(super) name: String,
    pub(super) chains: BTreeMap<String, Chain>,
    /// Elements of sets and maps by name; of maps with what they lead to.
    pub(super) sets: BTreeMap<String, Vec<String>>,
    is_dormant: bool,
}

/// A chain with its rules.
#[derive(Default)]
pub(super) struct Chain {
    /// Where packets enter it, if they do.
    pub(super) hook: Option<String>,
    /// It comes before destinations are translated.
    pub(super) is_early: bool,
    /// What goes through all of it is dropped.
    pub(super) drops: bool,
    pub(super) rules: Vec<Rule>,
}

/// A rule's words. What stands in braces or quotes is one.
pub(super) struct Rule(pub(super) Vec<String>);

/// Priority at which destinations are translated.
const DSTNAT: i32 = -100;

/// What the lines between two braces are about.
enum Block {
    Table,
    Chain(String),
    Set(String),
    Other,
}

/// The tables of `nft -s list ruleset`, without those that are asleep.
pub(super) fn read(listing: &str) -> Vec<Table> {
    let mut tables: Vec<Table> = Vec::new();
    let mut blocks: Vec<Block> = Vec::new();
    let mut lines = listing.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    while let Some(line) = lines.next() {
        let mut line = line.to_owned();
        // The elements of a set go over many lines; those of a rule over one.
        while line.starts_with("elements = {") && !line.ends_with('}') {
            let Some(next) = lines.next() else { break };
            line.push(' ');
            line.push_str(next);
        }
        if line == "}" {
            blocks.pop();
            continue;
        }
        if blocks.is_empty() {
            tables.push(head_of_table(&line));
            blocks.push(Block::Table);
            continue;
        }
        if let Some(table) = tables.last_mut() {
            table.take(&line, &mut blocks);
        }
    }
    tables.retain(|table| !table.is_dormant);
    tables
}

/// `table inet filter {`
fn head_of_table(line: &str) -> Table {
    let mut words = line.split_whitespace().skip(1).map(str::to_owned);
    Table { family: words.next().unwrap_or_default(), name: words.next().unwrap_or_default(), ..Table::default() }
}

/// `chain input {`
fn block(line: &str) -> Block {
    let mut words = line.split_whitespace();
    match (words.next(), words.next()) {
        (Some("chain"), Some(name)) => Block::Chain(name.to_owned()),
        (Some("set" | "map"), Some(name)) => Block::Set(name.to_owned()),
        _ => Block::Other,
    }
}

impl Table {
    /// A line within these blocks, of which it may begin or end one.
    fn take(&mut self, line: &str, blocks: &mut Vec<Block>) {
        match blocks.last() {
            Some(Block::Table) if line.ends_with('{') => {
                let block = block(line);
                match &block {
                    // Empty ones are there too.
                    Block::Chain(name) => drop(self.chains.entry(name.clone()).or_default()),
                    Block::Set(name) => drop(self.sets.entry(name.clone()).or_default()),
                    Block::Table | Block::Other => {}
                }
                blocks.push(block);
            }
            Some(Block::Table) => self.is_dormant |= line.starts_with("flags ") && line.contains("dormant"),
            Some(Block::Chain(name)) => {
                self.chains.entry(name.clone()).or_default().take(line);
                if line.ends_with('{') {
                    blocks.push(Block::Other); // a chain without a name, which nobody follows
                }
            }
            Some(Block::Set(name)) => {
                let set = self.sets.entry(name.clone()).or_default();
                set.extend(line.strip_prefix("elements = ").map(items).unwrap_or_default());
            }
            Some(Block::Other) | None => {}
        }
    }

    /// All of its rules.
    pub(super) fn rules(&self) -> impl Iterator<Item = &Rule> {
        self.chains.values().flat_map(|chain| &chain.rules)
    }

    /// Chains that packets may get to that come in at this hook.
    pub(super) fn reached_from(&self, hook: &str) -> Vec<&Chain> {
        let hooked = self.chains.iter().filter(|(_, chain)| chain.hook.as_deref() == Some(hook));
        let mut names: Vec<&str> = hooked.map(|(name, _)| name.as_str()).collect();
        let mut reached = BTreeMap::new();
        while let Some(name) = names.pop() {
            let Some(chain) = self.chains.get(name).filter(|_| !reached.contains_key(name)) else { continue };
            reached.insert(name, chain);
            let words = chain.rules.iter().flat_map(|Rule(words)| words);
            let maps = words.clone().filter_map(|word| self.sets.get(word.strip_prefix('@')?)).flatten();
            let words: Vec<&str> = words.chain(maps).flat_map(|word| word.split([' ', ',', '}'])).collect();
            let jumps = words.windows(2).filter_map(|pair| match pair {
                ["jump" | "goto", target] => Some(*target),
                _ => None,
            });
            names.extend(jumps);
        }
        reached.into_values().collect()
    }
}

impl Chain {
    fn take(&mut self, line: &str) {
        if let Some(kind) = line.strip_prefix("type ") {
            let mut words = kind.split_whitespace().skip_while(|word| *word != "hook").skip(1);
            self.hook = words.next().map(str::to_owned);
            let is_first = self.hook.as_deref() == Some("prerouting");
            self.is_early = is_first && priority(kind).is_some_and(|priority| priority < DSTNAT);
            self.drops = kind.contains("policy drop");
        } else {
            self.rules.push(Rule(words(line)));
        }
    }
}

/// `priority raw;`, `priority dstnat - 10;`, `priority -300;`
fn priority(kind: &str) -> Option<i32> {
    let (_, priority) = kind.split_once("priority ")?;
    let mut words = priority.split(';').next()?.split_whitespace();
    let first = words.next()?;
    let base = match first {
        "raw" => -300,
        "mangle" => -150,
        "dstnat" => DSTNAT,
        "filter" => 0,
        "security" => 50,
        number => number.parse().ok()?,
    };
    match (words.next(), words.next().and_then(|number| number.parse::<i32>().ok())) {
        (Some("+"), Some(more)) => base.checked_add(more),
        (Some("-"), Some(less)) => base.checked_sub(less),
        _ => Some(base),
    }
}

impl Rule {
    /// As nft shows it.
    pub(super) fn text(&self) -> String {
        format!("`{}`", self.0.join(" "))
    }
}

/// The words of a line; what stands in braces, or in quotes, is one of them.
fn words(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let (mut is_quoted, mut is_braced) = (false, false);
    for c in line.chars() {
        is_quoted ^= c == '"';
        is_braced = !is_quoted && (c == '{' || is_braced && c != '}');
        match words.last_mut() {
            Some(word) if is_quoted || is_braced || !c.is_whitespace() => word.push(c),
            _ => words.push(String::new()),
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

/// What stands in braces, one by one.
pub(super) fn items(braced: &str) -> Vec<String> {
    let inner = braced.trim().trim_start_matches('{').trim_end_matches('}');
    inner.split(',').map(str::trim).filter(|item| !item.is_empty()).map(str::to_owned).collect()
}
