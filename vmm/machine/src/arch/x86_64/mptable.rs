//! The MP configuration table: how many CPUs, where the IOAPIC is, and which line ends at which of its pins.
//!
//! Guests that boot without ACPI find their other CPUs by it. Source: Intel's MultiProcessor Specification 1.4, chapter 4.

/// Most CPUs that the table is made for.
pub const CPUS_MAX: u8 = 64;
/// Pins of KVM's IOAPIC; lines and pins have the same numbers, as in KVM's default routing.
pub const IOAPIC_PINS: u8 = 24;

use crate::layout::{IOAPIC, LOCAL_APIC, MP_TABLE};

const FLOATING_POINTER_SIZE: u32 = 16;
const HEADER_SIZE: usize = 44;
/// Specification 1.4.
const REVISION: u8 = 4;

const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IOAPIC: u8 = 2;
const ENTRY_IO_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;

const CPU_ENABLED: u8 = 1;
const CPU_BOOT: u8 = 2;
/// Family 6. The guest believes CPUID, not this.
const CPU_SIGNATURE: u32 = 0x600;
/// FPU and local APIC (table 4-6).
const CPU_FEATURES: u32 = 0x201;
/// Version register of a local APIC and of an IOAPIC that are not discrete chips.
const APIC_VERSION: u8 = 0x14;

const INTERRUPT_INT: u8 = 0;
const INTERRUPT_NMI: u8 = 1;
const INTERRUPT_EXTINT: u8 = 3;
const ISA_BUS: u8 = 0;
const ALL_APICS: u8 = 0xff;

/// Floating pointer and table for `cpus` CPUs, to be written at [`MP_TABLE`]; `None` for none or for more than
/// [`CPUS_MAX`]. APIC IDs count from 0, as CPUID tells them; the IOAPIC has the next one.
pub fn build(cpus: u8) -> Option<Vec<u8>> {
    if cpus == 0 || cpus > CPUS_MAX {
        return None;
    }
    let ioapic_id = cpus;
    let mut entries: Vec<Vec<u8>> = Vec::new();
    for id in 0..cpus {
        let flags = if id == 0 { CPU_ENABLED | CPU_BOOT } else { CPU_ENABLED };
        let mut entry = vec![ENTRY_PROCESSOR, id, APIC_VERSION, flags];
        entry.extend(CPU_SIGNATURE.to_le_bytes());
        entry.extend(CPU_FEATURES.to_le_bytes());
        entry.extend([0; 8]);
        entries.push(entry);
    }
    let mut bus = vec![ENTRY_BUS, ISA_BUS];
    bus.extend(b"ISA   ");
    entries.push(bus);
    let mut ioapic = vec![ENTRY_IOAPIC, ioapic_id, APIC_VERSION, 1];
    ioapic.extend(address(IOAPIC.0));
    entries.push(ioapic);
    // Flags 0: trigger and polarity as on the bus, which for ISA is edge and high.
    for line in 0..IOAPIC_PINS {
        entries.push(vec![ENTRY_IO_INTERRUPT, INTERRUPT_INT, 0, 0, ISA_BUS, line, ioapic_id, line]);
    }
    entries.push(vec![ENTRY_LOCAL_INTERRUPT, INTERRUPT_EXTINT, 0, 0, ISA_BUS, 0, 0, 0]);
    entries.push(vec![ENTRY_LOCAL_INTERRUPT, INTERRUPT_NMI, 0, 0, ISA_BUS, 0, ALL_APICS, 1]);

    let count = u16::try_from(entries.len()).ok()?;
    let body = entries.concat();
    let length = u16::try_from(HEADER_SIZE + body.len()).ok()?;
    let mut table = Vec::with_capacity(usize::from(length));
    table.extend(b"PCMP");
    table.extend(length.to_le_bytes());
    table.extend([REVISION, 0]);
    table.extend(b"VMM     ");
    table.extend(b"VIRTUAL     ");
    table.extend([0; 6]); // no OEM table
    table.extend(count.to_le_bytes());
    table.extend(address(LOCAL_APIC.0));
    table.extend([0; 4]); // no extended entries
    table.extend(body);
    set_checksum(&mut table, 7);

    let mut all = Vec::with_capacity(usize::from(length) + 16);
    all.extend(b"_MP_");
    all.extend(address(MP_TABLE.0 + u64::from(FLOATING_POINTER_SIZE)));
    all.extend([1, REVISION, 0, 0, 0, 0, 0, 0]); // one paragraph long; a table; no PIC mode to leave
    set_checksum(&mut all, 10);
    all.extend(table);
    Some(all)
}

/// The four bytes of an address below 4 GiB.
fn address(value: u64) -> [u8; 4] {
    let [a, b, c, d, ..] = value.to_le_bytes();
    [a, b, c, d]
}

/// Makes the bytes' sum zero by the byte at `index`.
fn set_checksum(bytes: &mut [u8], index: usize) {
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(byte) = bytes.get_mut(index) {
        *byte = byte.wrapping_sub(sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::MP_TABLE_SIZE;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// The entries of a table, by their lengths in table 4-2 of the specification.
    fn entries(table: &[u8]) -> Vec<&[u8]> {
        let mut rest = &table[44..];
        let mut found = Vec::new();
        while let Some(kind) = rest.first() {
            let (entry, next) = rest.split_at(if *kind == 0 { 20 } else { 8 });
            found.push(entry);
            rest = next;
        }
        found
    }

    #[test]
    fn pointers_lengths_and_checksums_hold_for_every_count() {
        for cpus in 1..=CPUS_MAX {
            let all = build(cpus).unwrap();
            assert!(all.len() as u64 <= MP_TABLE_SIZE);
            let (pointer, table) = all.split_at(16);
            assert_eq!((&pointer[..4], sum(pointer)), (&b"_MP_"[..], 0));
            assert_eq!(pointer[4..8], 0xf_0010_u32.to_le_bytes());
            assert_eq!((&table[..4], sum(table)), (&b"PCMP"[..], 0));
            assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
            let entries = entries(table);
            assert_eq!(usize::from(u16::from_le_bytes([table[34], table[35]])), entries.len());
            let ids: Vec<u8> = entries.iter().filter(|e| e[0] == 0).map(|e| e[1]).collect();
            assert_eq!(ids, (0..cpus).collect::<Vec<_>>());
            let boot: Vec<u8> = entries.iter().filter(|e| e[0] == 0 && e[3] & 2 != 0).map(|e| e[1]).collect();
            assert_eq!(boot, [0]);
        }
    }

    #[test]
    fn every_pin_has_its_line() {
        let all = build(3).unwrap();
        let entries = entries(&all[16..]);
        let ioapic = entries.iter().find(|e| e[0] == 2).unwrap();
        assert_eq!((ioapic[1], &ioapic[4..8]), (3, &0xfec0_0000_u32.to_le_bytes()[..]));
        let lines: Vec<(u8, u8, u8)> =
            entries.iter().filter(|e| e[0] == 3).map(|e| (e[5], e[6], e[7])).collect();
        assert_eq!(lines, (0..24).map(|line| (line, 3, line)).collect::<Vec<_>>());
        let local: Vec<(u8, u8, u8)> =
            entries.iter().filter(|e| e[0] == 4).map(|e| (e[1], e[6], e[7])).collect();
        assert_eq!(local, [(3, 0, 0), (1, 0xff, 1)]);
    }

    #[test]
    fn impossible_counts_have_no_table() {
        assert_eq!((build(0), build(65), build(255)), (None, None, None));
    }
}
