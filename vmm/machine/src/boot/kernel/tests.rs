use std::fs;

use proptest::prelude::*;
use vm_memory::Bytes;

use super::testing::{ADDRESS, ElfImage, bzimage, kernel, pack};
use super::*;

fn open(bytes: &[u8]) -> Result<Kernel, KernelError> {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), bytes).unwrap();
    Kernel::open(file.path(), BootProtocol::Auto)
}

fn message(bytes: &[u8]) -> String {
    open(bytes).unwrap_err().fault.to_string()
}

fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), 32 << 20)]).unwrap()
}

#[test]
fn an_elf_file_lands_where_its_segments_say() {
    let mut image = ElfImage::default();
    image.segments.push((ADDRESS + 0x10_0000, vec![7; 33], 100));
    let kernel = open(&image.build()).unwrap();
    assert_eq!((kernel.format(), kernel.end()), (Format::Elf, ADDRESS + 0x10_0000 + 100));
    let memory = memory();
    kernel.load(&memory).unwrap();
    let mut bytes = vec![0xff; 9000];
    memory.read_slice(&mut bytes, GuestAddress(ADDRESS)).unwrap();
    assert_eq!(bytes[..5000], image.segments[0].1);
    assert!(bytes[5000..].iter().all(|byte| *byte == 0));
    assert_eq!(memory.read_obj::<[u8; 2]>(GuestAddress(ADDRESS + 0x10_0020)).unwrap(), [7, 0]);
}

#[test]
fn a_bzimage_gives_the_same_memory_as_its_elf() {
    let image = ElfImage::default().build();
    // Relocations may follow the ELF.
    let content = [&image[..], &[0xaa; 200]].concat();
    for (name, compression) in [
        ("gzip", Compression::Gzip),
        ("zstd", Compression::Zstd),
        ("lz4", Compression::Lz4),
        ("xz", Compression::Xz),
    ] {
        let kernel = open(&bzimage(&pack(name, &content))).unwrap();
        assert_eq!(kernel.format(), Format::BzImage(compression));
        assert_eq!((kernel.entry().0, kernel.is_pvh()), (ADDRESS + 4, false));
        assert!(kernel.setup_header().is_some());
        let memory = memory();
        kernel.load(&memory).unwrap();
        let mut bytes = vec![0; 5000];
        memory.read_slice(&mut bytes, GuestAddress(ADDRESS)).unwrap();
        assert!(bytes == ElfImage::default().segments[0].1, "{name}");
    }
}

#[test]
fn formats_that_we_do_not_unpack_are_left_to_the_guest() {
    let bytes = bzimage(b"BZh91AY and so on");
    let kernel = open(&bytes).unwrap();
    assert_eq!(kernel.format(), Format::BzImage(Compression::InGuest("bzip2")));
    assert_eq!((kernel.entry().0, kernel.end()), (ADDRESS + 0x200, ADDRESS + 0x10_0000));
    let memory = memory();
    kernel.load(&memory).unwrap();
    let mut start = [0; 16];
    memory.read_slice(&mut start, GuestAddress(ADDRESS + 0x400)).unwrap();
    assert_eq!(&start, b"BZh91AY and so o");
    assert!(matches!(super::testing::kernel(bytes, BootProtocol::Pvh), Err(KernelFault::NoPvhEntry)));
}

#[test]
fn the_protocol_follows_the_notes() {
    let entry = (16u32 << 20).to_le_bytes();
    let plain = ElfImage::default();
    let xen = ElfImage::default().with_note("Xen", 18, &entry);
    let linux = xen.clone().with_note("Linux", 0x101, &[0]);
    let (auto, pvh) = (BootProtocol::Auto, BootProtocol::Pvh);
    let choice = |image: &ElfImage, protocol| {
        kernel(image.build(), protocol).map(|kernel| (kernel.is_pvh(), kernel.entry().0)).ok()
    };
    assert_eq!(choice(&plain, auto), Some((false, ADDRESS + 4)));
    assert_eq!(choice(&xen, auto), Some((true, ADDRESS)));
    assert_eq!(choice(&linux, auto), Some((false, ADDRESS + 4)));
    assert_eq!(choice(&xen, BootProtocol::Linux), Some((false, ADDRESS + 4)));
    assert_eq!(choice(&linux, pvh), Some((true, ADDRESS)));
    assert_eq!(choice(&plain, pvh), None);
    let packed = |protocol| kernel(bzimage(&pack("lz4", &xen.build())), protocol).unwrap().is_pvh();
    assert_eq!((packed(auto), packed(pvh)), (false, true));
}

