//! The files that operators write: YAML or JSON, many resources in one file, each with `kind`, `metadata` and `spec`.
//!
//! [`parse`] checks a file wholly, down to what [`crate::model`] asks, and names every bad document; [`Manifest`] is
//! the way back, for output. The reference of all fields is docs/manifest.md.

mod balancer;
mod decode;
mod deployment;
mod document;
mod firewall;
mod icmp;
mod network;
mod original;
mod status;
mod tree;

use std::{collections::BTreeMap, fmt};

pub use balancer::{algorithm, ports};
pub use document::Manifest;
pub use firewall::{action_text, direction, mode, protocol_name as protocol, side_of, traffic};
pub use icmp::types as icmp_types;
pub use original::Original;
pub use status::{instance_phase, phase, public_key};

use crate::{model::Invalid, pb::resource as pb};
use tree::Node;

/// Longest file. A policy with [`crate::model::RULES_MAX`] rules of ordinary size fits.
pub const FILE_BYTES_MAX: usize = 32 << 20;
/// Errors reported of one file; the rest is counted. More than a person reads at once.
pub const ERRORS_MAX: usize = 20;

/// What a file holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Parsed {
    /// In the order of the file.
    pub resources: Vec<pb::Resource>,
    /// What was read differently from what a reader of the file might expect.
    pub notes: Vec<String>,
}

/// Reads `text`; `file` is for messages and names a policy made of the original's rules where `original` does not.
pub fn parse(file: &str, text: &str, original: &Original) -> Result<Parsed, Errors> {
    let mut errors = Errors::new(file);
    if text.len() > FILE_BYTES_MAX {
        let reason = format!("{} bytes; at most {FILE_BYTES_MAX} are read", text.len());
        errors.push(Place::default(), Problem::new(0, Invalid::new(reason)));
        return Err(errors);
    }
    let mut parsed = Parsed::default();
    let mut first_of = BTreeMap::new();
    let mut documents: usize = 0;
    for root in tree::documents(text) {
        documents += 1;
        let place = Place { document: documents, ..Place::default() };
        match root {
            Err(problem) => errors.push(place, problem),
            Ok(root) if original::is_original(&root, original) => {
                match original::convert(file, &root, original) {
                    Ok((resource, notes)) => {
                        parsed.resources.push(resource);
                        parsed.notes.extend(notes.into_iter().map(|n| format!("{file}: {n}")));
                    }
                    Err(problems) => errors.extend(&place, problems),
                }
            }
            Ok(root) => {
                for (place, node) in items(place, &root) {
                    resource(node, place, &mut parsed, &mut first_of, &mut errors);
                }
            }
        }
    }
    if documents == 0 {
        errors.push(Place::default(), Problem::new(0, Invalid::new("no document in it")));
    }
    if errors.problems.is_empty() { Ok(parsed) } else { Err(errors) }
}

/// A list at the top stands for its elements.
fn items(place: Place, root: &Node) -> Vec<(Place, &Node)> {
    match &root.value {
        tree::Value::List(items) => items
            .iter()
            .enumerate()
            .map(|(n, node)| (Place { item: n + 1, ..place.clone() }, node))
            .collect(),
        _ => vec![(place, root)],
    }
}

fn resource(
    node: &Node,
    mut place: Place,
    parsed: &mut Parsed,
    first_of: &mut BTreeMap<(String, String), String>,
    errors: &mut Errors,
) {
    place.kind = node.text_of(&["kind"]).unwrap_or_default().to_owned();
    place.name = node.text_of(&["metadata", "name"]).unwrap_or_default().to_owned();
    match document::decode(node) {
        Err(problems) => errors.extend(&place, problems),
        Ok(resource) => {
            let key = (place.kind.clone(), place.name.clone());
            if let Some(first) = first_of.get(&key) {
                let invalid = Invalid::new(format!("{first} is called so too")).at("metadata.name");
                errors.push(place, Problem::new(node.line, invalid));
            } else {
                first_of.insert(key, place.position());
                parsed.resources.push(resource);
            }
        }
    }
}

/// All that is wrong with one file, one line each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Errors {
    file: String,
    problems: Vec<(Place, Problem)>,
    left_off: usize,
}

impl Errors {
    fn new(file: &str) -> Self {
        Self { file: file.to_owned(), problems: vec![], left_off: 0 }
    }

    fn push(&mut self, place: Place, problem: Problem) {
        if self.problems.len() < ERRORS_MAX {
            self.problems.push((place, problem));
        } else {
            self.left_off += 1;
        }
    }

    fn extend(&mut self, place: &Place, problems: Vec<Problem>) {
        for problem in problems {
            self.push(place.clone(), problem);
        }
    }

    /// Field and reason of each, in the order of the file.
    pub fn iter(&self) -> impl Iterator<Item = &Invalid> {
        self.problems.iter().map(|(_, problem)| &problem.invalid)
    }
}

impl fmt::Display for Errors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, (place, problem)) in self.problems.iter().enumerate() {
            let newline = if n == 0 { "" } else { "\n" };
            write!(f, "{newline}{}: {place}{}", self.file, problem.invalid)?;
            if problem.line > 0 {
                write!(f, " (line {})", problem.line)?;
            }
        }
        if self.left_off > 0 {
            write!(f, "\n{}: {} more errors", self.file, self.left_off)?;
        }
        Ok(())
    }
}

impl std::error::Error for Errors {}

/// Which document an error is about.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Place {
    /// From 1; 0: the file.
    document: usize,
    /// Element of a list at the top, from 1; 0: the document is not a list.
    item: usize,
    kind: String,
    name: String,
}

impl Place {
    fn position(&self) -> String {
        match self.item {
            0 => format!("document {}", self.document),
            item => format!("document {}, item {item}", self.document),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.document == 0 {
            return Ok(());
        }
        f.write_str(&self.position())?;
        match (self.kind.as_str(), self.name.as_str()) {
            ("", "") => f.write_str(": "),
            ("", name) => write!(f, " ({name}): "),
            (kind, "") => write!(f, " ({kind}): "),
            (kind, name) => write!(f, " ({kind} {name}): "),
        }
    }
}

/// A refused value and its line; 0: unknown.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Problem {
    line: u64,
    invalid: Invalid,
}

impl Problem {
    fn new(line: u64, invalid: Invalid) -> Self {
        Self { line, invalid }
    }
}

#[cfg(test)]
mod tests;
