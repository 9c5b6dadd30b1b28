//! How a message about a place in a file must look.

use std::path::Path;

/// Checks `PATH:LINE:COLUMN: MESSAGE`, the line, and a caret under the column: the place is in the text, the caret stands
/// under the very character, and nothing in it could move a terminal's cursor. Of a text with a private key no line is shown.
pub fn check(path: &Path, text: &str, diagnostic: &str) {
    if text.contains("client_private_key") {
        assert!(!diagnostic.contains('\n'), "{diagnostic:?}");
        return;
    }
    let lines: Vec<&str> = diagnostic.split('\n').collect();
    let [head, shown, caret] = lines[..] else { panic!("not three lines: {diagnostic:?}") };
    assert!(!diagnostic.contains(|c: char| c.is_control() && c != '\n'), "{diagnostic:?}");

    let place = head.strip_prefix(&format!("{}:", path.display())).unwrap();
    let mut numbers = place.split(':').map_while(|number| number.parse::<usize>().ok());
    let (line, column) = (numbers.next().unwrap(), numbers.next().unwrap());
    assert!(line >= 1 && column >= 1, "{head}");
    let meant = text.split('\n').nth(line - 1).expect("a line of the text");
    assert!(column <= meant.chars().count() + 1, "{head}");

    let under = caret.strip_suffix('^').unwrap();
    assert!(under.chars().all(|c| c == ' '), "{caret:?}");
    let above = shown.chars().nth(under.chars().count());
    let meant = meant.chars().nth(column - 1);
    let is_shown = |c: &char| !c.is_control();
    if under.chars().count() == column + 1 {
        assert_eq!(above.filter(|c| *c != ' '), meant.filter(is_shown).filter(|c| *c != ' '), "{diagnostic}");
    } else {
        assert!(column > 400, "the caret of a place that is shown: {diagnostic}");
    }
}
