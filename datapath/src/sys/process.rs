// SPDX-License-Identifier: GPL-2.0-or-later
//! System calls about processes and the descriptors they hand on. No policy.

use super::{check, message, own, Control, CONTROL_LEN};
use std::ffi::CString;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

/// A pipe: its reading and its writing end.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [0; 2];
    // SAFETY: the array has room for the two numbers.
    check(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) })?;
    Ok((own(ends[0]), own(ends[1])))
}

/// Owns descriptor number `fd` that was inherited, and closes it on exec. None: there is no such descriptor.
pub fn inherited(fd: RawFd) -> Option<OwnedFd> {
    // SAFETY: plain system call; on success the number is open and, as the caller says, nobody else's.
    unsafe { (libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) == 0).then(|| OwnedFd::from_raw_fd(fd)) }
}

/// Waits until one of `fds` is readable or hung up; which of them are. None: `patience` waits for ever.
pub fn poll(fds: &[BorrowedFd<'_>], patience: Option<Duration>) -> io::Result<Vec<bool>> {
    let mut polls: Vec<_> = fds
        .iter()
        .map(|fd| libc::pollfd {
            fd: fd.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        })
        .collect();
    let milliseconds = patience.map_or(-1, |patience| i32::try_from(patience.as_millis()).unwrap_or(i32::MAX));
    // SAFETY: the array is live and has the length given.
    let result = check(unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, milliseconds) });
    match result {
        Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
        _ => Ok(polls.iter().map(|poll| poll.revents != 0).collect()),
    }
}

/// A descriptor that is readable when process `pid` has ended.
pub fn watch_process(pid: libc::pid_t) -> io::Result<OwnedFd> {
    // SAFETY: plain system call (5.3).
    check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) as libc::c_int }).map(own)
}

/// A descriptor that is readable when SIGTERM or SIGINT has come; both are blocked from now on.
pub fn watch_signals() -> io::Result<OwnedFd> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the set; the others work on an initialised set.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGTERM);
        libc::sigaddset(set.as_mut_ptr(), libc::SIGINT);
        libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
        check(libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC)).map(own)
    }
}

pub fn terminate(pid: libc::pid_t) {
    // SAFETY: plain system call; the caller has not reaped its child yet, so the number is its.
    unsafe { libc::kill(pid, libc::SIGTERM) };
}

/// Does something without CAP_SYS_ADMIN, which this thread (alone) has back afterwards.
pub fn without_admin<T>(work: impl FnOnce() -> T) -> T {
    const VERSION_3: u32 = 0x2008_0522;
    const ADMIN: u32 = 1 << 21;
    // linux/capability.h: version and thread (0: this one); effective, permitted and inheritable in two halves.
    let mut head = [VERSION_3, 0];
    let mut sets = [[0_u32; 3]; 2];
    // SAFETY: both are live and as large as version 3 says.
    let known = unsafe { libc::syscall(libc::SYS_capget, head.as_mut_ptr(), sets.as_mut_ptr()) } == 0;
    let mut set = |sets: &[[u32; 3]; 2]| {
        // SAFETY: as above; the kernel reads them.
        unsafe { libc::syscall(libc::SYS_capset, head.as_mut_ptr(), sets.as_ptr()) }
    };
    let mut without = sets;
    without[0][0] &= !ADMIN;
    let dropped = known && without != sets && set(&without) == 0;
    let done = work();
    if dropped {
        set(&sets);
    }
    done
}

pub fn parent() -> libc::pid_t {
    // SAFETY: cannot fail.
    unsafe { libc::getppid() }
}

/// The most descriptors this process may have.
pub fn file_limit() -> u64 {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the struct is live.
    match unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } {
        0 => limit.rlim_cur,
        _ => 1024,
    }
}

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Status(i32),
    Signal(i32),
}

/// Reaps child `pid`, which has to have ended or is waited for.
pub fn reap(pid: libc::pid_t) -> io::Result<End> {
    let mut status = 0;
    // SAFETY: the status is a live int.
    check(unsafe { libc::waitpid(pid, &raw mut status, 0) })?;
    Ok(if libc::WIFSIGNALED(status) {
        End::Signal(libc::WTERMSIG(status))
    } else {
        End::Status(libc::WEXITSTATUS(status))
    })
}

/// A program to start again and again.
#[derive(Debug)]
pub struct Program {
    pub path: CString,
    pub arguments: Vec<CString>,
    /// All of it; `LISTEN_PID` is added here, for only the child knows it.
    pub environment: Vec<CString>,
}

/// The status of a child that could not become its program.
pub const NOT_STARTED: i32 = 127;

