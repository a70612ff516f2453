// SPDX-License-Identifier: GPL-2.0-or-later
//! What a ublk device takes over from the block device below it, as sysfs tells it (Documentation/ABI/stable/sysfs-block).
//!
//! Also what kinds of device cannot be tracked. Asks no driver and makes no device.

use super::uapi::{attr, part, Params, SECTOR};
use crate::mem::PAGE;
use std::fs;
use std::path::{Path, PathBuf};

/// The longest request.
pub const MAX_IO: u32 = 512 << 10;
/// The longest request of an image device. They are always copied, and there may be sixteen of them.
pub const IMAGE_MAX_IO: u32 = 256 << 10;
/// Discards are cut to this, so that a length in bytes fits 32 bits.
const MAX_DISCARD_SECTORS: u64 = (u32::MAX >> 9) as u64;

/// The sysfs of one block device: its own directory, and that of the queue it shares with its disk.
#[derive(Clone, Debug)]
pub struct Sysfs {
    own: PathBuf,
    disk: PathBuf,
}

impl Sysfs {
    /// Of the block device with this number.
    pub fn of(number: u64) -> Self {
        let (major, minor) = (libc::major(number), libc::minor(number));
        Self::at(Path::new("/sys/dev/block").join(format!("{major}:{minor}")))
    }

    fn at(own: PathBuf) -> Self {
        // A partition's directory is inside its disk's; the links above are resolved first.
        let own = fs::canonicalize(&own).unwrap_or(own);
        let disk = match own.parent() {
            Some(parent) if own.join("partition").exists() => parent.to_owned(),
            _ => own.clone(),
        };
        Self { own, disk }
    }

    fn text(&self, name: &str) -> String {
        let text = fs::read_to_string(self.disk.join(name)).unwrap_or_default();
        text.trim().to_owned()
    }

    fn number(&self, name: &str) -> u64 {
        self.text(name).parse().unwrap_or(0)
    }

    /// Why no ublk device can stand before this one; None: it can.
    pub fn refusal(&self) -> Option<&'static str> {
        let integrity = self.text("integrity/format");
        match () {
            () if !matches!(self.text("queue/zoned").as_str(), "" | "none") => {
                Some("it is a zoned device; those cannot be tracked")
            }
            () if self.text("queue/dax") == "1" => {
                Some("it is a DAX device: its memory can be written past any tracker")
            }
            () if !matches!(integrity.as_str(), "" | "none") => {
                Some("it carries integrity data for each block, which would be lost")
            }
            () if self.number("queue/logical_block_size") > PAGE as u64 => {
                Some("its logical blocks are larger than a page; the ublk driver has no such devices")
            }
            () => None,
        }
    }

    /// The longest request that the device below takes in one piece, at most [`MAX_IO`].
    ///
    /// A longer one would be cut again below us, which makes io_uring send it through a worker thread. `copied`: our
    /// buffers are pages of their own, each a segment.
    pub fn max_io(&self, copied: bool) -> u32 {
        let longest = match self.number("queue/max_sectors_kb") {
            0 => u64::from(MAX_IO),
            kib => kib << 10,
        };
        let segments = match self.number("queue/max_segments") {
            count if count > 0 && copied => count * PAGE as u64,
            _ => u64::from(MAX_IO),
        };
        let bytes = longest.min(segments).min(u64::from(MAX_IO)) as u32;
        // At least a page, and whole pages (ublk_validate_params).
        (bytes & !(PAGE as u32 - 1)).max(PAGE as u32)
    }

    /// The parameters of a device of `size` bytes over this one.
    pub fn params(&self, size: u64, read_only: bool, max_io: u32, copied: bool) -> Params {
        let mut params = self.common(size, max_io);
        if read_only {
            params.attrs |= attr::READ_ONLY;
        }
        if self.text("queue/write_cache") == "write back" {
            params.attrs |= attr::VOLATILE_CACHE;
            if self.number("queue/fua") == 1 {
                params.attrs |= attr::FUA;
            }
        }
        let discards = (self.number("queue/discard_max_bytes") / SECTOR).min(MAX_DISCARD_SECTORS) as u32;
        if discards > 0 && !read_only {
            params.types |= part::DISCARD;
            let granularity = self
                .number("queue/discard_granularity")
                .max(1 << params.logical_bs_shift);
            params.discard_granularity = u32::try_from(granularity).unwrap_or(1 << params.physical_bs_shift);
            let alignment = fs::read_to_string(self.own.join("discard_alignment")).unwrap_or_default();
            params.discard_alignment = alignment.trim().parse().unwrap_or(0);
            params.max_discard_sectors = discards;
            params.max_discard_segments = 1;
        }
        if !copied {
            self.mirror_memory(&mut params);
        }
        params
    }

    /// The parameters of an image of `size` bytes: the geometry of its origin, no cache, no discards.
    pub fn image_params(&self, size: u64, writable: bool) -> Params {
        let mut params = self.common(size, IMAGE_MAX_IO);
        params.attrs |= if writable { 0 } else { attr::READ_ONLY };
        params
    }

    fn common(&self, size: u64, max_io: u32) -> Params {
        let logical = shift(self.number("queue/logical_block_size")).clamp(9, 12);
        let physical = shift(self.number("queue/physical_block_size")).clamp(logical, 16);
        let minimum = shift(self.number("queue/minimum_io_size")).clamp(physical, 30);
        Params {
            types: part::BASIC,
            attrs: if self.number("queue/rotational") == 1 {
                attr::ROTATIONAL
            } else {
                0
            },
            logical_bs_shift: logical,
            physical_bs_shift: physical,
            io_min_shift: minimum,
            io_opt_shift: shift(self.number("queue/optimal_io_size")).clamp(minimum, 30),
            max_sectors: max_io / SECTOR as u32,
            dev_sectors: size / SECTOR,
            ..Params::default()
        }
    }

    /// How the device below wants its memory: without a copy in between it gets the pages of whoever wrote.
    fn mirror_memory(&self, params: &mut Params) {
        if let Ok(mask) = self.text("queue/dma_alignment").parse::<u32>() {
            params.types |= part::DMA_ALIGN;
            // The driver wants a mask below a page; 0 (any address) is its default of 4 bytes as well.
            params.dma_alignment = mask.clamp(3, PAGE as u32 - 1);
        }
        params.virt_boundary_mask = self.number("queue/virt_boundary_mask");
        let (segments, len) = (self.number("queue/max_segments"), self.number("queue/max_segment_size"));
        // A boundary and segments exclude each other (blk_validate_limits).
        if params.virt_boundary_mask == 0 && segments > 0 && len >= PAGE as u64 {
            params.types |= part::SEGMENT;
            params.max_segments = u16::try_from(segments).unwrap_or(u16::MAX);
            params.max_segment_size = u32::try_from(len).unwrap_or(u32::MAX);
            // sysfs does not tell it; this is what the block layer assumes (BLK_SEG_BOUNDARY_MASK).
            params.seg_boundary_mask = 0xffff_ffff;
        }
    }
}

