//! Linux's 64-bit boot protocol: the zero page, and a seed for the guest's random numbers.
//!
//! Source: Linux's Documentation/arch/x86/boot.rst ("64-bit Boot Protocol") and zero-page.rst, and
//! arch/x86/include/uapi/asm/setup_data.h.

use devices::GuestMemory;
use linux_loader::loader::bootparam::{
    CAN_USE_HEAP, E820_MAX_ENTRIES_ZEROPAGE, KASLR_FLAG, LOADED_HIGH, SETUP_RNG_SEED, XLF_KERNEL_64,
    boot_e820_entry, boot_params, setup_header,
};
use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::{Bytes, GuestAddress};

use super::{BootError, INITRAMFS_MAX, writing};
use crate::layout::{self, COMMAND_LINE, COMMAND_LINE_MAX, E820Entry, SETUP_DATA, ZERO_PAGE};

/// `boot_flag`.
const BOOT_FLAG: u16 = 0xaa55;
/// "HdrS".
const HEADER_MAGIC: u32 = 0x5372_6448;
/// The newest protocol, for kernels that come without a header.
const VERSION: u16 = 0x20f;
/// A boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// Alignment that x86-64 kernels are built with.
const KERNEL_ALIGNMENT: u32 = 0x0100_0000;
/// `E820_TYPE_RAM`.
const E820_RAM: u32 = 1;
/// What `add_bootloader_randomness` takes for a full seed.
const SEED_SIZE: usize = 32;
/// `struct setup_data`: next, type, length.
const SETUP_DATA_HEADER: usize = 16;

/// Writes the zero page and the list of `setup_data` that it points to.
pub(super) fn write_zero_page(
    memory: &GuestMemory,
    header: Option<&setup_header>,
    initramfs: Option<(GuestAddress, u64)>,
    map: &[E820Entry],
) -> Result<(), BootError> {
    let params = zero_page(header, initramfs, map);
    memory.write_obj(params, ZERO_PAGE).map_err(writing("the zero page"))?;
    memory.write_slice(&rng_seed()?, SETUP_DATA).map_err(writing("the random seed"))
}

/// The zero page: the kernel's own header when it has one, with what a boot loader has to fill in.
fn zero_page(
    header: Option<&setup_header>,
    initramfs: Option<(GuestAddress, u64)>,
    map: &[E820Entry],
) -> boot_params {
    let mut params =
        boot_params { hdr: header.copied().unwrap_or_else(default_header), ..Default::default() };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.ext_loader_ver = 0;
    params.hdr.ext_loader_type = 0;
    // There is no real-mode heap, and the kernel runs where it was linked to.
    params.hdr.loadflags &= !(CAN_USE_HEAP | KASLR_FLAG);
    params.hdr.cmd_line_ptr = low_half(COMMAND_LINE.0);
    params.ext_cmd_line_ptr = high_half(COMMAND_LINE.0);
    params.hdr.setup_data = SETUP_DATA.0;
    let (start, size) = initramfs.unwrap_or_default();
    params.hdr.ramdisk_image = low_half(start.0);
    params.ext_ramdisk_image = high_half(start.0);
    params.hdr.ramdisk_size = low_half(size);
    params.ext_ramdisk_size = high_half(size);

    let mut table = params.e820_table;
    let mut entries = 0;
    for (slot, entry) in table.iter_mut().zip(map.iter().take(E820_MAX_ENTRIES_ZEROPAGE)) {
        *slot = boot_e820_entry { addr: entry.addr, size: entry.size, r#type: E820_RAM };
        entries += 1;
    }
    params.e820_table = table;
    params.e820_entries = entries;
    params
}

/// What a bzImage of the same kernel would have in its header, as far as the kernel looks at it.
fn default_header() -> setup_header {
    setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        version: VERSION,
        loadflags: LOADED_HIGH,
        // A root file system is mounted read-only unless the command line says otherwise.
        root_flags: 1,
        kernel_alignment: KERNEL_ALIGNMENT,
        xloadflags: XLF_KERNEL_64,
        cmdline_size: low_half(COMMAND_LINE_MAX as u64 - 1),
        initrd_addr_max: low_half(INITRAMFS_MAX),
        pref_address: layout::HIGH_RAM_START,
        ..Default::default()
    }
}

