// SPDX-License-Identifier: GPL-2.0-or-later
//! Commands to `/dev/ublk-control`, each waited for. For control threads: several of them sleep in the kernel, and two
//! (`start`, `stop`) until the device's queue thread has done its part.
//!
//! Knows no origin and no image, and keeps nothing: a [`Control`] is opened for a few commands and dropped.

use super::uapi::{self, ControlCommand, DeviceInfo, Params};
use crate::sys;
use io_uring::{opcode, squeue::Entry128, types::Fd, IoUring};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

/// The queue number of commands that are for the whole device.
const NO_QUEUE: u16 = u16::MAX;
/// The device number of commands for none, and of a device that the driver is to number.
const NO_DEVICE: u32 = u32::MAX;
/// How long the character device may take to appear (devtmpfs makes it at once).
const APPEAR_S: u64 = 5;

pub struct Control {
    file: File,
    ring: IoUring<Entry128>,
}

impl Control {
    /// Raised (NotFound) when the driver is not loaded, (PermissionDenied) when only root may, or as io_uring says.
    pub fn open() -> io::Result<Self> {
        let file = File::options().read(true).write(true).open(uapi::CONTROL_PATH)?;
        let ring = IoUring::builder().build(4)?;
        Ok(Self { file, ring })
    }

    fn run(&mut self, number: u32, command: ControlCommand) -> io::Result<()> {
        let mut bytes = [0; 80];
        bytes[..size_of::<ControlCommand>()].copy_from_slice(&command.bytes());
        let entry = opcode::UringCmd80::new(Fd(self.file.as_raw_fd()), number)
            .cmd(bytes)
            .build();
        // SAFETY: what the command points to lives in the callers below until it has completed, here.
        unsafe { self.ring.submission().push(&entry) }.expect("one command at a time");
        loop {
            match self.ring.submit_and_wait(1) {
                Err(error) if error.raw_os_error() != Some(libc::EINTR) => return Err(error),
                _ => {}
            }
            if let Some(done) = self.ring.completion().next() {
                return match done.result() {
                    error if error < 0 => Err(io::Error::from_raw_os_error(-error)),
                    _ => Ok(()),
                };
            }
        }
    }

    /// A command without a structure; `data` is its one number.
    fn plain(&mut self, number: u32, device: u32, data: u64) -> io::Result<()> {
        let command = ControlCommand {
            dev_id: device,
            queue_id: NO_QUEUE,
            data,
            ..ControlCommand::default()
        };
        self.run(number, command)
    }

    /// A command with a structure that the kernel reads or writes.
    fn with<T>(&mut self, number: u32, device: u32, structure: &mut T) -> io::Result<()> {
        let command = ControlCommand {
            dev_id: device,
            queue_id: NO_QUEUE,
            len: size_of::<T>() as u16,
            addr: std::ptr::from_mut(structure) as u64,
            ..ControlCommand::default()
        };
        self.run(number, command)
    }

    /// The flags of [`uapi::flag`] that this kernel knows. Raised (EOPNOTSUPP) before 6.5.
    pub fn features(&mut self) -> io::Result<u64> {
        let mut features = 0_u64;
        self.with(uapi::GET_FEATURES, NO_DEVICE, &mut features)?;
        Ok(features)
    }

    /// Makes a device with one queue; the driver chooses its number. What comes back is what the driver agreed to:
    /// flags that it does not know are missing. `stamp`: kept with it ([`super::stamp`]).
    pub fn add(&mut self, depth: u16, max_io_bytes: u32, flags: u64, stamp: u64) -> io::Result<DeviceInfo> {
        let mut info = DeviceInfo {
            nr_hw_queues: 1,
            queue_depth: depth,
            max_io_buf_bytes: max_io_bytes,
            dev_id: NO_DEVICE,
            flags,
            server_flags: stamp,
            ..DeviceInfo::default()
        };
        self.with(uapi::ADD_DEV, NO_DEVICE, &mut info)?;
        Ok(info)
    }

    /// Before `start` only.
    pub fn set_params(&mut self, device: u32, params: &Params) -> io::Result<()> {
        let mut params = *params;
        params.len = size_of::<Params>() as u32;
        self.with(uapi::SET_PARAMS, device, &mut params)
    }

    pub fn info(&mut self, device: u32) -> io::Result<DeviceInfo> {
        let mut info = DeviceInfo::default();
        self.with(uapi::GET_DEV_INFO, device, &mut info)?;
        Ok(info)
    }

