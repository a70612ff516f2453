// SPDX-License-Identifier: GPL-2.0-or-later
//! The rules of the change map: block size, numbers, sliding window, marks.
//!
//! Pure arithmetic over bytes the caller owns: no I/O, no allocation, no lock, no clock. What a gate is, where the
//! bytes live and when a generation ends is the engine's business. `blksnap_service/cbt.py` is the reference and holds
//! the proof that no query misses a block; `tests/vectors/cbt.json` keeps the two equal.
//!
//! Byte 0 of a map says "not changed in this generation". Any other byte `b` says that the block last changed in the
//! interval `base + b`, but for 1, which says "in `base + 1` or earlier" once the window has slid.
//!
//! Accesses are `Relaxed`: a map orders nothing. A mark becomes visible before its write reaches the device because the
//! submission queue's tail is stored with `Release` after it, and a take copies behind a closed gate.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::AtomicU8;
use std::sync::atomic::Ordering::Relaxed;

/// The block size the rule starts from, in bytes.
pub const START_BLOCK_SIZE: u64 = 64 << 10;
/// The largest block size, by the rule or by request, in bytes.
pub const MAX_BLOCK_SIZE: u64 = 64 << 20;
/// The smallest block size that can be requested, in bytes.
pub const MIN_BLOCK_SIZE: u64 = 4 << 10;
/// The rule doubles the block size while a map would have more blocks than this.
pub const COMFORTABLE_BLOCKS: u64 = 2_097_152;
/// A map with more blocks than this (1 GiB of memory) is refused.
pub const MAX_BLOCKS: u64 = 1 << 30;
/// The largest size of an origin, in bytes (`off_t`).
pub const MAX_SIZE: u64 = i64::MAX as u64;
/// How far the window slides, in intervals.
pub const SLIDE: u8 = 128;

/// Why a value was refused. Nothing has been changed when one of these is returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CbtError {
    /// The origin's size is 0 or above [`MAX_SIZE`].
    Size(u64),
    /// The requested block size is no power of two from [`MIN_BLOCK_SIZE`] to [`MAX_BLOCK_SIZE`].
    BlockSize(u64),
    /// The map would have more than [`MAX_BLOCKS`] blocks.
    TooManyBlocks(u64),
    /// `base` and `active` cannot belong together.
    Numbers { base: u32, active: u32 },
    /// A saved map holds a byte that is newer than its own active number.
    MapByte { block: usize, byte: u8 },
    /// The range at this index is empty.
    EmptyRange { index: usize },
    /// The range at this index does not end inside the origin.
    PastEnd { index: usize },
    /// The number is too old to be told from older ones, or was never handed out in this generation.
    GenerationChanged { since: u32, oldest: u32, changes: u32 },
    /// The last number of the generation is in use.
    Exhausted,
}

impl fmt::Display for CbtError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Size(size) => write!(f, "a size of {size} bytes cannot be tracked"),
            Self::BlockSize(size) => {
                write!(
                    f,
                    "block size {size} is no power of two from {MIN_BLOCK_SIZE} to {MAX_BLOCK_SIZE}"
                )
            }
            Self::TooManyBlocks(count) => {
                write!(
                    f,
                    "the map would have {count} blocks, more than {MAX_BLOCKS}: choose a larger block size"
                )
            }
            Self::Numbers { base, active } => {
                write!(f, "base {base} and active number {active} do not belong together")
            }
            Self::MapByte { block, byte } => {
                write!(
                    f,
                    "block {block} of the saved map holds {byte}, which is newer than the map itself"
                )
            }
            Self::EmptyRange { index } => write!(f, "range {index} is empty"),
            Self::PastEnd { index } => write!(f, "range {index} ends past the end of the device"),
            Self::GenerationChanged { since, oldest, changes } => write!(
                f,
                "changes since {since} are not known, only since {oldest} to {changes}: a full copy is needed"
            ),
            Self::Exhausted => write!(f, "the generation has no number left: start a new one"),
        }
    }
}

impl std::error::Error for CbtError {}

/// How an origin is cut into blocks. The block size is a power of two; the last block may be partial.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    size: u64,
    shift: u32,
}

/// The block size in bytes for an origin of `size` bytes; `requested` 0 means by the rule.
///
/// # Errors
/// [`CbtError::Size`], [`CbtError::BlockSize`] and [`CbtError::TooManyBlocks`].
pub fn block_size_for(size: u64, requested: u64) -> Result<u64, CbtError> {
    if size == 0 || size > MAX_SIZE {
        return Err(CbtError::Size(size));
    }
    let mut block_size = START_BLOCK_SIZE;
    if requested == 0 {
        while size.div_ceil(block_size) > COMFORTABLE_BLOCKS && block_size < MAX_BLOCK_SIZE {
            block_size *= 2;
        }
    } else if requested.is_power_of_two() && (MIN_BLOCK_SIZE..=MAX_BLOCK_SIZE).contains(&requested) {
        block_size = requested;
    } else {
        return Err(CbtError::BlockSize(requested));
    }
    let count = size.div_ceil(block_size);
    if count > MAX_BLOCKS {
        Err(CbtError::TooManyBlocks(count))
    } else {
        Ok(block_size)
    }
}