/// A `setup_data` of type `SETUP_RNG_SEED`: with it the guest's generator is ready from the start, and two guests from
/// one image do not draw the same numbers.
fn rng_seed() -> Result<[u8; SETUP_DATA_HEADER + SEED_SIZE], BootError> {
    let mut data = [0; SETUP_DATA_HEADER + SEED_SIZE];
    let (head, seed) = data.split_at_mut(SETUP_DATA_HEADER);
    // The first eight bytes, the address of the next entry, stay zero: it is the only one.
    head[8..12].copy_from_slice(&SETUP_RNG_SEED.to_le_bytes());
    head[12..16].copy_from_slice(&low_half(SEED_SIZE as u64).to_le_bytes());
    // 256 bytes or fewer come whole, or not at all.
    getrandom(seed, GetRandomFlags::empty()).map_err(|error| BootError::Random(error.into()))?;
    Ok(data)
}

/// The lower 32 bits.
#[allow(clippy::cast_possible_truncation, reason = "the upper half has a field of its own")]
fn low_half(value: u64) -> u32 {
    value as u32
}

/// The upper 32 bits.
fn high_half(value: u64) -> u32 {
    low_half(value >> 32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::e820;

    #[test]
    fn a_bare_elf_gets_a_header_of_ours() {
        let map = e820(5 << 30).unwrap();
        let params = zero_page(None, Some((GuestAddress(0x7ff0_0000), 0xf_ffff)), &map);
        let hdr = params.hdr;
        assert_eq!({ hdr.header }, HEADER_MAGIC);
        assert_eq!(hdr.type_of_loader, 0xff);
        assert_eq!({ hdr.cmd_line_ptr }, 0x20000);
        assert_eq!(({ hdr.ramdisk_image }, { hdr.ramdisk_size }), (0x7ff0_0000, 0xf_ffff));
        assert_eq!(({ params.ext_ramdisk_image }, { params.ext_ramdisk_size }), (0, 0));
        assert_eq!(params.e820_entries, 3);
        let last = params.e820_table[2];
        assert_eq!(({ last.addr }, { last.size }, { last.r#type }), (4 << 30, 2 << 30, 1));
        assert_eq!(params.sentinel, 0);
    }

    #[test]
    fn high_addresses_use_the_extended_fields() {
        let params = zero_page(None, Some((GuestAddress(0x2_1234_5000), 0x1_0000_0010)), &[]);
        assert_eq!(({ params.hdr.ramdisk_image }, { params.ext_ramdisk_image }), (0x1234_5000, 2));
        assert_eq!(({ params.hdr.ramdisk_size }, { params.ext_ramdisk_size }), (0x10, 1));
    }

    #[test]
    fn a_bzimage_header_is_kept_but_for_the_loaders_fields() {
        let header = setup_header {
            version: 0x20c,
            loadflags: 0xff,
            type_of_loader: 0x12,
            root_flags: 0,
            vid_mode: 0xffff,
            ..Default::default()
        };
        let params = zero_page(Some(&header), None, &[]);
        assert_eq!(({ params.hdr.version }, params.hdr.loadflags), (0x20c, 0x7d));
        assert_eq!((params.hdr.type_of_loader, { params.hdr.vid_mode }), (0xff, 0xffff));
        assert_eq!(({ params.hdr.ramdisk_image }, { params.hdr.ramdisk_size }), (0, 0));
    }

    #[test]
    fn seeds_differ() {
        let (a, b) = (rng_seed().unwrap(), rng_seed().unwrap());
        assert_eq!(a[..16], [0, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 32, 0, 0, 0]);
        assert_eq!(a[..16], b[..16]);
        assert_ne!(a[16..], b[16..]);
    }
}