    /// The block device appears. Waits until all requests were fetched, and before 7.0 until its partition table was
    /// read (see `queue::Queue::scanned`). The queue thread is one of the process `server`.
    pub fn start(&mut self, device: u32, server: u32) -> io::Result<()> {
        self.plain(uapi::START_DEV, device, u64::from(server))
    }

    /// The block device disappears: what is under way ends, what is begun later fails. Needs the queue thread until it
    /// returns. No way leads back.
    pub fn stop(&mut self, device: u32) -> io::Result<()> {
        self.plain(uapi::STOP_DEV, device, 0)
    }

    /// Forgets the device. Whoever still has it open keeps its number in use, and is not waited for where the driver can
    /// do without (since 6.9).
    pub fn delete(&mut self, device: u32) -> io::Result<()> {
        match self.plain(uapi::DEL_DEV_ASYNC, device, 0) {
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => self.plain(uapi::DEL_DEV, device, 0),
            done => done,
        }
    }

    /// Only with [`uapi::flag::UPDATE_SIZE`].
    pub fn update_size(&mut self, device: u32, bytes: u64) -> io::Result<()> {
        self.plain(uapi::UPDATE_SIZE, device, bytes / uapi::SECTOR)
    }

    /// Lets a new server take the place of one that has died. Raised (EBUSY) as long as the old one's operations last.
    pub fn start_recovery(&mut self, device: u32) -> io::Result<()> {
        self.plain(uapi::START_USER_RECOVERY, device, 0)
    }

    /// The new server serves. Waits until all requests were fetched.
    pub fn end_recovery(&mut self, device: u32) -> io::Result<()> {
        self.plain(uapi::END_USER_RECOVERY, device, u64::from(std::process::id()))
    }
}

impl ControlCommand {
    fn bytes(self) -> [u8; size_of::<Self>()] {
        let mut bytes = [0; size_of::<Self>()];
        bytes[0..4].copy_from_slice(&self.dev_id.to_ne_bytes());
        bytes[4..6].copy_from_slice(&self.queue_id.to_ne_bytes());
        bytes[6..8].copy_from_slice(&self.len.to_ne_bytes());
        bytes[8..16].copy_from_slice(&self.addr.to_ne_bytes());
        bytes[16..24].copy_from_slice(&self.data.to_ne_bytes());
        bytes
    }
}

/// Opens the character device of a device that was just added.
pub fn open_char(device: u32) -> io::Result<File> {
    let path = format!("{}{device}", uapi::CHAR_PATH);
    let end = Instant::now() + Duration::from_secs(APPEAR_S);
    loop {
        match File::options().read(true).write(true).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(2));
            }
            opened => return opened,
        }
    }
}

/// The numbers of all devices there are, whoever made them, in service or not.
pub fn all() -> Vec<u32> {
    let listed = std::fs::read_dir("/sys/class/ublk-char")
        .into_iter()
        .flatten()
        .flatten();
    let number = |name: String| name.strip_prefix("ublkc")?.parse().ok();
    listed
        .filter_map(|entry| number(entry.file_name().into_string().ok()?))
        .collect()
}

/// What `hello` tells of the driver.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Availability {
    pub available: bool,
    /// Why not, and what to do about it; "" when it is.
    pub reason: String,
    pub features: u64,
    /// Whether requests' pages are used where they are.
    pub zero_copy: bool,
}

/// What an origin or image device cannot do without: a killed data path must be followable.
pub const NEEDED: u64 = uapi::flag::USER_RECOVERY | uapi::flag::USER_RECOVERY_REISSUE | uapi::flag::CMD_IOCTL_ENCODE;

pub fn availability() -> Availability {
    let found = Control::open().and_then(|mut control| control.features());
    let (features, reason) = match found {
        Ok(features) if features & NEEDED == NEEDED => (features, String::new()),
        Ok(features) => (
            features,
            "this kernel's ublk driver cannot be taken over (it needs 6.5 or later)".into(),
        ),
        Err(error) => (0, unavailable(&error)),
    };
    Availability {
        available: reason.is_empty(),
        reason,
        features,
        zero_copy: features & uapi::flag::AUTO_BUF_REG != 0,
    }
}

/// Why the driver cannot be asked, in words.
pub fn unavailable(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) => {
            "the ublk driver is not loaded: modprobe ublk_drv (Linux 6.8 or later)".into()
        }
        Some(libc::EACCES | libc::EPERM) if sys::own_uid() != 0 => "only root can make block devices".into(),
        Some(libc::EOPNOTSUPP) => "this kernel's ublk driver is older than 6.5".into(),
        _ => format!("the ublk driver cannot be asked: {error}"),
    }
}
