// SPDX-License-Identifier: GPL-2.0-or-later
//! linux/dm-ioctl.h in Rust: layouts, numbers, flags; and the udev flags of libdevmapper.h. No calls.

/// `struct dm_ioctl`: the head of every argument.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Head {
    pub version: [u32; 3],
    pub data_size: u32,
    pub data_start: u32,
    pub target_count: u32,
    pub open_count: i32,
    pub flags: u32,
    pub event_nr: u32,
    pub padding: u32,
    pub dev: u64,
    pub name: [u8; NAME_LEN],
    pub uuid: [u8; UUID_LEN],
    pub data: [u8; 7],
}

/// `struct dm_target_spec`; the parameters follow it as a C string.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Spec {
    pub sector_start: u64,
    pub length: u64,
    pub status: i32,
    pub next: u32,
    pub target_type: [u8; TYPE_LEN],
}

pub const NAME_LEN: usize = 128;
pub const UUID_LEN: usize = 129;
pub const TYPE_LEN: usize = 16;
pub const SECTOR: u64 = 512;
/// What is asked for; each command used here is as old as the interface, or as what it is asked about.
pub const VERSION: [u32; 3] = [4, 0, 0];

const fn command(number: u32) -> libc::Ioctl {
    const READ_WRITE: u32 = 3;
    (READ_WRITE << 30 | (size_of::<Head>() as u32) << 16 | 0xfd << 8 | number) as libc::Ioctl
}

pub const DM_VERSION: libc::Ioctl = command(0);
pub const DM_LIST_DEVICES: libc::Ioctl = command(2);
pub const DM_DEV_CREATE: libc::Ioctl = command(3);
pub const DM_DEV_REMOVE: libc::Ioctl = command(4);
pub const DM_DEV_SUSPEND: libc::Ioctl = command(6);
pub const DM_DEV_STATUS: libc::Ioctl = command(7);
pub const DM_TABLE_LOAD: libc::Ioctl = command(9);
pub const DM_TABLE_CLEAR: libc::Ioctl = command(10);
pub const DM_TABLE_STATUS: libc::Ioctl = command(12);
pub const DM_LIST_VERSIONS: libc::Ioctl = command(13);

pub const READONLY: u32 = 1 << 0;
pub const SUSPEND: u32 = 1 << 1;
pub const STATUS_TABLE: u32 = 1 << 4;
pub const ACTIVE_PRESENT: u32 = 1 << 5;
pub const INACTIVE_PRESENT: u32 = 1 << 6;
pub const BUFFER_FULL: u32 = 1 << 8;
pub const SKIP_LOCKFS: u32 = 1 << 10;
pub const NOFLUSH: u32 = 1 << 11;
/// Buffers are wiped after use: a table may hold a key.
pub const SECURE_DATA: u32 = 1 << 15;

/// Flags for udev's rules, in the upper half of the cookie that goes along with the uevent (`event_nr`).
pub const UDEV_SHIFT: u32 = 16;
pub const UDEV_DISABLE_SUBSYSTEM_RULES: u32 = 0x02;
pub const UDEV_DISABLE_DISK_RULES: u32 = 0x04;
pub const UDEV_DISABLE_OTHER_RULES: u32 = 0x08;
/// libdevmapper makes no node of its own for this one when udev's is missing.
pub const UDEV_DISABLE_LIBRARY_FALLBACK: u32 = 0x20;
/// The event comes from whoever set the device up, and is no echo of udev's own watching.
pub const UDEV_PRIMARY_SOURCE: u32 = 0x40;

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    /// Printed by a C program from linux/dm-ioctl.h 4.47 on x86-64.
    #[test]
    fn layouts_are_those_of_the_header() {
        assert_eq!((size_of::<Head>(), align_of::<Head>()), (312, 8));
        assert_eq!(offset_of!(Head, dev), 40);
        assert_eq!(offset_of!(Head, name), 48);
        assert_eq!(offset_of!(Head, uuid), 176);
        assert_eq!(offset_of!(Head, data), 305);
        assert_eq!((size_of::<Spec>(), offset_of!(Spec, target_type)), (40, 24));
        assert_eq!((offset_of!(Spec, status), offset_of!(Spec, next)), (16, 20));
    }

    #[test]
    fn numbers_are_those_of_the_header() {
        let numbers = [
            (DM_VERSION, 0xc138_fd00_u32),
            (DM_LIST_DEVICES, 0xc138_fd02),
            (DM_DEV_CREATE, 0xc138_fd03),
            (DM_DEV_REMOVE, 0xc138_fd04),
            (DM_DEV_SUSPEND, 0xc138_fd06),
            (DM_DEV_STATUS, 0xc138_fd07),
            (DM_TABLE_LOAD, 0xc138_fd09),
            (DM_TABLE_CLEAR, 0xc138_fd0a),
            (DM_TABLE_STATUS, 0xc138_fd0c),
            (DM_LIST_VERSIONS, 0xc138_fd0d),
        ];
        for (ours, theirs) in numbers {
            assert_eq!(ours as u32, theirs);
        }
    }
}
