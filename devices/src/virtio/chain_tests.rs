use vm_memory::Bytes;

use super::*;
use crate::testing::memory;

fn segment(address: u64, len: u32, writable: bool) -> Segment {
    Segment { address: GuestAddress(address), len, writable }
}

#[test]
fn reads_across_buffers_and_counts_what_it_writes() {
    let memory = memory(0x10000);
    memory.write_slice(b"hello ", GuestAddress(0x100)).unwrap();
    memory.write_slice(b"world", GuestAddress(0x200)).unwrap();
    let segments = [
        segment(0x100, 6, false),
        segment(0x300, 0, false),
        segment(0x200, 5, false),
        segment(0x400, 3, true),
        segment(0x500, 9, true),
    ];
    let mut chain = Chain::new(7, memory.clone(), &segments).unwrap();
    let mut data = [0; 8];
    chain.reader.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"hello wo");
    assert_eq!(chain.reader.remaining(), 3);
    assert_eq!(chain.reader.read_exact(&mut data), Err(ChainError::Short { missing: 5 }));
    assert_eq!(chain.reader.remaining(), 3, "a short read consumes nothing");
    chain.writer.write_all(b"abcdef").unwrap();
    assert_eq!((chain.used_len(), chain.writer.remaining()), (6, 6));
    let mut written = [0; 3];
    memory.read_slice(&mut written, GuestAddress(0x500)).unwrap();
    assert_eq!(&written, b"def");
    assert_eq!(chain.writer.write_all(&[0; 7]), Err(ChainError::Short { missing: 1 }));
}

#[test]
fn a_tail_counts_when_rejoined() {
    let memory = memory(0x10000);
    let mut chain =
        Chain::new(0, memory.clone(), &[segment(0x100, 4, true), segment(0x200, 4, true)]).unwrap();
    let mut tail = chain.writer.split_off(5).unwrap();
    assert_eq!((chain.writer.remaining(), tail.remaining()), (5, 3));
    tail.write_all(b"xyz").unwrap();
    assert_eq!(chain.used_len(), 0);
    chain.writer.rejoin(&tail);
    assert_eq!(chain.used_len(), 3);
    let mut end = [0; 3];
    memory.read_slice(&mut end, GuestAddress(0x201)).unwrap();
    assert_eq!(&end, b"xyz");
    assert!(chain.writer.split_off(6).is_err());
}

#[test]
fn io_consumes_what_it_took() {
    let memory = memory(0x10000);
    let mut chain = Chain::new(0, memory, &[segment(0x100, 4, false), segment(0x200, 4, false)]).unwrap();
    let took = chain.reader.read_with(7, |slices| {
        assert_eq!(slices.iter().map(|s| s.len()).collect::<Vec<_>>(), [4, 3]);
        Ok(5)
    });
    assert_eq!(took.unwrap(), 5);
    assert_eq!(chain.reader.remaining(), 3);
    assert!(chain.reader.read_with(3, |_| Err(io::ErrorKind::Other.into())).is_err());
    assert_eq!(chain.reader.remaining(), 3, "a failure consumes nothing");
    chain.reader.skip(99);
    assert_eq!(chain.reader.remaining(), 0);
}

#[test]
fn refuses_what_breaks_the_rules() {
    let memory = memory(0x10000);
    let cases = [
        (vec![segment(0xffff, 2, false)], ChainError::OutsideMemory { head: 3, address: 0xffff, len: 2 }),
        (vec![segment(u64::MAX, 2, true)], ChainError::OutsideMemory { head: 3, address: u64::MAX, len: 2 }),
        (vec![segment(0, 1, true), segment(8, 1, false)], ChainError::Order { head: 3 }),
    ];
    for (segments, expected) in cases {
        assert_eq!(Chain::new(3, memory.clone(), &segments).err(), Some(expected));
    }
    let huge = crate::memory::GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 31)]).unwrap();
    let segments = [segment(0, 1 << 31, true), segment(0, 1 << 31, true)];
    assert_eq!(Chain::new(3, Arc::new(huge), &segments).err(), Some(ChainError::TooLong { head: 3 }));
}