impl Program {
    /// Starts it with `fds` from 3 on, SIGTERM and SIGINT unblocked and `stdout`; the new process's id.
    ///
    /// For a process with one thread: another's locks would be copied in whatever state they are.
    pub fn start(&self, fds: &[BorrowedFd<'_>], stdout: BorrowedFd<'_>) -> io::Result<libc::pid_t> {
        const DIGITS: usize = 12;
        const KEY: &[u8] = b"LISTEN_PID=";
        // The rest stays zero: the end of the string.
        let mut variable = [0_u8; KEY.len() + DIGITS];
        variable[..KEY.len()].copy_from_slice(KEY);
        let variable = variable.as_mut_ptr();
        let mut arguments: Vec<_> = self.arguments.iter().map(|word| word.as_ptr()).collect();
        arguments.push(std::ptr::null());
        let mut environment: Vec<_> = self.environment.iter().map(|word| word.as_ptr()).collect();
        environment.push(variable.cast_const().cast());
        environment.push(std::ptr::null());
        let mut high = vec![0; fds.len()];
        let first_free = 3 + fds.len() as libc::c_int;
        // SAFETY: this process has one thread, as the caller promises; the child only makes system calls on memory that
        // was made before and ends in execve or _exit.
        unsafe {
            let child = libc::fork();
            if child != 0 {
                return check(child);
            }
            let mut number = libc::getpid();
            let mut text = [0_u8; DIGITS];
            let mut length = 0;
            while number > 0 {
                text[length] = b'0' + (number % 10) as u8;
                (number, length) = (number / 10, length + 1);
            }
            for place in 0..length {
                variable.add(KEY.len() + place).write(text[length - 1 - place]);
            }
            let mut set = MaybeUninit::<libc::sigset_t>::uninit();
            libc::sigemptyset(set.as_mut_ptr());
            libc::pthread_sigmask(libc::SIG_SETMASK, set.as_ptr(), std::ptr::null_mut());
            libc::dup2(stdout.as_raw_fd(), libc::STDOUT_FILENO);
            // Out of the way first: a descriptor may have a number that another is to get.
            for (to, from) in high.iter_mut().zip(fds) {
                *to = libc::fcntl(from.as_raw_fd(), libc::F_DUPFD_CLOEXEC, first_free);
                if *to < 0 {
                    libc::_exit(NOT_STARTED);
                }
            }
            for (place, from) in high.iter().enumerate() {
                if libc::dup2(*from, 3 + place as libc::c_int) < 0 {
                    libc::_exit(NOT_STARTED);
                }
            }
            libc::execve(self.path.as_ptr(), arguments.as_ptr(), environment.as_ptr());
            libc::_exit(NOT_STARTED)
        }
    }
}

/// One message of a datagram socket.
#[derive(Debug)]
pub struct Datagram {
    pub len: usize,
    /// Of the sender, as the kernel says; 0 when it does not.
    pub pid: libc::pid_t,
    pub fds: Vec<OwnedFd>,
    /// Whether bytes or descriptors had no room.
    pub cut: bool,
}

/// Has the kernel say who sent each message.
pub fn ask_for_senders(socket: BorrowedFd<'_>) -> io::Result<()> {
    let (on, size) = (1 as libc::c_int, size_of::<libc::c_int>() as libc::socklen_t);
    // SAFETY: the option's value is a live int.
    check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PASSCRED,
            (&raw const on).cast(),
            size,
        )
    })
    .map(drop)
}

/// The next message, without waiting (`WouldBlock`: there is none).
pub fn receive_datagram(socket: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<Datagram> {
    let mut vector = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    let mut control = Control([0; CONTROL_LEN]);
    let mut header = message(&mut vector, &mut control, CONTROL_LEN);
    let flags = libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT;
    // SAFETY: header, vector and control buffer are live.
    let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags) };
    let len = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
    let mut datagram = Datagram {
        len,
        pid: 0,
        fds: Vec::new(),
        cut: header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0,
    };
    // SAFETY: the kernel filled the control buffer; the macros walk it within msg_controllen. Each descriptor in it is
    // new in this process and gets one owner here.
    unsafe {
        let mut part = libc::CMSG_FIRSTHDR(&raw const header);
        while !part.is_null() {
            let payload = (*part).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
            let data = libc::CMSG_DATA(part);
            match ((*part).cmsg_level, (*part).cmsg_type) {
                (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
                    for place in 0..payload / size_of::<RawFd>() {
                        datagram.fds.push(own(data.cast::<RawFd>().add(place).read_unaligned()));
                    }
                }
                (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) if payload >= size_of::<libc::ucred>() => {
                    datagram.pid = data.cast::<libc::ucred>().read_unaligned().pid;
                }
                _ => {}
            }
            part = libc::CMSG_NXTHDR(&raw const header, part);
        }
    }
    Ok(datagram)
}
