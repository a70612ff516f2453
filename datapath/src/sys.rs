// SPDX-License-Identifier: GPL-2.0-or-later
//! System calls that the standard library lacks, one thin function each. No policy.

pub mod process;

use crate::mem::Span;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::PathBuf;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

fn count(result: isize) -> Result<usize, i32> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO))
}

/// pread that fails with EAGAIN rather than wait for a disk (`RWF_NOWAIT`), or waits when `wait`. Errors are errno.
pub fn read_at(fd: RawFd, into: Span, offset: u64, wait: bool) -> Result<usize, i32> {
    let vector = libc::iovec {
        iov_base: into.as_ptr().cast(),
        iov_len: into.len(),
    };
    let flags = if wait { 0 } else { libc::RWF_NOWAIT };
    // SAFETY: the vector describes a live span.
    count(unsafe { libc::preadv2(fd, &raw const vector, 1, offset as i64, flags) })
}

/// pwrite. Errors are errno.
pub fn write_at(fd: RawFd, from: Span, offset: u64) -> Result<usize, i32> {
    // SAFETY: the span is live and readable.
    count(unsafe { libc::pwrite(fd, from.as_ptr().cast(), from.len(), offset as i64) })
}

/// The next data (`SEEK_DATA`) or hole (`SEEK_HOLE`) from `offset`. Errors are errno; ENXIO: nothing behind `offset`.
pub fn seek(fd: RawFd, offset: u64, whence: libc::c_int) -> Result<u64, i32> {
    // SAFETY: plain system call. The file position it moves is used by nobody (all I/O is positional).
    count(unsafe { libc::lseek(fd, offset as i64, whence) } as isize).map(|place| place as u64)
}

/// The size of a regular file; cheap enough to be asked before every write.
pub fn size(fd: RawFd) -> Option<u64> {
    let mut stat = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: the buffer is written by the call, and read only when that succeeded.
    unsafe { (libc::fstat(fd, stat.as_mut_ptr()) == 0).then(|| stat.assume_init().st_size as u64) }
}

pub fn shut_down(socket: RawFd) {
    // SAFETY: plain system call; a socket that is already gone is no error here.
    unsafe { libc::shutdown(socket, libc::SHUT_RDWR) };
}

/// Room for `bytes` in the socket's send queue (the kernel may cap it).
pub fn send_buffer(socket: RawFd, bytes: libc::c_int) {
    let size = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the option's value is a live int. A refusal leaves the default, which only costs speed.
    unsafe {
        libc::setsockopt(
            socket,
            libc::SOL_SOCKET,
            libc::SO_SNDBUF,
            (&raw const bytes).cast(),
            size,
        )
    };
}

/// Owns a descriptor that the kernel just returned.
pub fn own(fd: RawFd) -> OwnedFd {
    assert!(fd >= 0);
    // SAFETY: the caller got the number from a completion (accept) and nobody else has it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

pub fn event_fd() -> io::Result<OwnedFd> {
    // SAFETY: plain system call.
    check(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) }).map(own)
}

/// Adds one to an eventfd. Cannot block short of 2^64 - 2 rings unheard.
pub fn ring_bell(fd: RawFd) {
    let one = 1_u64;
    // SAFETY: eight bytes of a live u64.
    unsafe { libc::write(fd, (&raw const one).cast(), 8) };
}

/// Waits for an eventfd and clears it.
pub fn hear_bell(fd: RawFd) {
    let mut rings = 0_u64;
    // SAFETY: eight bytes of a live u64.
    unsafe { libc::read(fd, (&raw mut rings).cast(), 8) };
}

/// Locks the whole file for its open file description, as long as that lives. EAGAIN: another holds a lock.
pub fn lock_file(file: &File) -> io::Result<()> {
    // SAFETY: all-zero is a valid flock (whole file from the start, pid 0 as OFD locks want it).
    let mut lock: libc::flock = unsafe { MaybeUninit::zeroed().assume_init() };
    lock.l_type = libc::F_WRLCK as libc::c_short;
    // SAFETY: the struct is live.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw mut lock) }).map(drop)
}

/// Exclusive flock, failing at once (EWOULDBLOCK) when another process holds it.
pub fn lock_exclusively(file: &File) -> io::Result<()> {
    // SAFETY: plain system call.
    check(unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) }).map(drop)
}