impl Geometry {
    /// The geometry of an origin of `size` bytes; `requested` 0 means by the rule.
    ///
    /// # Errors
    /// Those of [`block_size_for`].
    pub fn new(size: u64, requested: u64) -> Result<Self, CbtError> {
        Ok(Self {
            size,
            shift: block_size_for(size, requested)?.trailing_zeros(),
        })
    }

    /// Bytes of the origin.
    #[must_use]
    pub const fn size(self) -> u64 {
        self.size
    }

    /// Bytes of a block.
    #[must_use]
    pub const fn block_size(self) -> u64 {
        1 << self.shift
    }

    /// How many blocks there are: the length of a map.
    #[must_use]
    #[allow(clippy::cast_possible_truncation, reason = "at most MAX_BLOCKS")]
    pub const fn block_count(self) -> usize {
        self.size.div_ceil(1 << self.shift) as usize
    }

    /// The blocks that `length` bytes at `offset` touch; what lies past the end is left out, so a map of
    /// [`Self::block_count`] bytes is never indexed outside.
    #[must_use]
    #[allow(clippy::cast_possible_truncation, reason = "at most MAX_BLOCKS")]
    pub const fn blocks(self, offset: u64, length: u64) -> Range<usize> {
        let end = offset.saturating_add(length);
        let end = if end < self.size { end } else { self.size };
        if offset >= end {
            return 0..0;
        }
        (offset >> self.shift) as usize..((end - 1) >> self.shift) as usize + 1
    }

    /// The offset and length in bytes of a run of blocks, clipped to the end of the origin.
    #[must_use]
    pub const fn bytes(self, blocks: &Range<usize>) -> (u64, u64) {
        let offset = (blocks.start as u64) << self.shift;
        let end = (blocks.end as u64) << self.shift;
        let end = if end < self.size { end } else { self.size };
        (offset, end.saturating_sub(offset))
    }
}

/// Which interval is being written and from where the map's bytes count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Numbers {
    base: u32,
    active: u32,
}

/// What a take will do. Making one changes nothing and consumes no number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TakePlan {
    /// The numbers after the take. Live and taken map both count from their base.
    pub numbers: Numbers,
    /// Whether the window slides: live and taken map are then filled by [`slide_into`], else the taken map by
    /// [`copy_into`] and the live map stays where it is.
    pub slides: bool,
}

impl Numbers {
    /// The numbers of a fresh generation: nothing taken, interval 1 is being written.
    pub const START: Self = Self { base: 0, active: 1 };

    /// The numbers of a generation that continues.
    ///
    /// # Errors
    /// [`CbtError::Numbers`] when no sequence of takes leads to them.
    pub const fn new(base: u32, active: u32) -> Result<Self, CbtError> {
        let least = if base == 0 { 1 } else { SLIDE as u32 };
        if base % SLIDE as u32 != 0 || active < base || active - base < least || active - base > u8::MAX as u32 {
            return Err(CbtError::Numbers { base, active });
        }
        Ok(Self { base, active })
    }

    /// The number that byte 0 would stand for.
    #[must_use]
    pub const fn base(self) -> u32 {
        self.base
    }

    /// The number of the interval being written now.
    #[must_use]
    pub const fn active(self) -> u32 {
        self.active
    }

    /// The number of the last take; 0 before the first.
    #[must_use]
    pub const fn changes(self) -> u32 {
        self.active - 1
    }

    /// The smallest number a client may ask "changed since" for.
    #[must_use]
    pub const fn oldest(self) -> u32 {
        if self.base == 0 {
            0
        } else {
            self.base + 1
        }
    }

    /// The byte a write puts into the live map: 1 to 255.
    #[must_use]
    #[allow(
        clippy::cast_possible_truncation,
        reason = "new() and after_take() keep it in 1..=255"
    )]
    pub const fn byte_for_active(self) -> u8 {
        (self.active - self.base) as u8
    }

    /// The byte a mark puts into the map of the last take: 0 to 254, 0 (marks nothing) before the first take.
    #[must_use]
    pub const fn byte_for_changes(self) -> u8 {
        self.byte_for_active() - 1
    }

    /// What the next take does.
    ///
    /// # Errors
    /// [`CbtError::Exhausted`] when `active` is the last number there is.
    pub const fn after_take(self) -> Result<TakePlan, CbtError> {
        let Some(active) = self.active.checked_add(1) else {
            return Err(CbtError::Exhausted);
        };
        let slides = self.byte_for_active() == u8::MAX;
        let base = if slides { self.base + SLIDE as u32 } else { self.base };
        Ok(TakePlan {
            numbers: Self { base, active },
            slides,
        })
    }

    /// The threshold of a query: the blocks changed since `since` are those whose byte is above it.
    ///
    /// # Errors
    /// [`CbtError::GenerationChanged`] unless `since` is from [`Self::oldest`] to [`Self::changes`]. A number that was
    /// never handed out is refused too: an empty answer to it would be a silent loss.
    #[allow(
        clippy::cast_possible_truncation,
        reason = "oldest() to changes() is base to base + 254"
    )]
    pub const fn threshold(self, since: u32) -> Result<u8, CbtError> {
        if since < self.oldest() || since > self.changes() {
            let (oldest, changes) = (self.oldest(), self.changes());
            return Err(CbtError::GenerationChanged { since, oldest, changes });
        }
        Ok((since - self.base) as u8)
    }
}

