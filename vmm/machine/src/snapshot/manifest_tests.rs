use super::*;

/// One that says something everywhere.
pub(in crate::snapshot) fn manifest() -> Manifest {
    Manifest {
        id: SnapshotId([7; 16]),
        parent: Some(Parent { id: SnapshotId([6; 16]), directory: "/above".into() }),
        created: 1_790_000_000,
        vmm: "0.1.0".into(),
        host: host(KernelMode::Emulated, "one"),
        guest: GuestStage::Frozen,
        config: MachineConfig::default(),
        memory: MemoryFile { size: 256 << 20, bytes: 4096, crc: 1 },
        state: StateFile { bytes: 10, crc: 2 },
        disks: Vec::new(),
    }
}

fn host(kernel_mode: KernelMode, boot_id: &str) -> HostKind {
    HostKind { arch: "x86_64".into(), kernel_mode, boot_id: boot_id.into() }
}

#[test]
fn what_is_written_is_read() {
    let manifest = manifest();
    assert_eq!(Manifest::decode(&manifest.encode()), Ok(manifest));
}

#[test]
fn every_flipped_bit_and_every_cut_is_noticed() {
    let bytes = manifest().encode();
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << bit;
            assert!(Manifest::decode(&flipped).is_err(), "bit {bit} of byte {at}");
        }
        assert!(Manifest::decode(&bytes[..at]).is_err(), "cut at {at}");
    }
    assert!(Manifest::decode(&[&bytes[..], b" "].concat()).is_err());
}

#[test]
fn another_version_is_told_as_such() {
    let text = String::from_utf8(manifest().encode()).unwrap();
    let newer = text.replacen("vmm-snapshot 1 ", "vmm-snapshot 2 ", 1);
    assert_eq!(Manifest::decode(newer.as_bytes()), Err(Fault::Version(2)));
    for wrong in ["", "\n", "vmm-snapshot", "vmm-snapshot x 1 2\n{}", "elf 1 2 00000000\n{}"] {
        assert!(matches!(Manifest::decode(wrong.as_bytes()), Err(Fault::Damaged(_))), "{wrong:?}");
    }
}

#[test]
fn unknown_fields_are_refused() {
    let json = r#"{"id":"x","surprise":1}"#;
    let text = format!("vmm-snapshot 1 {} {:08x}\n{json}", json.len(), crc32fast::hash(json.as_bytes()));
    assert!(matches!(Manifest::decode(text.as_bytes()), Err(Fault::Damaged(_))));
}

#[test]
fn hosts_that_fit() {
    let here = host(KernelMode::Emulated, "one");
    assert_eq!(host(KernelMode::Emulated, "one").unfit(&here), None);
    assert!(host(KernelMode::Emulated, "two").unfit(&here).unwrap().contains("booted"));
    assert!(host(KernelMode::Hardware, "one").unfit(&here).unwrap().contains("on the CPU"));
    let hardware = host(KernelMode::Hardware, "one");
    assert_eq!(host(KernelMode::Hardware, "two").unfit(&hardware), None);
    assert!(here.unfit(&hardware).unwrap().contains("emulates"));
    let other = HostKind { arch: "aarch64".into(), ..host(KernelMode::Hardware, "one") };
    assert!(other.unfit(&hardware).unwrap().contains("aarch64"));
}

#[test]
fn ids_are_hexadecimal() {
    let id = SnapshotId([0xa5; 16]);
    assert_eq!(SnapshotId::try_from(id.to_string()), Ok(id));
    for wrong in ["", "a5", &"x".repeat(32), &"+1".repeat(16), &"a5".repeat(17)] {
        assert!(SnapshotId::try_from(wrong.to_string()).is_err(), "{wrong}");
    }
}
