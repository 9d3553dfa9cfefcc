//! Differences between two texts, line by line.

use std::fmt::Write as _;

/// Unchanged lines shown around a change.
const CONTEXT: usize = 3;
/// Cells of the table of common subsequences. Larger differences are shown as all old and then all new lines.
const CELLS_MAX: usize = 16_000_000;

enum Line<'a> {
    Same(&'a str),
    Old(&'a str),
    New(&'a str),
}

/// Changed lines behind `-` and `+`, with some of their neighbours; empty if nothing differs.
pub(crate) fn lines(old: &str, new: &str) -> String {
    let lines = compare(old, new);
    let changed: Vec<_> =
        (0..lines.len()).filter(|n| !matches!(lines[*n], Line::Same(_))).collect();
    let mut text = String::new();
    let mut last_shown = None;
    for (n, line) in lines.iter().enumerate() {
        let after = changed.partition_point(|at| at + CONTEXT < n);
        if changed.get(after).is_none_or(|at| *at > n + CONTEXT) {
            continue;
        }
        if n > 0 && last_shown != Some(n - 1) {
            text.push_str("  ...\n");
        }
        last_shown = Some(n);
        let (sign, line) = match line {
            Line::Same(line) => (' ', line),
            Line::Old(line) => ('-', line),
            Line::New(line) => ('+', line),
        };
        // Writing to a String cannot fail.
        _ = writeln!(text, "{sign} {line}");
    }
    text
}

fn compare<'a>(old: &'a str, new: &'a str) -> Vec<Line<'a>> {
    let (old, new): (Vec<_>, Vec<_>) = (old.lines().collect(), new.lines().collect());
    let head = old.iter().zip(&new).take_while(|(a, b)| a == b).count();
    let tails = old[head..].iter().rev().zip(new[head..].iter().rev());
    let tail = tails.take_while(|(a, b)| a == b).count();
    let (a, b) = (&old[head..old.len() - tail], &new[head..new.len() - tail]);
    let mut lines: Vec<_> = old[..head].iter().map(|line| Line::Same(line)).collect();
    if (a.len() + 1).saturating_mul(b.len() + 1) > CELLS_MAX {
        lines.extend(a.iter().map(|line| Line::Old(line)));
        lines.extend(b.iter().map(|line| Line::New(line)));
    } else {
        subsequence(a, b, &mut lines);
    }
    lines.extend(old[old.len() - tail..].iter().map(|line| Line::Same(line)));
    lines
}

/// Keeps a longest common subsequence.
fn subsequence<'a>(a: &[&'a str], b: &[&'a str], lines: &mut Vec<Line<'a>>) {
    let width = b.len() + 1;
    let mut longest = vec![0_u32; (a.len() + 1) * width];
    for i in (0..a.len()).rev() {
        for j in (0..b.len()).rev() {
            longest[i * width + j] = if a[i] == b[j] {
                longest[(i + 1) * width + j + 1] + 1
            } else {
                longest[(i + 1) * width + j].max(longest[i * width + j + 1])
            };
        }
    }
    let (mut i, mut j) = (0, 0);
    while i < a.len() || j < b.len() {
        if i < a.len() && j < b.len() && a[i] == b[j] {
            lines.push(Line::Same(a[i]));
            (i, j) = (i + 1, j + 1);
        } else if j == b.len()
            || (i < a.len() && longest[(i + 1) * width + j] >= longest[i * width + j + 1])
        {
            lines.push(Line::Old(a[i]));
            i += 1;
        } else {
            lines.push(Line::New(b[j]));
            j += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_shown_with_their_neighbours_only() {
        let old = "a\nb\nc\nd\ne\nf\ng\nh\ni\n";
        let new = "a\nb\nc\nd\nE\nf\ng\nh\ni\n";
        assert_eq!(lines(old, new), "  ...\n  b\n  c\n  d\n- e\n+ E\n  f\n  g\n  h\n");
        assert_eq!(lines(old, old), "");
        assert_eq!(lines("", "x\ny\n"), "+ x\n+ y\n");
    }

    #[test]
    fn an_inserted_line_does_not_change_the_others() {
        assert_eq!(lines("a\nc\n", "a\nb\nc\n"), "  a\n+ b\n  c\n");
        assert_eq!(lines("a\nb\nx\nc\n", "b\nx\ny\n"), "- a\n  b\n  x\n- c\n+ y\n");
    }
}
