//! Inputs made from others, the same for the same seed.

use cnsmo_tests::frame::Random;

/// Changes of one input.
const CHANGES_MAX: usize = 6;
/// Longest input: longer ones take time and reach nothing new.
const BYTES_MAX: usize = 4_096;
/// Values on which bounds turn.
const EDGES: [u8; 8] = [0, 1, 4, 6, 0x7f, 0x80, 0xfe, 0xff];

/// One of `inputs`, changed; now and then with a part of another.
pub fn mutated(random: &mut Random, inputs: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = inputs.get(random.below(inputs.len().max(1))).cloned().unwrap_or_default();
    for _ in 0..=random.below(CHANGES_MAX) {
        let at = random.below(bytes.len() + 1);
        match random.below(7) {
            0 => bytes.truncate(at),
            1 => bytes.insert(at, random.next_u64() as u8),
            2 => {
                let other = &inputs[random.below(inputs.len())];
                let from = random.below(other.len() + 1);
                bytes.splice(at.., other[from..].iter().copied());
            }
            3 if at < bytes.len() => drop(bytes.remove(at)),
            4 if at < bytes.len() => bytes[at] = random.pick(&EDGES),
            5 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            _ if at < bytes.len() => bytes[at] = random.next_u64() as u8,
            _ => bytes.push(random.next_u64() as u8),
        }
    }
    bytes.truncate(BYTES_MAX);
    bytes
}
