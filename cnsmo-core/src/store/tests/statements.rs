//! Every statement in the sources of the store, as each engine understands it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::Place;
use crate::store::engine::{ROWS_MAX, Repeated, Sql, Value};

pub(super) async fn every_statement_is_understood(place: &Place) {
    // It makes the tables.
    place.open().await.close().await;
    let mut connection = place.config.open().writer().await.unwrap();
    let mut count = 0;
    for (name, text) in sources() {
        for statement in statements(&text) {
            let explain = Sql::Made(format!("EXPLAIN {statement}").into());
            let nulls = vec![Value::Null; parameters(&statement)];
            let explained = connection.fetch(&explain, nulls, usize::MAX).await;
            let plan =
                explained.unwrap_or_else(|e| panic!("{}: {statement}: {e:?}", name.display()));
            assert!(!plan.rows.is_empty());
            count += 1;
        }
    }
    assert!(count > 100, "only {count} statements were found");
    connection.close().await.unwrap();
}

/// Of the store, without its tests.
fn sources() -> Vec<(PathBuf, String)> {
    let store = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/store");
    let files = [store.clone(), store.join("message")].into_iter().flat_map(|folder| {
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>()
    });
    let code = files.filter(|path| path.extension().is_some_and(|e| e == "rs"));
    let code = code.filter(|path| !path.ends_with("tests.rs") && !path.ends_with("engine.rs"));
    code.map(|path| {
        let text = fs::read_to_string(&path).unwrap();
        let end = text.find("#[cfg(test)]").unwrap_or(text.len());
        (path, text[..end].to_owned())
    })
    .collect()
}

/// Those that are fixed, and those of rows in the smallest sizes and the largest.
fn statements(code: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (at, call) in code.match_indices("Sql::Fixed(") {
        let (text, _) = literal(&code[at + call.len()..]);
        found.push(text);
    }
    for (at, call) in code.match_indices("Repeated::new(") {
        let (head, rest) = literal(&code[at + call.len()..]);
        let (columns, rest) = number(rest);
        let (head, tail) = (head.leak(), literal(rest).0.leak());
        found.extend(sizes(&Repeated::new(head, columns, tail)));
    }
    for (at, call) in code.match_indices("Repeated::within(") {
        let (fixed, rest) = number(&code[at + call.len()..]);
        let (head, rest) = literal(rest);
        let (head, tail) = (head.leak(), literal(rest).0.leak());
        found.extend(sizes(&Repeated::within(fixed, head, tail)));
    }
    found
}

fn sizes(statement: &Repeated) -> [String; 3] {
    [1, 2, ROWS_MAX].map(|rows| statement.upto(rows).0.as_str().to_owned())
}

/// The string literal that comes next, and what is behind it.
fn literal(code: &str) -> (String, &str) {
    let start = code.trim_start_matches([',', ' ', '\n']).strip_prefix('"');
    let mut rest = start.expect("a statement is a string literal").chars();
    let mut text = String::new();
    loop {
        match rest.next().unwrap() {
            '"' => return (text, rest.as_str()),
            '\\' => match rest.next().unwrap() {
                '\n' => rest = rest.as_str().trim_start().chars(),
                escaped @ ('"' | '\\') => text.push(escaped),
                other => panic!("an escape that is not expected here: {other}"),
            },
            plain => text.push(plain),
        }
    }
}

fn number(code: &str) -> (usize, &str) {
    let code = code.trim_start_matches([',', ' ', '\n']);
    let end = code.find(|c: char| !c.is_ascii_digit()).unwrap();
    (code[..end].parse().expect("a number of columns"), &code[end..])
}

/// The highest one: they are numbered without gaps.
fn parameters(statement: &str) -> usize {
    let number = |text: &str| {
        let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        text[..end].parse().unwrap_or(0)
    };
    statement.split('$').skip(1).map(number).max().unwrap_or(0)
}
