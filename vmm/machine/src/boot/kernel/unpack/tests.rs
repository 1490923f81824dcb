use proptest::prelude::*;

use super::*;
use crate::boot::kernel::testing::pack;

const FORMATS: [(&str, Compression); 4] = [
    ("gzip", Compression::Gzip),
    ("zstd", Compression::Zstd),
    ("lz4", Compression::Lz4),
    ("xz", Compression::Xz),
];

/// Something that packs, with calls in it for the x86 filter to change.
fn content(length: usize) -> Vec<u8> {
    (0..length).map(|n| if n % 7 == 0 { 0xe8 } else { (n / 300).to_le_bytes()[0] }).collect()
}

#[test]
fn every_format_gives_back_what_was_packed() {
    let content = content(300_000);
    for (name, compression) in FORMATS {
        let packed = pack(name, &content);
        assert_eq!(Compression::detect(&packed), Some(compression), "{name}");
        assert!(packed.len() < content.len() / 2, "{name}");
        assert!(unpack(&packed, compression).unwrap() == content, "{name}");
    }
}

#[test]
fn lz4_goes_on_with_the_next_block_and_the_next_frame() {
    let content = content((8 << 20) + 100_000);
    assert!(unpack(&pack("lz4", &content), Compression::Lz4).unwrap() == content);
    let (one, two) = content.split_at(70_000);
    let mut frames = pack("lz4", one);
    frames.truncate(frames.len() - 4);
    frames.extend(pack("lz4", two));
    let end = frames.len() - 4;
    frames[end..].copy_from_slice(&u32::try_from(content.len()).unwrap().to_le_bytes());
    assert!(unpack(&frames, Compression::Lz4).unwrap() == content);
}

#[test]
fn cut_and_damaged_payloads_are_refused() {
    let content = content(20_000);
    for (name, compression) in FORMATS {
        let packed = pack(name, &content);
        let trailer = packed.len() - 4;
        for cut in [0, 3, 4, 9, trailer / 2, trailer - 1] {
            let mut bytes = packed[..cut].to_vec();
            bytes.extend(&packed[trailer..]);
            let fault = unpack(&bytes, compression).unwrap_err();
            assert!(matches!(fault, KernelFault::Unpack { .. }), "{name} cut at {cut}: {fault}");
        }
        for (announced, kind) in
            [(19_999u32, "Unpack"), (20_001, "Unpack"), (0, "Unpack"), (u32::MAX, "Endless")]
        {
            let mut bytes = packed.clone();
            bytes[trailer..].copy_from_slice(&announced.to_le_bytes());
            let fault = unpack(&bytes, compression).unwrap_err();
            assert!(format!("{fault:?}").starts_with(kind), "{name} announcing {announced}: {fault}");
        }
    }
}

#[test]
fn foreign_and_in_guest_formats_are_told_apart() {
    assert_eq!(Compression::detect(b"BZh91AY"), Some(Compression::InGuest("bzip2")));
    assert_eq!(Compression::detect(&[0x5d, 0, 0, 0x80]), Some(Compression::InGuest("lzma")));
    assert_eq!(Compression::detect(b"\x89LZO\0"), Some(Compression::InGuest("lzo")));
    assert_eq!(Compression::detect(b"\x7fELF"), None);
    assert_eq!(Compression::detect(b""), None);
}

proptest! {
    #[test]
    fn mutated_payloads_neither_panic_nor_grow(
        format in 0usize..4,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let (name, compression) = FORMATS[format];
        let mut packed = pack(name, &content(5000));
        // The size stays: it only changes how much is allocated.
        let size = packed.len() - 4;
        for (at, value) in changes {
            packed[at.index(size)] = value;
        }
        if let Ok(bytes) = unpack(&packed, compression) {
            prop_assert_eq!(bytes.len(), 5000);
        }
    }

    #[test]
    fn any_bytes_after_a_magic_are_judged(format in 0usize..4, bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let (name, compression) = FORMATS[format];
        let mut packed = pack(name, b"x");
        packed.truncate(6);
        packed.extend(bytes);
        packed.extend(4096u32.to_le_bytes());
        let _ = unpack(&packed, compression);
    }
}
