// SPDX-License-Identifier: GPL-2.0-or-later
//! `linux/ublk_cmd.h` as far as it is used: numbers, flags, structures. Sizes and numbers are frozen by the kernel and
//! held fast by the tests below.
//!
//! Structures that grew over time are as long as the newest part we use; the kernel takes shorter and longer ones
//! (`ublk_ctrl_set_params`: the smaller of both lengths counts).

/// `/dev/ublk-control` and the beginnings of the character and block device of one device.
pub const CONTROL_PATH: &str = "/dev/ublk-control";
pub const CHAR_PATH: &str = "/dev/ublkc";
pub const BLOCK_PATH: &str = "/dev/ublkb";

const WRITE: u32 = 1;
const READ: u32 = 2;

const fn number(direction: u32, number: u32, size: usize) -> u32 {
    direction << 30 | (size as u32) << 16 | (b'u' as u32) << 8 | number
}

const fn control(direction: u32, nr: u32) -> u32 {
    number(direction, nr, size_of::<ControlCommand>())
}

const fn io(nr: u32) -> u32 {
    number(READ | WRITE, nr, size_of::<IoCommand>())
}

pub const GET_DEV_INFO: u32 = control(READ, 0x02);
pub const ADD_DEV: u32 = control(READ | WRITE, 0x04);
pub const DEL_DEV: u32 = control(READ | WRITE, 0x05);
pub const START_DEV: u32 = control(READ | WRITE, 0x06);
pub const STOP_DEV: u32 = control(READ | WRITE, 0x07);
pub const SET_PARAMS: u32 = control(READ | WRITE, 0x08);
pub const START_USER_RECOVERY: u32 = control(READ | WRITE, 0x10);
pub const END_USER_RECOVERY: u32 = control(READ | WRITE, 0x11);
pub const GET_FEATURES: u32 = control(READ, 0x13);
/// 6.9: as `DEL_DEV`, without waiting for those who still have the device open.
pub const DEL_DEV_ASYNC: u32 = control(READ, 0x14);
pub const UPDATE_SIZE: u32 = control(READ | WRITE, 0x15);

pub const FETCH_REQ: u32 = io(0x20);
pub const COMMIT_AND_FETCH_REQ: u32 = io(0x21);

/// Results of the two above: a request is there, or the device has ended and the tag must not be fetched again.
pub const RESULT_OK: i32 = 0;
pub const RESULT_ABORT: i32 = -libc::ENODEV;

/// Feature and device flags, by the first release with them.
pub mod flag {
    /// 6.1: the device waits for a new server instead of ending with the old one.
    pub const USER_RECOVERY: u64 = 1 << 3;
    /// 6.1: requests that the old server held are given to the new one.
    pub const USER_RECOVERY_REISSUE: u64 = 1 << 4;
    /// 6.4: commands are numbered like ioctls.
    pub const CMD_IOCTL_ENCODE: u64 = 1 << 6;
    /// 6.16
    pub const UPDATE_SIZE: u64 = 1 << 10;
    /// 6.16: the request's pages appear in the ring's buffer table.
    pub const AUTO_BUF_REG: u64 = 1 << 11;
    /// 7.0
    pub const NO_AUTO_PART_SCAN: u64 = 1 << 18;
}

/// `ublksrv_ctrl_dev_info.state`.
pub mod state {
    /// Not started, or stopped.
    pub const DEAD: u16 = 0;
    pub const LIVE: u16 = 1;
    /// Its server is gone; it waits for another.
    pub const QUIESCED: u16 = 2;
}

/// The low byte of `op_flags`.
pub mod op {
    pub const READ: u8 = 0;
    pub const WRITE: u8 = 1;
    pub const FLUSH: u8 = 2;
    pub const DISCARD: u8 = 3;
}

/// In `op_flags`: the write has to be on the medium when it is answered.
pub const OP_FUA: u32 = 1 << 13;
/// The driver's sectors, whatever the logical block size.
pub const SECTOR: u64 = 512;

/// `ublksrv_ctrl_cmd`, at byte 48 of a control submission.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct ControlCommand {
    pub dev_id: u32,
    pub queue_id: u16,
    pub len: u16,
    pub addr: u64,
    pub data: u64,
    pub dev_path_len: u16,
    pub pad: u16,
    pub reserved: u32,
}

/// `ublksrv_ctrl_dev_info`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct DeviceInfo {
    pub nr_hw_queues: u16,
    pub queue_depth: u16,
    pub state: u16,
    pub io_desc_size: u16,
    pub max_io_buf_bytes: u32,
    pub dev_id: u32,
    pub server_pid: i32,
    pub pad: u32,
    pub flags: u64,
    /// Kept for the server, word by word.
    pub server_flags: u64,
    pub owner_uid: u32,
    pub owner_gid: u32,
    pub reserved: [u64; 2],
}

/// `ublksrv_io_desc`: one request, where the driver shows it.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Descriptor {
    pub op_flags: u32,
    pub sectors: u32,
    pub first_sector: u64,
    pub addr: u64,
}

