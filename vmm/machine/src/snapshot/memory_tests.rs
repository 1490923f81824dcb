use std::os::unix::fs::MetadataExt;

use super::*;

const MIB: u64 = 1 << 20;

fn memory() -> GuestMemory {
    devices::memory::anonymous(&[(GuestAddress(0), 4 << 20), (GuestAddress(1 << 32), 2 << 20)], false)
        .unwrap()
}

fn fill(memory: &GuestMemory, address: u64, byte: u8) {
    memory.write_slice(&[byte; PAGE_BYTES], GuestAddress(address)).unwrap();
}

fn id(byte: u8) -> SnapshotId {
    SnapshotId([byte; 16])
}

#[test]
fn what_is_saved_is_mapped_again_and_never_written_to() {
    let memory = memory();
    for (address, byte) in [(0, 1), (3 * PAGE, 3), (1 << 32, 7), ((1 << 32) + 2 * MIB - PAGE, 9)] {
        fill(&memory, address, byte);
    }
    fill(&memory, 5 * PAGE, 0);
    let file = tempfile::tempfile().unwrap();
    let saved = save(&memory, &file, id(1)).unwrap();
    assert_eq!(saved.bytes, 4 * PAGE);
    assert_eq!(checksum(&file, 6 * MIB).unwrap(), saved.crc);
    assert!(file.metadata().unwrap().blocks() * 512 < MIB, "sparse");
    assert!(belongs(&file, id(1), 6 * MIB).unwrap());
    assert!(!belongs(&file, id(2), 6 * MIB).unwrap());
    assert!(!belongs(&file, id(1), 5 * MIB).unwrap());

    let ranges = [(GuestAddress(0), 4 << 20), (GuestAddress(1 << 32), 2 << 20)];
    let copy = map(&file, &ranges, false).unwrap();
    for (address, byte) in [(0, 1u8), (PAGE, 0), (3 * PAGE, 3), (1 << 32, 7), ((1 << 32) + 2 * MIB - 1, 9)] {
        assert_eq!(copy.read_obj::<u8>(GuestAddress(address)).unwrap(), byte, "{address:#x}");
    }
    // A snapshot of the copy has what was changed and what was never touched.
    fill(&copy, 8 * PAGE, 8);
    fill(&copy, 0, 0);
    let second = tempfile::tempfile().unwrap();
    assert_eq!(save(&copy, &second, id(2)).unwrap().bytes, 4 * PAGE);
    let again = map(&second, &ranges, false).unwrap();
    for (address, byte) in [(0, 0u8), (3 * PAGE, 3), (8 * PAGE, 8), (1 << 32, 7)] {
        assert_eq!(again.read_obj::<u8>(GuestAddress(address)).unwrap(), byte, "{address:#x}");
    }
    assert_eq!(checksum(&file, 6 * MIB).unwrap(), saved.crc, "the first file is as it was");
}

#[test]
fn a_diff_goes_over_its_parent() {
    let memory = memory();
    fill(&memory, 0, 1);
    fill(&memory, PAGE, 2);
    let base = tempfile::tempfile().unwrap();
    save(&memory, &base, id(1)).unwrap();
    fill(&memory, PAGE, 0);
    fill(&memory, 1 << 32, 5);
    let runs = [Run { start: 1, count: 1 }, Run { start: 1024, count: 1 }];
    let diff = tempfile::tempfile().unwrap();
    assert_eq!(save_diff(&memory, &diff, id(2), &runs).unwrap().bytes, 2 * PAGE);
    let ranges = [(GuestAddress(0), 4 << 20), (GuestAddress(1 << 32), 2 << 20)];
    let copy = map(&base, &ranges, false).unwrap();
    apply_diff(&copy, &diff, &runs).unwrap();
    for (address, byte) in [(0, 1u8), (PAGE, 0), (1 << 32, 5)] {
        assert_eq!(copy.read_obj::<u8>(GuestAddress(address)).unwrap(), byte);
    }
    for wrong in
        [Run { start: 1536, count: 1 }, Run { start: u64::MAX, count: 2 }, Run { start: 0, count: u64::MAX }]
    {
        assert!(apply_diff(&copy, &diff, &[wrong]).is_err());
    }
}

#[test]
fn runs_are_united() {
    let run = |start, count| Run { start, count };
    let a = [run(0, 2), run(10, 5)];
    let b = [run(2, 1), run(12, 1), run(14, 3), run(30, 1)];
    assert_eq!(union(&a, &b), [run(0, 3), run(10, 7), run(30, 1)]);
}

#[test]
fn work_is_shared_out_evenly_and_in_order() {
    let run = |start, count| Run { start, count };
    assert_eq!(split(&[run(0, 10)], 3), [vec![run(0, 4)], vec![run(4, 4)], vec![run(8, 2)]]);
    assert_eq!(split(&[run(0, 1), run(5, 3), run(9, 4)], 2), [vec![run(0, 1), run(5, 3)], vec![run(9, 4)]]);
    assert_eq!(split(&[], 4), [vec![]]);
    assert_eq!(split(&[run(7, 2)], 1), [vec![run(7, 2)]]);
}