/// What a byte becomes when the window slides: 128 less, but a changed block stays changed.
#[must_use]
pub const fn slide(byte: u8) -> u8 {
    let lowered = byte.saturating_sub(SLIDE);
    if lowered == 0 {
        (byte != 0) as u8
    } else {
        lowered
    }
}

/// Fills `dst` with the bytes of `src` after a slide. Behind a closed gate; both are `block_count` bytes.
pub fn slide_into(src: &[AtomicU8], dst: &[AtomicU8]) {
    debug_assert_eq!(src.len(), dst.len());
    for (from, to) in src.iter().zip(dst) {
        to.store(slide(from.load(Relaxed)), Relaxed);
    }
}

/// Fills `dst` with the bytes of `src`. Behind a closed gate; both are `block_count` bytes.
pub fn copy_into(src: &[AtomicU8], dst: &[AtomicU8]) {
    debug_assert_eq!(src.len(), dst.len());
    for (from, to) in src.iter().zip(dst) {
        to.store(from.load(Relaxed), Relaxed);
    }
}

/// Fills `dst` with the bytes of `src`, the newest lowered to that of the last take: what stands in for the map of that
/// take when a saved live map is continued. It says at least what that map said. Both are `block_count` bytes.
pub fn lower_into(src: &[AtomicU8], dst: &[AtomicU8], numbers: Numbers) {
    debug_assert_eq!(src.len(), dst.len());
    let ceiling = numbers.byte_for_changes();
    for (from, to) in src.iter().zip(dst) {
        to.store(from.load(Relaxed).min(ceiling), Relaxed);
    }
}

/// Checks that a saved map can be continued with `numbers`.
///
/// # Errors
/// [`CbtError::MapByte`] at the first byte above the active number.
pub fn validate_map(map: &[AtomicU8], numbers: Numbers) -> Result<(), CbtError> {
    let newest = numbers.byte_for_active();
    for (block, cell) in map.iter().enumerate() {
        let byte = cell.load(Relaxed);
        if byte > newest {
            return Err(CbtError::MapByte { block, byte });
        }
    }
    Ok(())
}

/// Checks the whole list (offset and length in bytes) before anything of it may be marked.
///
/// # Errors
/// [`CbtError::EmptyRange`] for length 0, [`CbtError::PastEnd`] for an end past `size` or past 64 bits.
pub fn validate_ranges(ranges: &[(u64, u64)], size: u64) -> Result<(), CbtError> {
    for (index, &(offset, length)) in ranges.iter().enumerate() {
        if length == 0 {
            return Err(CbtError::EmptyRange { index });
        }
        if offset.checked_add(length).is_none_or(|end| end > size) {
            return Err(CbtError::PastEnd { index });
        }
    }
    Ok(())
}

/// Raises the bytes of `blocks` to `byte`; a byte never falls. Blocks outside the map are left out.
#[inline]
pub fn mark(map: &[AtomicU8], blocks: Range<usize>, byte: u8) {
    let end = blocks.end.min(map.len());
    for cell in map.get(blocks.start..end).unwrap_or_default() {
        // Most writes hit a block that is marked already: the plain load keeps its cache line shared.
        if cell.load(Relaxed) < byte {
            cell.fetch_max(byte, Relaxed);
        }
    }
}

/// Raises every byte to `byte`.
pub fn mark_all(map: &[AtomicU8], byte: u8) {
    mark(map, 0..map.len(), byte);
}

/// The runs of blocks at or after `from` whose byte is above `threshold`, in order, as long as possible.
pub fn changed_runs(map: &[AtomicU8], threshold: u8, from: usize) -> impl Iterator<Item = Range<usize>> + '_ {
    let mut next = from;
    std::iter::from_fn(move || {
        let rest = map.get(next..)?;
        let start = next + rest.iter().position(|cell| cell.load(Relaxed) > threshold)?;
        let run = map[start..].iter().position(|cell| cell.load(Relaxed) <= threshold);
        next = run.map_or(map.len(), |length| start + length);
        Some(start..next)
    })
}

#[cfg(test)]
mod tests;
