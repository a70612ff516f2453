// SPDX-License-Identifier: GPL-2.0-or-later
//! Pages of words in shared memory that a process which dies leaves to the next: what cannot be told from maps and chunk
//! tables. Written by one process at a time, at control time; each change is whole or did not happen.

pub mod snapshot;
pub mod state;

/// A uuid as two words; what is none is 0.
fn uuid_words(text: &str) -> (u64, u64) {
    let mut value = 0_u128;
    for digit in text.chars().filter_map(|letter| letter.to_digit(16)) {
        value = value << 4 | u128::from(digit);
    }
    ((value >> 64) as u64, value as u64)
}

fn uuid_text(high: u64, low: u64) -> String {
    let (a, b, c) = (high >> 32, high >> 16 & 0xffff, high & 0xffff);
    format!(
        "{a:08x}-{b:04x}-{c:04x}-{:04x}-{:012x}",
        low >> 48,
        low & 0xffff_ffff_ffff
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_survive_their_words() {
        for text in [
            "0b1f5c3e-9a0d-4c52-8f4e-8d8d2a6c1e55",
            "00000000-0000-0000-0000-000000000001",
        ] {
            let (high, low) = uuid_words(text);
            assert_eq!(uuid_text(high, low), text);
        }
    }
}
