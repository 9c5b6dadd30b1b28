//! The pages name what is there.

#[path = "support/tree.rs"]
mod tree;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}

fn pages() -> Vec<PathBuf> {
    let is_page = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "md");
    let mut pages: Vec<PathBuf> = tree::files(&root("docs")).into_iter().filter(is_page).collect();
    pages.push(root("README.md"));
    pages
}

/// A sentence about behaviour. Settings of the kernel have four words at most.
fn is_name_of_a_test(text: &str) -> bool {
    let is_word = |word: &str| !word.is_empty() && word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
    text.split('_').count() > 4 && text.split('_').all(is_word)
}

#[test]
fn every_test_that_a_page_names_is_there() {
    let sources = ["tests", "src"].map(|directory| tree::files(&root(directory))).concat();
    let is_rust = |path: &&PathBuf| path.extension().is_some_and(|extension| extension == "rs");
    let code: String = sources.iter().filter(is_rust).map(|path| read(path)).collect();
    let tests: BTreeSet<&str> = code.split("fn ").map(|rest| rest.split('(').next().unwrap()).collect();
    let mut named = 0;
    for page in pages() {
        for name in read(&page).split('`').skip(1).step_by(2).filter(|text| is_name_of_a_test(text)) {
            assert!(tests.contains(name), "{}: there is no test {name}", page.display());
            named += 1;
        }
    }
    assert!(named > 200, "only {named} names were found: this test no longer sees them");
}

#[test]
fn every_page_that_a_page_links_to_is_there_and_has_the_heading() {
    let mut links = 0;
    for page in pages() {
        let text = read(&page);
        for target in text.split("](").skip(1).map(|rest| rest.split(')').next().unwrap()) {
            if target.contains("://") {
                continue;
            }
            let (file, heading) = target.split_once('#').unwrap_or((target, ""));
            let linked = if file.is_empty() { page.clone() } else { page.with_file_name(file) };
            let linked = if file.contains('/') { page.parent().unwrap().join(file) } else { linked };
            assert!(linked.is_file(), "{}: {target} is not there", page.display());
            let anchor = |line: &str| {
                let kept = line.trim_start_matches('#').trim().to_lowercase();
                kept.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_')).collect::<String>()
            };
            let has_heading =
                read(&linked).lines().any(|line| line.starts_with('#') && anchor(line).replace(' ', "-") == heading);
            assert!(heading.is_empty() || has_heading, "{}: {target} has no such heading", page.display());
            links += 1;
        }
    }
    assert!(links > 20, "only {links} links were found: this test no longer sees them");
}

#[test]
fn readme_lists_every_page() {
    let readme = read(&root("README.md"));
    for page in pages() {
        let name = page.file_name().unwrap().to_str().unwrap();
        assert!(name == "README.md" || readme.contains(&format!("](docs/{name})")), "{name}");
    }
}

#[test]
fn the_guide_shows_the_files_of_the_examples_as_they_are() {
    let guide = read(&root("docs/guide-server.md"));
    let mut shown = 0;
    for (place, _) in guide.match_indices("`examples/") {
        let Some((path, rest)) = guide[place + 1..].split_once("`:\n\n") else { continue };
        if path.contains(char::is_whitespace) {
            continue; // mentioned, not shown
        }
        let lines = rest.lines().take_while(|line| line.is_empty() || line.starts_with("    "));
        let block: String = lines.map(|line| format!("{}\n", line.strip_prefix("    ").unwrap_or(line))).collect();
        assert_eq!(block.trim_end(), read(&root(path)).trim_end(), "{path}");
        shown += 1;
    }
    assert!(shown > 8, "only {shown} files were found: this test no longer sees them");
}
