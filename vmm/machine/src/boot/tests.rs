use linux_loader::loader::bootparam::boot_params;
use linux_loader::start_info::hvm_start_info;

use super::kernel::testing::{ADDRESS, ElfImage, bzimage, kernel, pack};
use super::*;
use crate::config::BootProtocol;

const MIB: u64 = 1 << 20;

fn memory(size: u64) -> GuestMemory {
    GuestMemory::from_ranges(&layout::memory_regions(size).unwrap()).unwrap()
}

fn elf() -> Kernel {
    kernel(ElfImage::default().build(), BootProtocol::Auto).unwrap()
}

fn line(text: &str) -> Cmdline {
    let mut line = Cmdline::new();
    line.push(text).unwrap();
    line
}

#[test]
fn a_linux_guest_finds_everything() {
    let memory = memory(64 * MIB);
    let initramfs: Vec<u8> = (0..10_001u32).map(|n| n.to_le_bytes()[0]).collect();
    let entry = install(&memory, &elf(), Some(&initramfs), &line("quiet panic=1"), 2).unwrap();
    assert_eq!(entry, EntryPoint::Linux64 { rip: GuestAddress(ADDRESS + 4) });

    let params: boot_params = memory.read_obj(layout::ZERO_PAGE).unwrap();
    let (at, size) = ({ params.hdr.ramdisk_image }, { params.hdr.ramdisk_size });
    assert_eq!((at, size), (0x3ff_d000, 10_001));
    let mut found = vec![0; initramfs.len()];
    memory.read_slice(&mut found, GuestAddress(at.into())).unwrap();
    assert!(found == initramfs);
    let text: [u8; 14] = memory.read_obj(GuestAddress({ params.hdr.cmd_line_ptr }.into())).unwrap();
    assert_eq!(&text, b"quiet panic=1\0");
    assert_eq!(params.e820_entries, 2);
    let mut seed = [0; 48];
    memory.read_slice(&mut seed, GuestAddress(params.hdr.setup_data)).unwrap();
    assert_eq!((seed[8], seed[12]), (9, 32));
    assert!(seed[16..].iter().any(|byte| *byte != 0));
    assert_eq!(&memory.read_obj::<[u8; 4]>(layout::MP_TABLE).unwrap(), b"_MP_");
    assert_eq!(memory.read_obj::<u64>(layout::PML4).unwrap(), layout::PDPT.0 | 3);
    assert_eq!(
        memory.read_obj::<u64>(GuestAddress(ADDRESS)).unwrap().to_le_bytes(),
        [0, 1, 2, 3, 4, 5, 6, 7]
    );
}

#[test]
fn a_pvh_guest_finds_everything() {
    let image = ElfImage::default().with_note("Xen", 18, &(16u32 << 20).to_le_bytes());
    let kernel = kernel(image.build(), BootProtocol::Auto).unwrap();
    let memory = memory(5 << 30);
    let entry = install(&memory, &kernel, Some(b"cpio"), &line("x"), 64).unwrap();
    assert_eq!(entry, EntryPoint::Pvh { rip: GuestAddress(ADDRESS) });
    let info: hvm_start_info = memory.read_obj(layout::PVH_START_INFO).unwrap();
    assert_eq!((info.memmap_entries, info.nr_modules), (3, 1));
    let module: u64 = memory.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
    assert_eq!(module, 0x7fff_f000);
    assert_eq!(&memory.read_obj::<[u8; 4]>(GuestAddress(module)).unwrap(), b"cpio");
    assert_eq!(&memory.read_obj::<[u8; 2]>(GuestAddress(info.cmdline_paddr)).unwrap(), b"x\0");
}

#[test]
fn the_initramfs_lies_as_high_as_it_may() {
    let mut low = bzimage(&pack("lz4", &ElfImage::default().build()));
    low[0x22c..0x230].copy_from_slice(&0x1fff_ffff_u32.to_le_bytes());
    let low = kernel(low, BootProtocol::Auto).unwrap();
    for (kernel, memory, size, expected) in [
        (&elf(), 64 * MIB, 1, 64 * MIB - 4096),
        (&elf(), 64 * MIB, 4096, 64 * MIB - 4096),
        (&elf(), 64 * MIB, 4097, 64 * MIB - 8192),
        (&elf(), 5 << 30, 4096, (2 << 30) - 4096),
        (&low, 64 * MIB, 4096, 64 * MIB - 4096),
        (&low, 1 << 30, 4096, 512 * MIB - 4096),
    ] {
        assert_eq!(place(kernel, size, memory).unwrap().0, expected, "{memory:#x} {size}");
    }
}

#[test]
fn what_does_not_fit_is_told_with_what_would_do() {
    let kernel = elf();
    place(&kernel, 16 * MIB - 3 * 4096, 32 * MIB).unwrap();
    let error = place(&kernel, 16 * MIB, 32 * MIB).unwrap_err().to_string();
    assert_eq!(
        error,
        "initramfs of 16384 KiB does not fit between the kernel's end at 0x1003000 and 0x2000000: give --memory 80M"
    );
    place(&kernel, 16 * MIB, 80 * MIB).unwrap();
    assert!(matches!(place(&kernel, 3 << 30, 8 << 30), Err(BootError::InitramfsTooLarge { .. })));
    assert!(matches!(place(&kernel, u64::MAX, 8 << 30), Err(BootError::InitramfsTooLarge { .. })));
}

#[test]
fn impossible_machines_are_refused() {
    let memory = memory(32 * MIB);
    assert!(matches!(install(&memory, &elf(), None, &line(""), 0), Err(BootError::Cpus(0))));
    assert!(matches!(install(&memory, &elf(), None, &line(""), 65), Err(BootError::Cpus(65))));
    let odd = GuestMemory::from_ranges(&[(GuestAddress(0), 16 << 20)]).unwrap();
    assert!(matches!(
        install(&odd, &elf(), None, &line(""), 1),
        Err(BootError::Kernel(_) | BootError::Layout(_))
    ));
}

#[test]
fn a_line_that_this_kernel_cuts_off_is_refused() {
    let mut bytes = bzimage(&pack("lz4", &ElfImage::default().build()));
    bytes[0x238..0x23c].copy_from_slice(&255u32.to_le_bytes());
    let kernel = kernel(bytes, BootProtocol::Auto).unwrap();
    let memory = memory(32 * MIB);
    install(&memory, &kernel, None, &line(&"x".repeat(255)), 1).unwrap();
    let error = install(&memory, &kernel, None, &line(&"x".repeat(256)), 1).unwrap_err();
    assert!(matches!(error, BootError::Cmdline { length: 256, max: 255 }));
}
