// SPDX-License-Identifier: GPL-2.0-or-later
//! Tables of device-mapper: what they say, and their form in the kernel's buffers. Pure.

use super::uapi::{Spec, SECTOR, TYPE_LEN};
use std::io;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// In sectors of 512 bytes, as `len`.
    pub start: u64,
    pub len: u64,
    pub kind: String,
    pub params: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table(pub Vec<Target>);

const ALIGNMENT: usize = 8;

impl Table {
    /// All of a device of `size` bytes, one to one.
    pub fn linear(device: u64, size: u64) -> Self {
        Self(vec![Target {
            start: 0,
            len: size / SECTOR,
            kind: "linear".into(),
            params: format!("{} 0", number(device)),
        }])
    }

    /// In bytes.
    pub fn size(&self) -> u64 {
        self.0
            .iter()
            .map(|target| target.start + target.len)
            .max()
            .unwrap_or_default()
            * SECTOR
    }

    /// The first target that keeps a state of its own outside the data (caches, mirrors, thin pools …) or chooses its
    /// way itself (multipath). Two copies of such a target at once, as there are while a table moves from one device to
    /// another, would work against each other.
    pub fn unmovable(&self) -> Option<&str> {
        const MOVABLE: [&str; 8] = [
            "linear",
            "striped",
            "crypt",
            "unstriped",
            "delay",
            "flakey",
            "error",
            "zero",
        ];
        let kinds = self.0.iter().map(|target| target.kind.as_str());
        kinds.into_iter().find(|kind| !MOVABLE.contains(kind))
    }

    /// As `DM_TABLE_LOAD` wants it: each `next` counts from its own target.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for target in &self.0 {
            let room = (size_of::<Spec>() + target.params.len() + 1).next_multiple_of(ALIGNMENT);
            let start = bytes.len();
            bytes.extend(target.start.to_ne_bytes());
            bytes.extend(target.len.to_ne_bytes());
            bytes.extend(0_i32.to_ne_bytes());
            bytes.extend((room as u32).to_ne_bytes());
            let mut kind = [0_u8; TYPE_LEN];
            let len = target.kind.len().min(TYPE_LEN - 1);
            kind[..len].copy_from_slice(&target.kind.as_bytes()[..len]);
            bytes.extend(kind);
            bytes.extend(target.params.as_bytes());
            bytes.resize(start + room, 0);
        }
        bytes
    }

    /// As `DM_TABLE_STATUS` gives it: each `next` counts from the first target. Raised (InvalidData) when it is cut off.
    pub(super) fn decode(bytes: &[u8], count: usize) -> io::Result<Self> {
        let cut = || io::Error::new(io::ErrorKind::InvalidData, "a table that makes no sense");
        let mut place = 0;
        let mut targets = Vec::new();
        for _ in 0..count {
            let spec = bytes.get(place..place + size_of::<Spec>()).ok_or_else(cut)?;
            let long = |at: usize| u64::from_ne_bytes(spec[at..at + 8].try_into().expect("eight bytes"));
            let next = u32::from_ne_bytes(spec[20..24].try_into().expect("four bytes"));
            targets.push(Target {
                start: long(0),
                len: long(8),
                kind: text(&spec[24..]).ok_or_else(cut)?,
                params: text(&bytes[place + size_of::<Spec>()..]).ok_or_else(cut)?,
            });
            place = next as usize;
        }
        Ok(Self(targets))
    }
}

/// A device number as the kernel writes it in tables: "major:minor".
pub fn number(device: u64) -> String {
    format!("{}:{}", libc::major(device), libc::minor(device))
}

/// A C string.
pub(super) fn text(bytes: &[u8]) -> Option<String> {
    let end = bytes.iter().position(|byte| *byte == 0)?;
    String::from_utf8(bytes[..end].to_vec()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two() -> Table {
        Table(vec![
            Target {
                start: 0,
                len: 8192,
                kind: "linear".into(),
                params: "254:16 2048".into(),
            },
            Target {
                start: 8192,
                len: 2048,
                kind: "striped".into(),
                params: "2 128 254:16 10240 254:32 0".into(),
            },
        ])
    }

    #[test]
    fn a_table_is_encoded_as_the_kernel_reads_it() {
        let bytes = two().encode();
        // 40 bytes of head, 11 of parameters, a zero, up to the next eight.
        assert_eq!(bytes.len(), 56 + 72);
        assert_eq!(bytes[20..24], 56_u32.to_ne_bytes());
        assert_eq!(&bytes[24..31], b"linear\0");
        assert_eq!(&bytes[40..52], b"254:16 2048\0");
        assert_eq!(bytes[56 + 20..56 + 24], 72_u32.to_ne_bytes());
    }

    #[test]
    fn a_table_of_the_kernel_is_read_with_its_own_way_of_counting() {
        let mut bytes = two().encode();
        bytes[56 + 20..56 + 24].copy_from_slice(&128_u32.to_ne_bytes());
        assert_eq!(Table::decode(&bytes, 2).expect("whole"), two());
        assert_eq!(two().size(), 10240 * 512);
        assert!(Table::decode(&bytes[..100], 2).is_err());
        assert!(Table::decode(&bytes, 3).is_err());
    }

    #[test]
    fn only_targets_without_a_state_of_their_own_are_moved() {
        let mut table = two();
        assert_eq!(table.unmovable(), None);
        table.0[1].kind = "multipath".into();
        assert_eq!(table.unmovable(), Some("multipath"));
    }
}
