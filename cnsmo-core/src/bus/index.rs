//! Who wants a subject: patterns by their tokens, so that a message meets those that match and no others.

use std::collections::HashMap;

use crate::subject::{Pattern, Subject, Wanted};

/// A tree of tokens with a `T` at the end of each pattern.
#[derive(Debug)]
pub(super) struct Index<T> {
    root: Node<T>,
}

#[derive(Debug)]
struct Node<T> {
    /// Patterns that end here.
    here: Option<T>,
    /// Patterns that end with `>` here.
    rest: Option<T>,
    any: Option<Box<Node<T>>>,
    tokens: HashMap<Box<str>, Node<T>>,
}

impl<T> Default for Node<T> {
    fn default() -> Self {
        Self { here: None, rest: None, any: None, tokens: HashMap::new() }
    }
}

impl<T> Default for Index<T> {
    fn default() -> Self {
        Self { root: Node::default() }
    }
}

impl<T: Default> Index<T> {
    /// What is kept for the pattern, made if there is nothing yet.
    pub(super) fn entry(&mut self, pattern: &Pattern) -> &mut T {
        let mut node = &mut self.root;
        for token in pattern.tokens() {
            node = match Wanted::from(token) {
                Wanted::Rest => return node.rest.get_or_insert_default(),
                Wanted::Any => node.any.get_or_insert_default(),
                Wanted::Token(token) => node.tokens.entry(token.into()).or_default(),
            };
        }
        node.here.get_or_insert_default()
    }

    /// Changes what is kept for the pattern; nothing is kept any longer if `change` says so.
    pub(super) fn change(&mut self, pattern: &Pattern, change: impl FnOnce(&mut T) -> Keep) {
        let tokens: Vec<&str> = pattern.tokens().collect();
        self.root.change(&tokens, change);
    }

    /// Visits what is kept for each pattern that matches. In the order of the tree, which is that of nothing else.
    pub(super) fn visit<'a>(&'a self, subject: Subject<'_>, visit: &mut impl FnMut(&'a T)) {
        let tokens: Vec<&str> = subject.tokens().collect();
        self.root.visit(&tokens, visit);
    }

    #[cfg(test)]
    fn is_empty(&self) -> bool {
        self.root.is_empty()
    }
}

/// Whether something is still kept for a pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keep {
    Yes,
    No,
}

impl<T> Node<T> {
    fn is_empty(&self) -> bool {
        self.here.is_none() && self.rest.is_none() && self.any.is_none() && self.tokens.is_empty()
    }

    fn change(&mut self, tokens: &[&str], change: impl FnOnce(&mut T) -> Keep) {
        let Some((first, further)) = tokens.split_first() else {
            return drop_unless_kept(&mut self.here, change);
        };
        match Wanted::from(*first) {
            Wanted::Rest => drop_unless_kept(&mut self.rest, change),
            Wanted::Any => {
                if let Some(node) = &mut self.any {
                    node.change(further, change);
                    if node.is_empty() {
                        self.any = None;
                    }
                }
            }
            Wanted::Token(token) => {
                if let Some(node) = self.tokens.get_mut(token) {
                    node.change(further, change);
                    if node.is_empty() {
                        self.tokens.remove(token);
                    }
                }
            }
        }
    }

    fn visit<'a>(&'a self, tokens: &[&str], visit: &mut impl FnMut(&'a T)) {
        let Some((first, further)) = tokens.split_first() else {
            self.here.iter().for_each(visit);
            return;
        };
        self.rest.iter().for_each(&mut *visit);
        if let Some(node) = &self.any {
            node.visit(further, visit);
        }
        if let Some(node) = self.tokens.get(*first) {
            node.visit(further, visit);
        }
    }
}

fn drop_unless_kept<T>(slot: &mut Option<T>, change: impl FnOnce(&mut T) -> Keep) {
    if slot.as_mut().is_some_and(|kept| change(kept) == Keep::No) {
        *slot = None;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::subject::tests;

    proptest! {
        #[test]
        fn it_finds_what_matches_and_forgets_what_was_removed(
            patterns in prop::collection::vec((tests::pattern(), any::<bool>()), 1..20),
            subjects in prop::collection::vec(tests::subject(), 1..10),
        ) {
            let mut index = Index::<Vec<usize>>::default();
            let parsed: Vec<(Pattern, bool)> =
                patterns.iter().map(|(p, stays)| (Pattern::parse(p).unwrap(), *stays)).collect();
            for (number, (pattern, _)) in parsed.iter().enumerate() {
                index.entry(pattern).push(number);
            }
            let mut remove = |removed: bool| {
                for (number, (pattern, stays)) in parsed.iter().enumerate() {
                    if *stays != removed {
                        index.change(pattern, |kept| {
                            kept.retain(|n| *n != number);
                            if kept.is_empty() { Keep::No } else { Keep::Yes }
                        });
                    }
                }
                for text in &subjects {
                    let subject = Subject::parse(text).unwrap();
                    let mut found = Vec::new();
                    index.visit(subject, &mut |kept| found.extend_from_slice(kept));
                    found.sort_unstable();
                    let expected: Vec<usize> = (0..parsed.len())
                        .filter(|n| parsed[*n].1 == removed && parsed[*n].0.matches(subject))
                        .collect();
                    assert_eq!(found, if removed { expected } else { Vec::new() });
                }
            };
            remove(true);
            remove(false);
            prop_assert!(index.is_empty());
        }
    }
}