/// Grows a file so that the room for `offset..offset + len` is really there.
pub fn allocate(file: &File, offset: u64, len: u64) -> io::Result<()> {
    // SAFETY: plain system call.
    check(unsafe { libc::fallocate(file.as_raw_fd(), 0, offset as i64, len as i64) }).map(drop)
}

pub fn is_tmpfs(file: &File) -> bool {
    let mut stat = MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: the buffer is written by the call, and read only when that succeeded.
    unsafe { libc::fstatfs(file.as_raw_fd(), stat.as_mut_ptr()) == 0 && stat.assume_init().f_type == libc::TMPFS_MAGIC }
}

/// What an origin or a storage is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    pub block: bool,
    pub size: u64,
    pub logical_block_size: u32,
    /// What makes two descriptors the same thing: (device, inode) of a file, (device number, 0) of a block device.
    pub identity: (u64, u64),
    pub modified_ns: i128,
}

const BLKSSZGET: libc::Ioctl = 0x1268;
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272_u32 as libc::Ioctl;

/// Raised (EINVAL) when it is neither a regular file nor a block device.
pub fn node(file: &File) -> io::Result<Node> {
    let stat = file.metadata()?;
    let modified_ns = i128::from(stat.mtime()) * 1_000_000_000 + i128::from(stat.mtime_nsec());
    if stat.file_type().is_file() {
        return Ok(Node {
            block: false,
            size: stat.len(),
            logical_block_size: 1,
            identity: (stat.dev(), stat.ino()),
            modified_ns,
        });
    }
    if !stat.file_type().is_block_device() {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let (mut size, mut logical_block_size) = (0_u64, 0_i32);
    // SAFETY: each ioctl writes the type its number names (linux/fs.h).
    unsafe {
        check(libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut size))?;
        check(libc::ioctl(file.as_raw_fd(), BLKSSZGET, &raw mut logical_block_size))?;
    }
    Ok(Node {
        block: true,
        size,
        logical_block_size: logical_block_size as u32,
        identity: (stat.rdev(), 0),
        modified_ns: 0,
    })
}

/// The sequence number of the disk and its medium (linux/fs.h, `BLKGETDISKSEQ`; 5.15). Fails for a file.
pub fn diskseq(file: &File) -> io::Result<u64> {
    const BLKGETDISKSEQ: libc::Ioctl = 0x8008_1280_u32 as libc::Ioctl;
    let mut sequence = 0_u64;
    // SAFETY: the ioctl writes a u64.
    check(unsafe { libc::ioctl(file.as_raw_fd(), BLKGETDISKSEQ, &raw mut sequence) })?;
    Ok(sequence)
}

/// Where sysfs has a block device (Documentation/ABI/testing/sysfs-dev).
pub fn sysfs_of(device: u64) -> PathBuf {
    let (major, minor) = (libc::major(device), libc::minor(device));
    PathBuf::from(format!("/sys/dev/block/{major}:{minor}"))
}

/// Whether there is such a name; allocates nothing.
pub fn exists(path: &CStr) -> bool {
    // SAFETY: the path ends with a zero byte.
    unsafe { libc::access(path.as_ptr(), libc::F_OK) == 0 }
}

/// The uid of the process at the other end.
pub fn peer_uid(socket: BorrowedFd<'_>) -> io::Result<u32> {
    let mut credentials = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut size = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: both out-parameters are live and the size is that of the struct.
    check(unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut size,
        )
    })?;
    Ok(credentials.uid)
}

pub fn own_uid() -> u32 {
    // SAFETY: cannot fail.
    unsafe { libc::geteuid() }
}

/// Keeps all memory of the process resident as it is touched, or tells why not (RLIMIT_MEMLOCK without CAP_IPC_LOCK).
pub fn lock_memory() -> io::Result<()> {
    // SAFETY: plain system call.
    check(unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT) })?;
    // Under a limit the lock may succeed now and every later mapping fail (EAGAIN): maps and buffers matter more.
    const PROBE: usize = 256 << 20;
    crate::mem::Mapping::anonymous(PROBE).map(drop).inspect_err(|_| {
        // SAFETY: plain system call.
        unsafe { libc::munlockall() };
    })
}

/// Lets the process open as many files as it may ever (each client and each snapshot takes some).
pub fn raise_file_limit() {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the struct is live. A refusal leaves the limit, which clients then meet as closed connections.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
        }
    }
}

