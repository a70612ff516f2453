// SPDX-License-Identifier: GPL-2.0-or-later
//! Each rule alone; all of them together, against the reference: `tests/cbt_vectors.rs`.

use super::*;

fn map_of(bytes: &[u8]) -> Vec<AtomicU8> {
    bytes.iter().copied().map(AtomicU8::new).collect()
}

fn bytes_of(map: &[AtomicU8]) -> Vec<u8> {
    map.iter().map(|cell| cell.load(Relaxed)).collect()
}

#[test]
fn block_size_follows_the_table() {
    const GIB: u64 = 1 << 30;
    let table = [
        (1, 64 << 10, 1),
        (GIB, 64 << 10, 16_384),
        (128 * GIB, 64 << 10, 2_097_152),
        (128 * GIB + 1, 128 << 10, 1_048_577),
        (1024 * GIB, 512 << 10, 2_097_152),
        (1 << 47, 64 << 20, 2_097_152),
        (1 << 50, 64 << 20, 16_777_216),
    ];
    for (size, block_size, count) in table {
        let geometry = Geometry::new(size, 0).unwrap();
        assert_eq!(
            (geometry.block_size(), geometry.block_count()),
            (block_size, count),
            "size {size}"
        );
    }
}

#[test]
fn impossible_sizes_are_refused() {
    assert_eq!(block_size_for(0, 0), Err(CbtError::Size(0)));
    assert_eq!(block_size_for(u64::MAX, 0), Err(CbtError::Size(u64::MAX)));
    for requested in [1, 512, 2048, 4097, 128 << 20, u64::MAX] {
        assert_eq!(block_size_for(1 << 30, requested), Err(CbtError::BlockSize(requested)));
    }
    assert_eq!(block_size_for(1 << 42, 4096), Ok(4096));
    assert_eq!(
        block_size_for((1 << 42) + 1, 4096),
        Err(CbtError::TooManyBlocks((1 << 30) + 1))
    );
}

#[test]
fn blocks_are_widened_and_clipped() {
    let geometry = Geometry::new(10_000, 4096).unwrap();
    assert_eq!(geometry.block_count(), 3);
    assert_eq!(geometry.blocks(4095, 2), 0..2);
    assert_eq!(geometry.blocks(4096, 4096), 1..2);
    assert_eq!(geometry.blocks(0, u64::MAX), 0..3);
    assert_eq!(geometry.blocks(9_999, u64::MAX), 2..3);
    assert_eq!(geometry.blocks(4096, 0), 0..0);
    assert_eq!(geometry.blocks(10_000, 1), 0..0);
    assert_eq!(geometry.bytes(&(1..3)), (4096, 5904));
}

#[test]
fn numbers_slide_instead_of_wrapping() {
    let mut numbers = Numbers::START;
    let mut slides = 0;
    for take in 1..=1000 {
        let plan = numbers.after_take().unwrap();
        slides += u32::from(plan.slides);
        numbers = plan.numbers;
        assert_eq!(numbers.changes(), take);
        assert_eq!(numbers.base() % 128, 0);
        assert_eq!(u32::from(numbers.byte_for_active()), numbers.active() - numbers.base());
        assert!(take < 255 || take - numbers.oldest() >= 126);
        assert_eq!(Numbers::new(numbers.base(), numbers.active()), Ok(numbers));
    }
    assert_eq!((slides, numbers.base(), numbers.oldest()), (6, 768, 769));
}

#[test]
fn impossible_numbers_are_refused() {
    for (base, active) in [(0, 0), (0, 256), (1, 2), (128, 128), (128, 255), (128, 384), (256, 1)] {
        assert_eq!(Numbers::new(base, active), Err(CbtError::Numbers { base, active }));
    }
}

#[test]
fn the_last_number_is_never_passed() {
    let last = Numbers::new(u32::MAX - 255, u32::MAX).unwrap();
    assert_eq!(last.after_take(), Err(CbtError::Exhausted));
}

#[test]
fn a_number_outside_the_window_is_refused() {
    let numbers = Numbers::new(128, 256).unwrap();
    assert_eq!((numbers.oldest(), numbers.changes()), (129, 255));
    assert_eq!(numbers.threshold(129), Ok(1));
    assert_eq!(numbers.threshold(255), Ok(127));
    for since in [0, 128, 256, u32::MAX] {
        assert!(numbers.threshold(since).is_err(), "since {since}");
    }
    assert_eq!(Numbers::START.threshold(0), Ok(0));
    assert!(Numbers::START.threshold(1).is_err());
}

#[test]
fn a_slide_keeps_every_change_and_every_order_above_the_oldest() {
    let every: Vec<u8> = (0..=255).collect();
    let src = map_of(&every);
    let dst = map_of(&[7; 256]);
    slide_into(&src, &dst);
    let slid = bytes_of(&dst);
    assert_eq!(slid[0], 0);
    assert!(slid[1..=129].iter().all(|&byte| byte == 1));
    assert!((130..=255u8).all(|byte| slid[usize::from(byte)] == byte - 128));
    assert_eq!(bytes_of(&src), every);
}

#[test]
fn a_range_list_is_refused_whole() {
    let good = (0, 1);
    assert_eq!(validate_ranges(&[], 100), Ok(()));
    assert_eq!(validate_ranges(&[good, (99, 1)], 100), Ok(()));
    assert_eq!(
        validate_ranges(&[good, (5, 0)], 100),
        Err(CbtError::EmptyRange { index: 1 })
    );
    for bad in [(100, 1), (0, 101), (u64::MAX, 1), (1, u64::MAX), (u64::MAX, u64::MAX)] {
        assert_eq!(
            validate_ranges(&[good, good, bad], 100),
            Err(CbtError::PastEnd { index: 2 })
        );
    }
}

#[test]
fn a_mark_only_raises_and_stays_inside() {
    let map = map_of(&[0, 5, 9, 0]);
    mark(&map, 0..3, 7);
    assert_eq!(bytes_of(&map), [7, 7, 9, 0]);
    mark(&map, 3..100, 2);
    mark(&map, 50..60, 9);
    assert_eq!(bytes_of(&map), [7, 7, 9, 2]);
    mark_all(&map, 8);
    assert_eq!(bytes_of(&map), [8, 8, 9, 8]);
}

#[test]
fn a_saved_map_must_not_be_newer_than_itself() {
    let map = map_of(&[0, 3, 2]);
    assert_eq!(validate_map(&map, Numbers::new(0, 3).unwrap()), Ok(()));
    let refused = validate_map(&map, Numbers::new(0, 2).unwrap());
    assert_eq!(refused, Err(CbtError::MapByte { block: 1, byte: 3 }));
}

#[test]
fn runs_are_maximal_and_ordered() {
    let map = map_of(&[2, 2, 1, 3, 0, 0, 2]);
    let runs = |threshold, from| changed_runs(&map, threshold, from).collect::<Vec<_>>();
    assert_eq!(runs(1, 0), [0..2, 3..4, 6..7]);
    assert_eq!(runs(0, 1), [1..4, 6..7]);
    assert_eq!(runs(1, 7), []);
    assert_eq!(runs(1, 99), []);
    assert_eq!(runs(3, 0), []);
}
