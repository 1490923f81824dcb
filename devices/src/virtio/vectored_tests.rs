use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixStream;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::*;
use crate::memory::{self, GuestMemory};
use crate::testing;

/// Twelve pages of memory from page 2 on, in three slices; then what `io` made of it: its result and the dirty pages.
fn with_slices<T>(io: impl FnOnce(&GuestMemory, &[Slice<'_>]) -> T) -> (T, u64) {
    let memory = testing::memory(0x10_0000);
    let slice = |page: u64, len| memory.get_slices(GuestAddress(page << 12), len).next().unwrap().unwrap();
    let slices = [slice(2, 0x1800), slice(5, 0x10), slice(8, 0x4000)];
    let result = io(&memory, &slices);
    (result, memory::take_dirty_pages(&memory)[0].pages[0])
}

fn file(len: usize) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&vec![7; len]).unwrap();
    file
}

#[test]
fn what_the_kernel_wrote_is_marked_and_no_more() {
    let cases = [
        (0, 0),
        (1, 0b100),
        (0x1000, 0b100),
        (0x1001, 0b1100),
        (0x1800, 0b1100),
        (0x1801, 0b10_1100),
        (0x1810, 0b10_1100),
        (0x1811, 0b1_0010_1100),
        (0x9999, 0b1111_0010_1100),
    ];
    for (len, dirty) in cases {
        let read = len.min(0x5810);
        let file = file(len);
        assert_eq!(with_slices(|_, slices| read_at(&file, slices, 0).unwrap()), (read, dirty), "{len:#x}");
        let (mut from, to) = UnixStream::pair().unwrap();
        from.write_all(&vec![7; len]).unwrap();
        drop(from);
        assert_eq!(with_slices(|_, slices| super::read(&to, slices).unwrap()), (read, dirty), "{len:#x}");
    }
    let nothing = File::options().write(true).open("/dev/null").unwrap();
    assert_eq!(with_slices(|_, slices| read_at(&nothing, slices, 0).is_err()), (true, 0));
    assert_eq!(with_slices(|_, slices| write(&nothing, slices).unwrap()), (0x5810, 0));
    let target = file(0);
    assert_eq!(with_slices(|_, slices| write_at(&target, slices, 5).unwrap()), (0x5810, 0));
}

#[test]
fn what_does_not_fit_spills() {
    let (mut from, to) = UnixStream::pair().unwrap();
    from.write_all(&[7; 0x5810]).unwrap();
    from.write_all(b"rest").unwrap();
    let mut spill = [0; 8];
    let (outcome, dirty) = with_slices(|memory, slices| {
        let read = read_spilling(&to, slices, &mut spill).unwrap();
        (read, memory.read_obj::<u8>(GuestAddress(0xbfff)).unwrap())
    });
    assert_eq!((outcome, dirty, &spill), ((0x5814, 7), 0b1111_0010_1100, b"rest\0\0\0\0"));
}