/// Marks this thread (and the workers its ring starts) as serving block I/O, so that reclaim does not wait for it.
/// Needs CAP_SYS_RESOURCE; without it nothing changes (an image file behind NBD is not below anybody's page cache).
pub fn set_io_flusher() {
    const PR_SET_IO_FLUSHER: libc::c_int = 57;
    // SAFETY: plain system call with integer arguments.
    unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) };
}

/// Descriptors that one message may carry (the kernel's SCM_MAX_FD).
pub const MAX_FDS: usize = 253;
const CONTROL_LEN: usize = 2048;

#[repr(C, align(8))]
struct Control([u8; CONTROL_LEN]);

fn message(vector: &mut libc::iovec, control: &mut Control, len: usize) -> libc::msghdr {
    // SAFETY: null pointers and zero lengths are a valid empty message.
    let mut header: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    header.msg_iov = vector;
    header.msg_iovlen = 1;
    if len > 0 {
        header.msg_control = control.0.as_mut_ptr().cast();
        header.msg_controllen = len as _;
    }
    header
}

/// Sends some of `bytes`, with `fds` attached; how many bytes went.
pub fn send_with_fds(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    assert!(fds.len() <= MAX_FDS);
    let mut vector = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    let mut control = Control([0; CONTROL_LEN]);
    let payload = size_of_val(fds) as u32;
    // SAFETY: pure arithmetic.
    let space = unsafe { libc::CMSG_SPACE(payload) } as usize;
    let header = message(&mut vector, &mut control, if fds.is_empty() { 0 } else { space });
    if !fds.is_empty() {
        // SAFETY: the control buffer has room for one header with `payload` bytes (MAX_FDS * 4 + 16 < CONTROL_LEN);
        // BorrowedFd is a plain int.
        unsafe {
            let part = libc::CMSG_FIRSTHDR(&raw const header);
            (*part).cmsg_level = libc::SOL_SOCKET;
            (*part).cmsg_type = libc::SCM_RIGHTS;
            (*part).cmsg_len = libc::CMSG_LEN(payload) as _;
            std::ptr::copy_nonoverlapping(fds.as_ptr().cast::<u8>(), libc::CMSG_DATA(part), payload as usize);
        }
    }
    // SAFETY: header, vector and control buffer are live.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const header, libc::MSG_NOSIGNAL) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Receives into `bytes`; descriptors that came along are appended to `fds`. 0: the peer is gone.
pub fn receive_with_fds(socket: BorrowedFd<'_>, bytes: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut vector = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    let mut control = Control([0; CONTROL_LEN]);
    let mut header = message(&mut vector, &mut control, CONTROL_LEN);
    // SAFETY: header, vector and control buffer are live.
    let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_CMSG_CLOEXEC) };
    let received = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: the kernel filled the control buffer; the macros walk it within msg_controllen. Each descriptor in it is
    // new in this process and gets one owner here.
    unsafe {
        let mut part = libc::CMSG_FIRSTHDR(&raw const header);
        while !part.is_null() {
            if (*part).cmsg_level == libc::SOL_SOCKET && (*part).cmsg_type == libc::SCM_RIGHTS {
                let payload = (*part).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
                for place in 0..payload / size_of::<RawFd>() {
                    let data = libc::CMSG_DATA(part).cast::<RawFd>();
                    fds.push(own(data.add(place).read_unaligned()));
                }
            }
            part = libc::CMSG_NXTHDR(&raw const header, part);
        }
    }
    Ok(received)
}

/// Files this process makes from now on are its owner's alone.
pub fn private_files() {
    // SAFETY: cannot fail.
    unsafe { libc::umask(0o077) };
}

/// A signalfd-free way to end in order: blocks SIGTERM and SIGINT for all threads started later and returns when one came.
pub struct Signals(libc::sigset_t);

impl Signals {
    pub fn block() -> Self {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigemptyset initialises the set; the others work on an initialised set.
        unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            libc::sigaddset(set.as_mut_ptr(), libc::SIGTERM);
            libc::sigaddset(set.as_mut_ptr(), libc::SIGINT);
            libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
            Self(set.assume_init())
        }
    }

    pub fn wait(&self) {
        let mut signal = 0;
        // SAFETY: the set is initialised and `signal` is live.
        unsafe { libc::sigwait(&raw const self.0, &raw mut signal) };
    }
}

/// Makes standard output another file.
pub fn replace_stdout(file: BorrowedFd<'_>) {
    // SAFETY: both descriptors are open; a failure leaves stdout as it was.
    unsafe { libc::dup2(file.as_raw_fd(), libc::STDOUT_FILENO) };
}
