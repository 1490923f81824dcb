//! Ways to boot: vCPUs, kernel formats and protocols, memory sizes. Each machine is a boot of its own, so each boot looks at several
//! things.

#![allow(clippy::unwrap_used, reason = "tests may")]

use std::time::Duration;

use tests::{Vmm, artefacts, require, require_kvm};

/// Says what the guest finds: its processors and its memory.
const LOOK: &str = "echo cpus: $(nproc); while read -r name kib rest; do \
                    [ $name = MemTotal: ] && echo memory: $kib; done </proc/meminfo; echo cmdline: $(cat /proc/cmdline)";

fn container(kernel: impl AsRef<std::ffi::OsStr>) -> Vmm {
    Vmm::kernel(kernel).arg("--rootfs").arg(artefacts::sample()).cold().shell(LOOK)
}

/// Checks that a guest of `mib` finds most of it: the kernel keeps a part for itself.
#[track_caller]
fn has_memory(ended: &tests::Ended, mib: u64) {
    let found = ended.field("memory").parse::<u64>().unwrap() / 1024;
    let least = mib - mib / 10 - 24;
    assert!((least..=mib).contains(&found), "{found} MiB of {mib}");
}

#[test]
fn one_vcpu_vmlinux() {
    require_kvm!();
    let ended = container(artefacts::vmlinux()).run().expect(0);
    assert_eq!(ended.field("cpus"), "1");
    has_memory(&ended, 256);
    assert_eq!(ended.err(), "", "nothing but the container's own");
}

#[test]
fn two_vcpus_bzimage_lz4() {
    require_kvm!();
    let ended =
        container(artefacts::bzimage()).args(["--cpus", "2", "--cmdline", "hello=world"]).run().expect(0);
    assert_eq!(ended.field("cpus"), "2");
    assert!(ended.field("cmdline").contains("hello=world"));
}

#[test]
fn bzimage_zstd() {
    require_kvm!();
    let ended = container(artefacts::bzimage_of("zstd")).run().expect(0);
    assert_eq!(ended.field("cpus"), "1");
}

/// The PVH entry, with everything else from a file too.
#[test]
fn pvh_from_a_configuration() {
    require_kvm!();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("machine.json");
    let json = serde_json::json!({
        "vcpus": 2,
        "memory": { "size": "128M" },
        "boot": { "kernel": artefacts::vmlinux(), "protocol": "pvh", "cmdline": "from=json" },
    });
    std::fs::write(&file, json.to_string()).unwrap();
    let ended = Vmm::new()
        .arg("--config")
        .arg(&file)
        .arg("--rootfs")
        .arg(artefacts::sample())
        .args(["--cpus", "1"])
        .cold()
        .shell(LOOK)
        .run()
        .expect(0);
    assert_eq!(ended.field("cpus"), "1", "a flag overrides the file");
    assert!(ended.field("cmdline").contains("from=json"));
    has_memory(&ended, 128);
}

#[test]
fn memory_of_64_mib() {
    require_kvm!();
    let ended = container(artefacts::vmlinux()).args(["--memory", "64M"]).run().expect(0);
    has_memory(&ended, 64);
}

/// More than fits below the hole at 3 GiB: the rest is above 4 GiB.
#[test]
fn memory_of_5_gib() {
    require_kvm!();
    require!(tests::require::memory_available() > 6 << 30, "6 GiB of free memory");
    let ended = container(artefacts::vmlinux())
        .args(["--memory", "5G"])
        .limit(Duration::from_secs(600))
        .run()
        .expect(0);
    has_memory(&ended, 5 << 10);
}