/// `ublksrv_io_cmd`, at byte 48 of a FETCH or COMMIT submission.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct IoCommand {
    pub queue_id: u16,
    pub tag: u16,
    pub result: i32,
    pub addr: u64,
}

impl IoCommand {
    pub fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[0..2].copy_from_slice(&self.queue_id.to_ne_bytes());
        bytes[2..4].copy_from_slice(&self.tag.to_ne_bytes());
        bytes[4..8].copy_from_slice(&self.result.to_ne_bytes());
        bytes[8..16].copy_from_slice(&self.addr.to_ne_bytes());
        bytes
    }
}

/// `ublk_param_basic.attrs`.
pub mod attr {
    pub const READ_ONLY: u32 = 1;
    pub const ROTATIONAL: u32 = 2;
    pub const VOLATILE_CACHE: u32 = 4;
    pub const FUA: u32 = 8;
}

/// `ublk_params.types`: which of its parts count. Unknown ones are ignored by older kernels.
pub mod part {
    pub const BASIC: u32 = 1;
    pub const DISCARD: u32 = 2;
    /// 6.15
    pub const DMA_ALIGN: u32 = 16;
    pub const SEGMENT: u32 = 32;
}

/// `ublk_params` up to `seg` (6.15). 104 bytes of it are what 6.12 knows, plus `dma` and `seg`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Params {
    pub len: u32,
    pub types: u32,
    pub attrs: u32,
    pub logical_bs_shift: u8,
    pub physical_bs_shift: u8,
    pub io_opt_shift: u8,
    pub io_min_shift: u8,
    pub max_sectors: u32,
    pub chunk_sectors: u32,
    pub dev_sectors: u64,
    pub virt_boundary_mask: u64,
    pub discard_alignment: u32,
    pub discard_granularity: u32,
    pub max_discard_sectors: u32,
    pub max_write_zeroes_sectors: u32,
    pub max_discard_segments: u16,
    pub discard_reserved: u16,
    pub devt: [u32; 4],
    pub zoned: [u32; 8],
    pub dma_alignment: u32,
    pub dma_pad: u32,
    pub seg_boundary_mask: u64,
    pub max_segment_size: u32,
    pub max_segments: u16,
    pub seg_pad: u16,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    #[test]
    fn commands_have_the_numbers_of_the_header() {
        let expected = [
            (GET_DEV_INFO, 0x8020_7502),
            (ADD_DEV, 0xc020_7504),
            (DEL_DEV, 0xc020_7505),
            (START_DEV, 0xc020_7506),
            (STOP_DEV, 0xc020_7507),
            (SET_PARAMS, 0xc020_7508),
            (START_USER_RECOVERY, 0xc020_7510),
            (END_USER_RECOVERY, 0xc020_7511),
            (GET_FEATURES, 0x8020_7513),
            (DEL_DEV_ASYNC, 0x8020_7514),
            (UPDATE_SIZE, 0xc020_7515),
            (FETCH_REQ, 0xc010_7520),
            (COMMIT_AND_FETCH_REQ, 0xc010_7521),
        ];
        for (ours, theirs) in expected {
            assert_eq!(ours, theirs, "{ours:#x}");
        }
    }

    #[test]
    fn structures_have_the_layout_of_the_header() {
        assert_eq!(size_of::<ControlCommand>(), 32);
        assert_eq!(offset_of!(ControlCommand, data), 16);
        assert_eq!(size_of::<DeviceInfo>(), 64);
        assert_eq!(offset_of!(DeviceInfo, max_io_buf_bytes), 8);
        assert_eq!(offset_of!(DeviceInfo, flags), 24);
        assert_eq!(offset_of!(DeviceInfo, owner_uid), 40);
        assert_eq!(size_of::<Descriptor>(), 24);
        assert_eq!(offset_of!(Descriptor, first_sector), 8);
        assert_eq!(size_of::<IoCommand>(), 16);
        assert_eq!(size_of::<Params>(), 136);
        for (ours, theirs) in [
            (offset_of!(Params, attrs), 8),
            (offset_of!(Params, dev_sectors), 24),
            (offset_of!(Params, discard_alignment), 40),
            (offset_of!(Params, max_discard_segments), 56),
            (offset_of!(Params, devt), 60),
            (offset_of!(Params, zoned), 76),
            (offset_of!(Params, dma_alignment), 108),
            (offset_of!(Params, seg_boundary_mask), 120),
        ] {
            assert_eq!(ours, theirs);
        }
    }

    #[test]
    fn an_io_command_is_laid_out_as_the_structure() {
        let command = IoCommand {
            queue_id: 1,
            tag: 2,
            result: -5,
            addr: 7,
        };
        let bytes = command.bytes();
        assert_eq!(bytes[2..4], 2_u16.to_ne_bytes());
        assert_eq!(bytes[4..8], (-5_i32).to_ne_bytes());
        assert_eq!(bytes[8..16], 7_u64.to_ne_bytes());
    }
}
