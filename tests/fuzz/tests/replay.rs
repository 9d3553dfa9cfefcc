//! Each target on its stored inputs, and on ones made from them: always the same.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::{fs, path::Path};

use cnsmo_fuzz::mutate::mutated;
use cnsmo_tests::frame::Random;

/// Made-up inputs of each target: some seconds in an unoptimised build.
const MADE: usize = 1_500;

/// The files of the target's folder, by name.
fn inputs(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    let mut files: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

fn replay(target: &str, run: fn(&[u8])) {
    let inputs = inputs(target);
    assert!(!inputs.is_empty());
    inputs.iter().for_each(|input| run(input));
    let mut random = Random::new(0x5eed);
    for _ in 0..MADE {
        run(&mutated(&mut random, &inputs));
    }
}

#[test]
fn compiler() {
    replay("compiler", cnsmo_fuzz::compiler::run);
}

#[test]
fn pipeline() {
    replay("pipeline", cnsmo_fuzz::pipeline::run);
}

#[test]
fn policy() {
    replay("policy", cnsmo_fuzz::policy::run);
}
