//! The PVH boot protocol: `hvm_start_info`, version 1, with the memory map and one module.
//!
//! Source: Xen's docs/misc/pvh.pandoc and public/arch-x86/hvm/start_info.h.

use devices::GuestMemory;
use linux_loader::start_info::{
    XEN_HVM_MEMMAP_TYPE_RAM, XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry,
    hvm_start_info,
};
use vm_memory::{Address, Bytes, GuestAddress};

use super::{BootError, writing};
use crate::layout::{COMMAND_LINE, E820Entry, PVH_MEMORY_MAP, PVH_MODULES, PVH_START_INFO};

/// Writes the start info and the two lists that it points to.
pub(super) fn write_start_info(
    memory: &GuestMemory,
    initramfs: Option<(GuestAddress, u64)>,
    map: &[E820Entry],
) -> Result<(), BootError> {
    let mut entries = 0;
    for (index, entry) in (0..).zip(map) {
        let entry = hvm_memmap_table_entry {
            addr: entry.addr,
            size: entry.size,
            type_: XEN_HVM_MEMMAP_TYPE_RAM,
            reserved: 0,
        };
        let at = PVH_MEMORY_MAP.unchecked_add(index * size_of::<hvm_memmap_table_entry>() as u64);
        memory.write_obj(entry, at).map_err(writing("the PVH memory map"))?;
        entries += 1;
    }
    if let Some((start, size)) = initramfs {
        let module = hvm_modlist_entry { paddr: start.0, size, ..Default::default() };
        memory.write_obj(module, PVH_MODULES).map_err(writing("the PVH module list"))?;
    }
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: initramfs.is_some().into(),
        modlist_paddr: if initramfs.is_some() { PVH_MODULES.0 } else { 0 },
        cmdline_paddr: COMMAND_LINE.0,
        memmap_paddr: PVH_MEMORY_MAP.0,
        memmap_entries: entries,
        ..Default::default()
    };
    memory.write_obj(info, PVH_START_INFO).map_err(writing("the PVH start info"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::e820;

    #[test]
    fn lists_are_where_the_start_info_says() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let map = e820(5 << 30).unwrap();
        write_start_info(&memory, Some((GuestAddress(0x400_0000), 77)), &map).unwrap();
        let info: hvm_start_info = memory.read_obj(PVH_START_INFO).unwrap();
        assert_eq!((info.magic, info.version, info.nr_modules, info.memmap_entries), (0x336e_c578, 1, 1, 3));
        let module: hvm_modlist_entry = memory.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
        assert_eq!((module.paddr, module.size, module.cmdline_paddr), (0x400_0000, 77, 0));
        let last: hvm_memmap_table_entry = memory.read_obj(GuestAddress(info.memmap_paddr + 2 * 24)).unwrap();
        assert_eq!((last.addr, last.size, last.type_), (4 << 30, 2 << 30, 1));
    }

    #[test]
    fn without_an_initramfs_there_is_no_module() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write_start_info(&memory, None, &[]).unwrap();
        let info: hvm_start_info = memory.read_obj(PVH_START_INFO).unwrap();
        assert_eq!((info.nr_modules, info.modlist_paddr, info.memmap_entries), (0, 0, 0));
    }
}
