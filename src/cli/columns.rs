//! Lists for people.

/// The rows as lines, their cells in columns. An empty cell becomes a dash, so that `awk` counts right too.
pub(super) fn columns<const N: usize>(rows: &[[String; N]]) -> String {
    let shown = |cell: &String| if cell.is_empty() { "-".to_owned() } else { cell.clone() };
    let mut widths = [1; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let line = |row: &[String; N]| {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{:<width$}", shown(cell)));
        format!("{}\n", cells.collect::<Vec<_>>().join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::columns;

    #[test]
    fn cells_stand_under_each_other_and_none_is_empty() {
        let rows = [["NAME", "FROM", "KEY"], ["alice", "", "a"], ["bo", "10.0.0.0/8", "b"]];
        let shown = columns(&rows.map(|row| row.map(str::to_owned)));
        assert_eq!(shown, "NAME   FROM        KEY\nalice  -           a\nbo     10.0.0.0/8  b\n");
    }
}
