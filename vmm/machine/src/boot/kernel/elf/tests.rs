use proptest::prelude::*;

use super::*;
use crate::boot::kernel::testing::{ADDRESS, ElfImage, note};

fn parse_bytes(bytes: Vec<u8>) -> Result<Elf, KernelFault> {
    parse(&Source::Bytes(bytes))
}

/// The message of the fault that `change` to a good image makes.
fn fault(change: impl FnOnce(&mut ElfImage)) -> String {
    let mut image = ElfImage::default();
    change(&mut image);
    parse_bytes(image.build()).unwrap_err().to_string()
}

#[test]
fn segments_entry_and_notes_are_found() {
    let mut image = ElfImage::default().with_note("Linux", 0x101, &[0]).with_note(
        "Xen",
        18,
        &(16u64 << 20).to_le_bytes(),
    );
    image.segments.insert(0, (ADDRESS + 0x10_0000, vec![1; 16], 64));
    image.segments.push((ADDRESS + 0x20_0000, Vec::new(), 0));
    let elf = parse_bytes(image.build()).unwrap();
    assert_eq!((elf.entry, elf.pvh_entry, elf.linux), (ADDRESS + 4, Some(ADDRESS), true));
    let places: Vec<_> = elf.segments.iter().map(|s| (s.address, s.file_size, s.memory_size)).collect();
    assert_eq!(places, [(ADDRESS, 5000, 9000), (ADDRESS + 0x10_0000, 16, 64)]);
}

#[test]
fn contradictions_are_named() {
    assert!(fault(|image| image.machine = 183).contains("built for ARM64"));
    assert!(fault(|image| image.machine = 3).contains("32-bit x86"));
    assert!(fault(|image| image.kind = 3).contains("not an executable linked to a fixed address"));
    assert!(fault(|image| image.segments.clear()).contains("no program headers"));
    assert!(fault(|image| image.entry = ADDRESS + 5000).contains("entry point"), "in the bss");
    assert!(fault(|image| image.segments[0].2 = 4999).contains("larger in the file"));
    assert!(fault(|image| image.segments[0].0 = 0x9000).contains("wants to be loaded at 0x9000"));
    assert!(fault(|image| image.segments[0].0 = 0xbfff_f000).contains("between 1 MiB and 3 GiB"));
    assert!(fault(|image| image.segments[0].2 = u64::MAX).contains("between 1 MiB and 3 GiB"));
    assert!(fault(|image| image.segments.push((ADDRESS + 8999, vec![0], 1))).contains("overlap"));
    assert!(fault(|image| image.segments = vec![(ADDRESS, vec![0], 1); 65]).contains("more program headers"));
    assert!(fault(|image| image.notes = note("GNU", 1, &[0; 16])).contains("a program for user space"));
    let outside = note("Xen", 18, &1u32.to_le_bytes());
    assert!(fault(|image| image.notes = outside).contains("PVH entry point"));
}

#[test]
fn every_cut_is_noticed() {
    let whole = ElfImage::default().with_note("Linux", 0x101, &[0]).build();
    for length in 0..whole.len() {
        let fault = parse_bytes(whole[..length].to_vec()).unwrap_err();
        match length {
            0..4 => assert!(matches!(fault, KernelFault::NotAKernel), "{length}: {fault}"),
            _ => assert!(matches!(fault, KernelFault::Truncated { .. }), "{length}: {fault}"),
        }
    }
}

#[test]
fn width_and_byte_order_come_first() {
    let mut bytes = ElfImage::default().build();
    bytes[5] = 2;
    assert!(parse_bytes(bytes.clone()).unwrap_err().to_string().contains("big-endian"));
    (bytes[4], bytes[5]) = (1, 1);
    assert!(parse_bytes(bytes).unwrap_err().to_string().contains("32-bit"));
}

#[test]
fn notes_stop_at_the_first_bad_one() {
    let mut bytes = note("Linux", 5, &[1, 2, 3]);
    bytes.extend([0xff; 40]);
    bytes.extend(note("Xen", 18, &[1, 0, 0, 0]));
    let mut notes = Notes::default();
    notes.read(&bytes, 4);
    assert_eq!(notes, Notes { linux: true, ..Default::default() });
    // A descriptor that is too short for an address is none; the last note may lack its padding.
    let mut notes = Notes::default();
    notes.read(&note("Xen", 18, &[1, 0]), 0);
    assert_eq!(notes.pvh_entry, None);
    let unpadded = note("Linux", 1, &[7]);
    notes.read(&unpadded[..unpadded.len() - 3], 4);
    assert!(notes.linux);
}

/// What [`parse`] promises, whatever it was given.
fn check(bytes: &[u8]) -> Result<(), TestCaseError> {
    let Ok(elf) = parse_bytes(bytes.to_vec()) else { return Ok(()) };
    for segment in &elf.segments {
        prop_assert!(segment.offset + segment.file_size <= bytes.len() as u64);
        prop_assert!(segment.address >= HIGH_RAM_START && segment.end() <= LOW_MEMORY_END);
    }
    prop_assert!(elf.segments.windows(2).all(|pair| pair[0].end() <= pair[1].address));
    let inside = |at| elf.segments.iter().any(|s| (s.address..s.end()).contains(&at));
    prop_assert!(inside(elf.entry) && elf.pvh_entry.is_none_or(inside));
    Ok(())
}

proptest! {
    #[test]
    fn any_notes_end(bytes in prop::collection::vec(any::<u8>(), 0..2000), alignment in any::<u64>()) {
        Notes::default().read(&bytes, alignment);
    }

    #[test]
    fn small_words_as_notes_end(words in prop::collection::vec(0u32..40, 0..500), alignment in 0u64..9) {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        Notes::default().read(&bytes, alignment);
    }

    #[test]
    fn any_bytes_after_the_magic_are_judged(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        check(&[b"\x7fELF\x02\x01", &bytes[..]].concat())?;
    }

    #[test]
    fn mutated_headers_are_judged(changes in prop::collection::vec((0usize..320, any::<u8>()), 1..8)) {
        let mut image = ElfImage::default().with_note("Xen", 18, &(16u32 << 20).to_le_bytes());
        image.segments.push((ADDRESS + 0x10_0000, vec![1; 16], 64));
        let mut bytes = image.build();
        for (at, value) in changes {
            bytes[at] = value;
        }
        check(&bytes)?;
    }
}
