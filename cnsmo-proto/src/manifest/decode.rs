//! Reads typed values out of a tree, remembers where it is and collects every problem instead of stopping at the first.

use std::{collections::BTreeMap, fmt, ops::RangeInclusive, time::Duration};

use super::{
    Problem,
    tree::{Node, Value},
};
use crate::model::Invalid;

#[derive(Default)]
pub(super) struct Decoder {
    path: Vec<Step>,
    problems: Vec<Problem>,
}

enum Step {
    Field(String),
    Index(usize),
}

/// The fields of a mapping, each once and each known.
pub(super) struct Fields<'a>(BTreeMap<&'a str, &'a Node>);

impl<'a> Fields<'a> {
    pub(super) fn get(&self, key: &str) -> Option<&'a Node> {
        self.0.get(key).copied()
    }
}

impl Decoder {
    /// What was read, or all that is wrong.
    pub(super) fn finish<T>(self, value: Option<T>) -> Result<T, Vec<Problem>> {
        match value {
            Some(value) if self.problems.is_empty() => Ok(value),
            _ => Err(self.problems),
        }
    }

    /// Problems so far: tells whether a part was read well.
    pub(super) fn problems(&self) -> usize {
        self.problems.len()
    }

    /// Notes that the value at hand is refused.
    pub(super) fn refuse(&mut self, node: &Node, reason: impl Into<String>) {
        self.refuse_invalid(node, Invalid::new(reason));
    }

    /// As [`Self::refuse`], of a field inside the value at hand.
    pub(super) fn refuse_invalid(&mut self, node: &Node, invalid: Invalid) {
        let line = node.line_at(invalid.field());
        let invalid = self.path.iter().rev().fold(invalid, |invalid, step| match step {
            Step::Field(name) => invalid.at(name),
            Step::Index(n) => invalid.at_index(*n),
        });
        self.problems.push(Problem::new(line, invalid));
    }

    /// Refuses a value of another type.
    pub(super) fn mistyped(&mut self, node: &Node, expected: impl fmt::Display) {
        let reason = match node.value {
            Value::Null => format!("has no value: give {expected}, or leave the field out"),
            _ => format!("expected {expected}, found {}", node.describe()),
        };
        self.refuse(node, reason);
    }