/// The exponent of the greatest power of two that divides `size`; 0 for 0.
fn shift(size: u64) -> u8 {
    if size == 0 {
        0
    } else {
        size.trailing_zeros() as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A made-up sysfs with these files below `queue`.
    fn sysfs(name: &str, files: &[(&str, &str)]) -> Sysfs {
        let own = std::env::temp_dir().join(format!("blksnap-{name}-{}", std::process::id()));
        for (file, text) in files {
            let path = own.join(file);
            fs::create_dir_all(path.parent().expect("inside")).expect("directory");
            fs::write(path, format!("{text}\n")).expect("file");
        }
        Sysfs::at(own)
    }

    fn remove(sysfs: &Sysfs) {
        fs::remove_dir_all(&sysfs.own).expect("remove");
    }

    #[test]
    fn cache_and_discards_are_those_of_the_device_below() {
        let disk = sysfs(
            "cache",
            &[
                ("queue/logical_block_size", "512"),
                ("queue/physical_block_size", "4096"),
                ("queue/minimum_io_size", "4096"),
                ("queue/write_cache", "write back"),
                ("queue/fua", "1"),
                ("queue/discard_max_bytes", "1099511627776"),
                ("queue/discard_granularity", "4096"),
            ],
        );
        let params = disk.params(1 << 30, false, MAX_IO, true);
        assert_eq!(params.attrs, attr::VOLATILE_CACHE | attr::FUA);
        assert_eq!((params.logical_bs_shift, params.physical_bs_shift), (9, 12));
        assert_eq!(params.types, part::BASIC | part::DISCARD);
        assert_eq!(params.max_discard_sectors, 8_388_607);
        assert_eq!((params.max_discard_segments, params.discard_granularity), (1, 4096));
        assert_eq!(params.dev_sectors, 1 << 21);
        let image = disk.image_params(1 << 30, false);
        assert_eq!((image.attrs, image.types), (attr::READ_ONLY, part::BASIC));
        remove(&disk);
    }

    #[test]
    fn requests_are_no_longer_than_the_device_below_takes_whole() {
        let disk = sysfs(
            "length",
            &[("queue/max_sectors_kb", "1280"), ("queue/max_segments", "32")],
        );
        assert_eq!(disk.max_io(true), 32 * PAGE as u32);
        assert_eq!(disk.max_io(false), MAX_IO);
        remove(&disk);
    }

    #[test]
    fn devices_that_cannot_be_tracked_are_told_by_their_kind() {
        for (file, text) in [
            ("queue/zoned", "host-managed"),
            ("queue/dax", "1"),
            ("integrity/format", "T10-DIF-TYPE1-CRC"),
            ("queue/logical_block_size", "16384"),
        ] {
            let disk = sysfs("kind", &[(file, text)]);
            assert!(disk.refusal().is_some(), "{file}");
            remove(&disk);
        }
        let plain = sysfs(
            "kind",
            &[
                ("queue/zoned", "none"),
                ("queue/dax", "0"),
                ("integrity/format", "none"),
            ],
        );
        assert_eq!(plain.refusal(), None);
        remove(&plain);
    }
}
