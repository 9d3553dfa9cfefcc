//! The words that operators see are explained to them.

use std::collections::BTreeSet;

use cnsmo_common::stat::Reason;

const DOCUMENT: &str = include_str!("../../docs/drop-reasons.md");

#[test]
fn every_word_is_documented_and_no_other() {
    let words: BTreeSet<&str> = Reason::ALL.map(Reason::as_str).into();
    assert_eq!(words.len(), Reason::ALL.len(), "a word stands for one reason");

    let mut explained = BTreeSet::new();
    for section in DOCUMENT.split("\n## ").skip(1) {
        let (heading, text) = section.split_once('\n').unwrap();
        let word = heading.trim_matches('`');
        assert!(explained.insert(word), "`{word}` is explained twice");
        for part in ["**Means**", "**Cause**", "**Do**"] {
            assert!(text.contains(part), "`{word}` has no {part}");
        }
        assert!(DOCUMENT.contains(&format!("| [`{word}`](#{word}) |")), "`{word}` is in no row");
    }
    assert_eq!(explained, words);
}

#[test]
fn each_reason_has_a_counter_of_its_own() {
    for (place, reason) in (0..).zip(Reason::ALL) {
        assert_eq!(reason as u32, place, "{}", reason.as_str());
    }
}