    /// A mapping with no fields but `known` ones. `None` after a wrong type; bad fields are refused and left out.
    pub(super) fn fields<'a>(&mut self, node: &'a Node, known: &[&str]) -> Option<Fields<'a>> {
        let Value::Map(entries) = &node.value else {
            self.mistyped(node, "a mapping");
            return None;
        };
        let mut fields = BTreeMap::new();
        for (key, value) in entries {
            if !known.contains(&key.as_str()) {
                let reason = format!("unknown field; there are: {}", known.join(", "));
                self.field(key, |d| d.refuse(value, reason));
            } else if fields.insert(key.as_str(), value).is_some() {
                self.field(key, |d| d.refuse(value, "this field is there twice"));
            }
        }
        Some(Fields(fields))
    }

    /// Reads a field if it is there.
    pub(super) fn optional<T>(
        &mut self,
        fields: &Fields<'_>,
        key: &str,
        read: impl FnOnce(&mut Self, &Node) -> Option<T>,
    ) -> Option<T> {
        let node = fields.get(key)?;
        self.field(key, |d| read(d, node))
    }

    /// Reads a field of `node` that must be there.
    pub(super) fn required<T>(
        &mut self,
        node: &Node,
        fields: &Fields<'_>,
        key: &str,
        read: impl FnOnce(&mut Self, &Node) -> Option<T>,
    ) -> Option<T> {
        if fields.get(key).is_none() {
            self.field(key, |d| d.refuse(node, "missing"));
        }
        self.optional(fields, key, read)
    }

    /// Runs `read` one level deeper.
    pub(super) fn field<T>(&mut self, key: &str, read: impl FnOnce(&mut Self) -> T) -> T {
        self.path.push(Step::Field(key.to_owned()));
        let value = read(self);
        self.path.pop();
        value
    }

    /// The elements of a list that could be read.
    pub(super) fn list<T>(
        &mut self,
        node: &Node,
        expected: &str,
        mut read: impl FnMut(&mut Self, &Node) -> Option<T>,
    ) -> Option<Vec<T>> {
        let Value::List(items) = &node.value else {
            self.mistyped(node, expected);
            return None;
        };
        let mut values = Vec::with_capacity(items.len());
        for (n, item) in items.iter().enumerate() {
            self.path.push(Step::Index(n));
            values.extend(read(self, item));
            self.path.pop();
        }
        Some(values)
    }

    /// As [`Self::list`], and not empty: an empty field of the API matches everything, an empty list in a file is
    /// more likely a template that found nothing.
    pub(super) fn matches<T>(
        &mut self,
        node: &Node,
        expected: &str,
        read: impl FnMut(&mut Self, &Node) -> Option<T>,
    ) -> Option<Vec<T>> {
        if node.value == Value::List(vec![]) {
            self.refuse(node, "the list is empty: leave the field out to match everything");
            return None;
        }
        self.list(node, expected, read)
    }

    pub(super) fn text(&mut self, node: &Node) -> Option<String> {
        match &node.value {
            Value::Text(text) => Some(text.clone()),
            Value::Bool(_) | Value::Integer(_) | Value::Float(_) => {
                self.refuse(node, format!("expected a text, found {}: quote it", node.describe()));
                None
            }
            Value::Null | Value::List(_) | Value::Map(_) => {
                self.mistyped(node, "a text");
                None
            }
        }
    }

    /// A text that is not empty: the API takes an empty one for none.
    pub(super) fn filled(&mut self, node: &Node) -> Option<String> {
        let text = self.text(node)?;
        if text.is_empty() {
            self.refuse(node, "is empty: leave the field out");
            return None;
        }
        Some(text)
    }

    pub(super) fn boolean(&mut self, node: &Node) -> Option<bool> {
        if let Value::Bool(value) = node.value {
            return Some(value);
        }
        self.mistyped(node, "true or false");
        None
    }

    pub(super) fn number(&mut self, node: &Node, range: RangeInclusive<u32>) -> Option<u32> {
        let number = match node.value {
            Value::Integer(n) => u32::try_from(n).ok().filter(|n| range.contains(n)),
            _ => None,
        };
        if number.is_none() {
            self.mistyped(node, format!("a number from {} to {}", range.start(), range.end()));
        }
        number
    }

    /// One of a set of words.
    pub(super) fn word<T: Copy>(&mut self, node: &Node, words: &[(&str, T)]) -> Option<T> {
        if let Value::Text(text) = &node.value
            && let Some((_, value)) = words.iter().find(|(word, _)| word == text)
        {
            return Some(*value);
        }
        let words: Vec<_> = words.iter().map(|(word, _)| *word).collect();
        self.mistyped(node, words.join(" or "));
        None
    }

    /// A mapping of texts.
    pub(super) fn texts(&mut self, node: &Node) -> Option<BTreeMap<String, String>> {
        self.entries(node, "a mapping of texts", Self::text)
    }

    /// A mapping with keys of the operator's choice; the values that could be read.
    pub(super) fn entries<T>(
        &mut self,
        node: &Node,
        expected: &str,
        mut read: impl FnMut(&mut Self, &Node) -> Option<T>,
    ) -> Option<BTreeMap<String, T>> {
        let Value::Map(entries) = &node.value else {
            self.mistyped(node, expected);
            return None;
        };
        let mut values = BTreeMap::new();
        for (key, node) in entries {
            self.field(key, |d| {
                if let Some(value) = read(d, node)
                    && values.insert(key.clone(), value).is_some()
                {
                    d.refuse(node, "this key is there twice");
                }
            });
        }
        Some(values)
    }
}

/// The word for a value.
pub(super) fn word<T: Copy + PartialEq>(
    words: &[(&'static str, T)],
    value: T,
) -> Option<&'static str> {
    words.iter().find(|(_, v)| *v == value).map(|(word, _)| *word)
}

/// A decimal number without sign, which `parse` alone would accept.
pub(super) fn digits(text: &str) -> Option<u32> {
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

/// A number and its unit.
pub(super) fn time(d: &mut Decoder, node: &Node) -> Option<prost_types::Duration> {
    let read = match &node.value {
        Value::Text(text) => read_time(text),
        _ => None,
    };
    if read.is_none() {
        d.mistyped(node, "a time, such as 500ms, 2s, 5m or 1h");
    }
    read.and_then(|time| prost_types::Duration::try_from(time).ok())
}

fn read_time(text: &str) -> Option<Duration> {
    let number = |unit: &str| digits(text.strip_suffix(unit)?).map(u64::from);
    if let Some(ms) = number("ms") {
        return Some(Duration::from_millis(ms));
    }
    let units = [("s", 1), ("m", 60), ("h", 3_600)];
    units.into_iter().find_map(|(unit, seconds)| Some(Duration::from_secs(number(unit)? * seconds)))
}

/// The reverse of [`time`].
pub(super) fn time_text(time: prost_types::Duration) -> Option<String> {
    let time = Duration::try_from(time).ok()?;
    Some(match time.subsec_millis() {
        0 => format!("{}s", time.as_secs()),
        _ => format!("{}ms", time.as_millis()),
    })
}