#[test]
fn files_that_are_no_kernel_say_so() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("nothing");
    let error = Kernel::open(&missing, BootProtocol::Auto).unwrap_err();
    assert!(
        error.to_string().starts_with(&format!("kernel {}: cannot open it: No such file", missing.display()))
    );
    let error = Kernel::open(directory.path(), BootProtocol::Auto).unwrap_err();
    assert!(matches!(error.fault, KernelFault::NotRegular));
    let pipe = directory.path().join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    assert!(matches!(Kernel::open(&pipe, BootProtocol::Auto).unwrap_err().fault, KernelFault::NotRegular));

    assert!(message(b"").contains("the file is empty"));
    assert!(message(b"#!/bin/sh\n").contains("not a kernel"));
    assert!(message(&[0; 4096]).contains("not a kernel"));
    assert!(message(b"MZ\xea\x07").contains("truncated"));
    let mut arm = vec![0; 4096];
    arm[0x38..0x3c].copy_from_slice(b"ARM\x64");
    assert!(message(&arm).contains("built for ARM64"));
}

#[test]
fn payloads_that_are_no_kernel_say_so() {
    assert!(
        message(&bzimage(b"what is this?")).contains("packed in an unknown way (it starts with [77, 68, 61")
    );
    assert!(message(&bzimage(&pack("lz4", b"no ELF"))).contains("not an ELF kernel"));
    let arm = ElfImage { machine: 183, ..Default::default() };
    assert!(message(&bzimage(&pack("gzip", &arm.build()))).contains("ARM64"));
    let mut packed = pack("zstd", &ElfImage::default().build());
    let middle = packed.len() / 2;
    packed.truncate(middle);
    packed.extend(9000u32.to_le_bytes());
    assert!(message(&bzimage(&packed)).contains("its zstd payload does not unpack"));
    packed.extend([0xff; 4]);
    assert!(message(&bzimage(&packed)).contains("more than the 512 MiB"));
}

#[test]
fn too_little_memory_is_told_with_what_would_do() {
    let mut image = ElfImage::default();
    image.segments[0].2 = 40 << 20;
    let kernel = open(&image.build()).unwrap();
    let error = kernel.load(&memory()).unwrap_err().to_string();
    assert!(error.ends_with("needs memory up to 56 MiB, the guest has 32 MiB: give --memory 80M"), "{error}");
    kernel.check_fits(56 << 20).unwrap();
}

#[test]
fn a_file_that_shrinks_meanwhile_is_an_error() {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), ElfImage::default().build()).unwrap();
    let kernel = Kernel::open(file.path(), BootProtocol::Auto).unwrap();
    file.as_file().set_len(200).unwrap();
    assert!(matches!(kernel.load(&memory()).unwrap_err().fault, KernelFault::Copy(_)));
}

proptest! {
    #[test]
    fn mutated_bzimages_are_judged(
        format in prop::sample::select(vec!["gzip", "zstd", "lz4", "xz"]),
        changes in prop::collection::vec((0x1f0usize..0x270, any::<u8>()), 1..5),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = bzimage(&pack(format, &ElfImage::default().build()));
        for (at, value) in changes {
            bytes[at] = value;
        }
        let _ = kernel(bytes.clone(), BootProtocol::Auto);
        bytes.truncate(cut.index(bytes.len()));
        let _ = kernel(bytes, BootProtocol::Pvh);
    }

    #[test]
    fn any_bytes_are_judged(bytes in prop::collection::vec(any::<u8>(), 0..1500)) {
        let _ = kernel(bytes, BootProtocol::Auto);
    }
}
