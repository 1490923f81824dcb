use super::*;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

#[test]
fn ram_is_split_at_the_hole() {
    let cases: [(u64, &[(u64, u64)]); 5] = [
        (32 * MIB, &[(0, 32 * MIB)]),
        (3 * GIB, &[(0, 3 * GIB)]),
        (3 * GIB + PAGE_SIZE, &[(0, 3 * GIB), (4 * GIB, PAGE_SIZE)]),
        (5 * GIB, &[(0, 3 * GIB), (4 * GIB, 2 * GIB)]),
        (64 * GIB, &[(0, 3 * GIB), (4 * GIB, 61 * GIB)]),
    ];
    for (size, expected) in cases {
        let regions: Vec<(u64, u64)> =
            memory_regions(size).unwrap().into_iter().map(|(at, len)| (at.0, len as u64)).collect();
        assert_eq!(regions, expected, "{size:#x}");
        assert_eq!(regions.iter().map(|(_, len)| len).sum::<u64>(), size);
    }
}

#[test]
fn the_map_tells_of_the_same_ram_without_the_pc_area() {
    for size in [32 * MIB, 3 * GIB, 3 * GIB + PAGE_SIZE, 5 * GIB, 64 * GIB] {
        let map = e820(size).unwrap();
        assert!(map.windows(2).all(|pair| pair[0].addr + pair[0].size <= pair[1].addr), "{size:#x}");
        let ram: u64 = map.iter().map(|entry| entry.size).sum();
        assert_eq!(ram, size - (HIGH_RAM_START - LOW_RAM_END), "{size:#x}");
        let last = map.last().unwrap();
        let (start, len) = memory_regions(size).unwrap().pop().unwrap();
        assert_eq!(last.addr + last.size, start.0 + len as u64);
    }
    assert_eq!(e820(32 * MIB).unwrap().len(), 2);
    assert_eq!(e820(5 * GIB).unwrap().len(), 3);
}

#[test]
fn sizes_that_cannot_be_are_refused() {
    assert_eq!(memory_regions(0), Err(LayoutError::TooSmall(0)));
    assert_eq!(memory_regions(32 * MIB - PAGE_SIZE), Err(LayoutError::TooSmall(32 * MIB - PAGE_SIZE)));
    assert_eq!(memory_regions(64 * MIB + 1), Err(LayoutError::NotPages(64 * MIB + 1)));
    assert_eq!(e820(u64::MAX), Err(LayoutError::TooLarge(u64::MAX)));
    assert_eq!(e820(64 * MIB + 512), Err(LayoutError::NotPages(64 * MIB + 512)));
}

#[test]
fn windows_follow_each_other_up_to_the_ioapic() {
    assert_eq!(virtio_mmio(0), Some(GuestAddress(0xd000_0000)));
    assert_eq!(virtio_mmio(1), Some(GuestAddress(0xd000_1000)));
    assert_eq!(virtio_mmio(0x2_ebff), Some(GuestAddress(0xfebf_f000)));
    assert_eq!(virtio_mmio(0x2_ec00), None);
    assert_eq!(virtio_mmio(usize::MAX), None);
}

#[test]
fn our_tables_do_not_overlap() {
    let tables = [
        (GDT.0, 0x100),
        (PVH_START_INFO.0, 0x100),
        (PVH_MODULES.0, 0x100),
        (PVH_MEMORY_MAP.0, 0xe00),
        (ZERO_PAGE.0, PAGE_SIZE),
        (0x8000, PAGE_SIZE),
        (PML4.0, PAGE_SIZE),
        (PDPT.0, PAGE_SIZE),
        (PAGE_DIRECTORY.0, PAGE_DIRECTORIES * PAGE_SIZE),
        (COMMAND_LINE.0, COMMAND_LINE_MAX as u64),
        (LOW_RAM_END, 0),
        (SETUP_DATA.0, 0x100),
        (MP_TABLE.0, MP_TABLE_SIZE),
        (HIGH_RAM_START, 0),
    ];
    assert!(tables.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "{tables:x?}");
}
