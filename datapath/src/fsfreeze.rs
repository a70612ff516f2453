// SPDX-License-Identifier: GPL-2.0-or-later
//! What a process needs that stops file systems, its own among them: the calls, and to need none of those itself.
//! No policy (`control::freeze`).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Once;

// linux/fs.h: _IOWR('X', 119, int), _IOWR('X', 120, int).
const FIFREEZE: libc::Ioctl = 0xc004_5877_u32 as libc::Ioctl;
const FITHAW: libc::Ioctl = 0xc004_5878_u32 as libc::Ioctl;
const PR_SET_IO_FLUSHER: libc::c_int = 57;
const PR_GET_IO_FLUSHER: libc::c_int = 58;

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Freezes the file system that `fd` is on. Raised EBUSY when it is frozen already, EOPNOTSUPP when it cannot be.
pub fn freeze(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the argument is not used by the kernel.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), FIFREEZE, 0) })
}

/// Raised EINVAL when it is not frozen.
pub fn thaw(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the argument is not used by the kernel.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), FITHAW, 0) })
}

/// Writes out the file system that `fd` is on.
pub fn sync(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: plain system call.
    check(unsafe { libc::syncfs(fd.as_raw_fd()) })
}

/// The id of the btrfs that `fd` is on, as its directory in /sys/fs/btrfs is called; None: it is on none.
pub fn btrfs_id(fd: BorrowedFd<'_>) -> Option<String> {
    // linux/btrfs.h: BTRFS_IOC_FS_INFO, _IOR(0x94, 31, 1024 bytes); the id is 16 bytes from the 16th on.
    const FS_INFO: libc::Ioctl = 0x8400_941f_u32 as libc::Ioctl;
    let mut info = [0_u64; 128];
    // SAFETY: the kernel fills at most the 1024 bytes that the number names.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), FS_INFO, info.as_mut_ptr()) }).ok()?;
    let id: Vec<u8> = info[2..4].iter().flat_map(|word| word.to_ne_bytes()).collect();
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let parts = [&id[..4], &id[4..6], &id[6..8], &id[8..10], &id[10..]];
    Some(parts.map(hex).join("-"))
}

/// Closes all descriptors but the standard ones and `kept`, which comes back under another number.
pub fn close_others<T: From<OwnedFd> + Into<OwnedFd>>(kept: T) -> io::Result<T> {
    let kept: OwnedFd = kept.into();
    // SAFETY: the first free number from 3 on becomes `kept`'s; all above it are closed, whose owners this process, at its
    // beginning, does not have.
    unsafe {
        check(libc::dup2(kept.as_raw_fd(), libc::STDIN_FILENO))?;
        drop(kept);
        check(libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) as libc::c_int)?;
        let copy = libc::fcntl(libc::STDIN_FILENO, libc::F_DUPFD_CLOEXEC, 3);
        check(copy)?;
        Ok(T::from(OwnedFd::from_raw_fd(copy)))
    }
}

/// Keeps the program and its libraries in memory, once for all: who has stopped the device they lie on must be able to
/// run the code that lets it go on. Best effort: what cannot be locked is at least read.
pub fn keep_code() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for (start, len) in mapped_files(&std::fs::read_to_string("/proc/self/maps").unwrap_or_default()) {
            // SAFETY: locks pages, changes none; a mapping that is gone is an error and nothing else.
            unsafe { libc::mlock(start as *const libc::c_void, len) };
        }
    });
}

/// Start and length of the readable mappings of files, from /proc/PID/maps.
fn mapped_files(maps: &str) -> Vec<(usize, usize)> {
    let file = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let (start, end) = (
            usize::from_str_radix(start, 16).ok()?,
            usize::from_str_radix(end, 16).ok()?,
        );
        let readable = words.next()?.starts_with('r');
        // Offset, device, inode, path.
        let path = words.nth(3)?;
        (readable && path.starts_with('/') && !path.starts_with("/memfd:")).then_some((start, end - start))
    };
    maps.lines().filter_map(file).collect()
}

/// While it lives, memory for this thread is found without waiting for a disk (`PR_SET_IO_FLUSHER`).
#[derive(Debug)]
pub struct NoReclaimIo {
    /// The thread was so before.
    before: bool,
    /// It is a matter of one thread.
    _here: std::marker::PhantomData<*const ()>,
}

impl NoReclaimIo {
    pub fn begin() -> Self {
        // SAFETY: plain system calls with integer arguments. Without CAP_SYS_RESOURCE nothing changes.
        let before = unsafe {
            let before = libc::prctl(PR_GET_IO_FLUSHER, 0, 0, 0, 0) == 1;
            libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
            before
        };
        Self {
            before,
            _here: std::marker::PhantomData,
        }
    }
}

impl Drop for NoReclaimIo {
    fn drop(&mut self) {
        if !self.before {
            // SAFETY: as above.
            unsafe { libc::prctl(PR_SET_IO_FLUSHER, 0, 0, 0, 0) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_are_kept_and_no_shared_memory() {
        let maps = "\
55d0c0000000-55d0c0004000 r--p 00000000 fe:01 1234                       /usr/bin/cat
55d0c0004000-55d0c0009000 r-xp 00004000 fe:01 1234                       /usr/bin/cat
55d0c1000000-55d0c1021000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000001000 ---p 00000000 fe:01 99                         /usr/lib/x.so
7f0000002000-7f0000003000 rw-s 00000000 00:01 7                          /memfd:blksnap-map (deleted)
7f0000004000-7f0000005000 rw-p 00000000 00:00 0
";
        assert_eq!(
            mapped_files(maps),
            [(0x55d0_c000_0000, 0x4000), (0x55d0_c000_4000, 0x5000)]
        );
    }

    #[test]
    fn freezing_needs_a_file_system_that_can_be_frozen() {
        use std::os::fd::AsFd;
        let proc = std::fs::File::open("/proc/self").expect("proc");
        let error = freeze(proc.as_fd()).expect_err("proc cannot be frozen");
        assert!(matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EPERM)));
    }
}
