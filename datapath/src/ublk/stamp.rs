// SPDX-License-Identifier: GPL-2.0-or-later
//! What says of a ublk device whose it is, from its first moment on: a word that the driver keeps with it
//! (`ublksrv_flags`, "for the server"). A device that nobody remembers is known by it, and one of others is never touched.
//!
//! ```text
//!  63     52 51  50         32 31       0
//!  [ magic ] [k] [ directory ] [ origin ]     k: 1 for an image
//! ```

use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::OnceLock;

const MAGIC: u64 = 0xb1c;
const IMAGE: u64 = 1 << 51;
const DIRECTORY_BITS: u32 = 19;

/// Of the runtime directory of this process: each has a data path of its own.
static DIRECTORY: OnceLock<u64> = OnceLock::new();

/// Stamps from now on are of this directory. Before it, or without one, no device is anybody's.
pub fn begin(runtime_directory: &Path) {
    let path = std::fs::canonicalize(runtime_directory).unwrap_or_else(|_| runtime_directory.to_owned());
    let _ = DIRECTORY.set(digest(path.as_os_str().as_bytes()));
}

/// FNV-1a, folded: it has to be the same in every version of this program.
fn digest(bytes: &[u8]) -> u64 {
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    (hash ^ hash >> DIRECTORY_BITS ^ hash >> 38) & ((1 << DIRECTORY_BITS) - 1)
}

fn word(directory: u64, origin: u64, image: bool) -> u64 {
    // As the kernel packs numbers for 32 bits: 12 bits of major, 20 of minor.
    let number = u64::from(libc::major(origin)) << 20 | u64::from(libc::minor(origin));
    MAGIC << 52 | if image { IMAGE } else { 0 } | directory << 32 | number & u64::from(u32::MAX)
}

/// Of the device that shows `origin` (its device number), or an `image` of it.
pub fn stamp(origin: u64, image: bool) -> u64 {
    DIRECTORY.get().map_or(0, |directory| word(*directory, origin, image))
}

/// Whether a device with this stamp is of this runtime directory.
pub fn is_ours(stamp: u64) -> bool {
    let known = |directory: &u64| stamp >> 52 == MAGIC && stamp >> 32 & ((1 << DIRECTORY_BITS) - 1) == *directory;
    DIRECTORY.get().is_some_and(known)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_tells_directory_origin_and_kind() {
        let one = digest(b"/run/blksnap");
        assert_ne!(one, digest(b"/run/blksnap2"));
        let origin = libc::makedev(259, 70_000);
        let words = [
            word(one, origin, false),
            word(one, origin, true),
            word(one, origin + 1, false),
            word(digest(b"/tmp/a"), origin, false),
            0,
            0x1f,
        ];
        for (place, left) in words.iter().enumerate() {
            assert!(words[place + 1..].iter().all(|right| left != right));
        }
    }

    #[test]
    fn only_what_was_stamped_here_is_ours() {
        begin(Path::new("/nonexistent/run"));
        assert!(is_ours(stamp(libc::makedev(1, 0), false)));
        assert!(is_ours(stamp(libc::makedev(8, 17), true)));
        let other = word(DIRECTORY.get().expect("set") ^ 1, libc::makedev(1, 0), false);
        for strange in [0, 1, u64::MAX, other, MAGIC << 52 >> 1] {
            assert!(!is_ours(strange), "{strange:x}");
        }
    }
}
