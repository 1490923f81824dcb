use std::io::Write;

use vm_memory::Bytes;

use super::*;

#[test]
fn writes_are_marked_where_they_are_tracked() {
    let ranges = [(GuestAddress(0), 0x10_0000), (GuestAddress(0x100_0000), 0x2000)];
    let memory = anonymous(&ranges, true).unwrap();
    let dirty = |first, second| {
        let region = |start, words, pages: u64| {
            let mut all = vec![0; words];
            all[0] = pages;
            DirtyRegion { start: GuestAddress(start), pages: all }
        };
        vec![region(0, 4, first), region(0x100_0000, 1, second)]
    };
    assert_eq!(take_dirty_pages(&memory), dirty(0, 0));
    memory.write_slice(&[1; 2], GuestAddress(0x2fff)).unwrap();
    memory.write_obj(7u32, GuestAddress(0x100_1000)).unwrap();
    let _: u32 = memory.read_obj(GuestAddress(0x5000)).unwrap();
    assert_eq!(take_dirty_pages(&memory), dirty(0b1100, 0b10));
    assert_eq!(take_dirty_pages(&memory), dirty(0, 0), "taken is clean");
    let memory = anonymous(&ranges, false).unwrap();
    memory.write_slice(&[1; 2], GuestAddress(0x2fff)).unwrap();
    assert_eq!(take_dirty_pages(&memory), vec![]);
}

#[test]
fn a_file_is_read_and_never_written() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[7; 0x3000]).unwrap();
    let file = Arc::new(file);
    let backing = |offset| Backing::Private { file: file.clone(), offset };
    let build = |offset| of([(GuestAddress(0x1000), 0x2000, backing(offset))], true);
    let (one, other) = (build(0x1000).unwrap(), build(0x1000).unwrap());
    one.write_slice(&[9; 16], GuestAddress(0x2000)).unwrap();
    assert_eq!(one.read_obj::<u64>(GuestAddress(0x1000)).unwrap(), 0x0707_0707_0707_0707);
    assert_eq!(one.read_obj::<u8>(GuestAddress(0x2000)).unwrap(), 9);
    assert_eq!(other.read_obj::<u8>(GuestAddress(0x2000)).unwrap(), 7, "each has its own");
    assert_eq!(take_dirty_pages(&one)[0].pages, [0b10]);
    assert!(matches!(build(0x2000), Err(MemoryError::Short { have: 0x3000, need: 0x4000 })));
    assert!(matches!(build(u64::MAX), Err(MemoryError::Short { .. })));
    assert!(matches!(build(0x801), Err(MemoryError::Map { .. })), "not on a page");
    assert!(matches!(of([], true), Err(MemoryError::Layout(_))));
    let twice = [(GuestAddress(0), 0x2000), (GuestAddress(0x1000), 0x2000)];
    assert!(matches!(anonymous(&twice, false), Err(MemoryError::Layout(_))));
}
