//! Devices: disks, the network, random numbers.

#![allow(clippy::unwrap_used, reason = "tests may")]

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt;

use prober::{Checksum, Pattern};
use tests::{TapNetwork, Vmm, require_kvm, require_root};

const MIB: usize = 1 << 20;

/// Written in the guest, read on the host; read-only; two of them; a file system of the guest's own; random numbers.
#[test]
fn disks() {
    require_kvm!();
    let directory = tempfile::tempdir().unwrap();
    let (written, read_only) = (directory.path().join("written"), directory.path().join("fixed"));
    std::fs::write(&written, vec![0xaa; 4 * MIB]).unwrap();
    let content: Vec<u8> = Pattern::bytes(2 * MIB).into_iter().rev().collect();
    std::fs::write(&read_only, &content).unwrap();
    // 512 bytes into the second MiB, and the very last sector.
    let script = "
echo sizes: $(blockdev --getsize64 /dev/vdb) $(blockdev --getsize64 /dev/vdc) ro: $(blockdev --getro /dev/vdb) $(blockdev --getro /dev/vdc)
prober pattern 1048576 | dd of=/dev/vdb bs=512 seek=2049 conv=notrunc,fsync 2>/dev/null && echo wrote: yes
prober pattern 512 | dd of=/dev/vdb bs=512 seek=8191 conv=notrunc,fsync 2>/dev/null && echo last: yes
echo beyond: $(prober pattern 512 | dd of=/dev/vdb bs=512 seek=8192 conv=notrunc,fsync 2>&1)
prober checksum </dev/vdc
echo refused: $(dd if=/dev/zero of=/dev/vdc bs=512 count=1 conv=fsync 2>&1)
echo random: $(head -c 16 /dev/random | hexdump -e '16/1 \"%02x\"')
echo rng: $(cat /sys/class/misc/hw_random/rng_current) $(cat /proc/sys/kernel/random/entropy_avail)
";
    let before = std::fs::metadata(&read_only).unwrap();
    let ended = Vmm::prober()
        .arg("--disk")
        .arg(&written)
        .arg("--disk")
        .arg(format!("{},ro", read_only.display()))
        .shell(script)
        .run()
        .expect(0);
    assert_eq!(ended.field("sizes"), format!("{} {} ro: 0 1", 4 * MIB, 2 * MIB));
    assert_eq!(ended.field("input"), format!("{} {:016x}", 2 * MIB, Checksum::of(&content)));
    assert_eq!((ended.field("wrote"), ended.field("last")), ("yes".into(), "yes".into()));
    assert!(!ended.field("beyond").is_empty());
    assert!(ended.field("refused").contains("dd: "), "{}", ended.transcript());
    assert_eq!(ended.field("random").len(), 32);
    let rng = ended.field("rng");
    assert!(rng.contains("256"), "entropy is there at once: {rng}");

    let mut expected = vec![0xaa; 4 * MIB];
    expected[2049 * 512..2049 * 512 + MIB].copy_from_slice(&Pattern::bytes(MIB));
    expected[4 * MIB - 512..].copy_from_slice(&Pattern::bytes(512));
    assert!(std::fs::read(&written).unwrap() == expected, "the disk has other bytes");
    assert!(std::fs::read(&read_only).unwrap() == content, "the read-only disk has other bytes");
    assert_eq!(std::fs::metadata(&read_only).unwrap().mtime_nsec(), before.mtime_nsec());
}

/// A container without CMD's disks sees a file system that it made itself, and a second VM sees what the first has left.
#[test]
fn a_file_system_stays() {
    require_kvm!();
    let directory = tempfile::tempdir().unwrap();
    let disk = directory.path().join("disk");
    std::fs::write(&disk, vec![0; 4 * MIB]).unwrap();
    let output = std::process::Command::new("mke2fs").args(["-q", "-t", "ext4"]).arg(&disk).output();
    assert!(output.is_ok_and(|output| output.status.success()), "mke2fs makes a file system");
    let with_disk = || Vmm::prober().arg("--disk").arg(&disk);
    with_disk()
        .shell("mount -t ext4 /dev/vdb /mnt && prober pattern 100000 >/mnt/file && echo not unmounted")
        .run()
        .expect(0);
    let ended = with_disk().shell("mount /dev/vdb /mnt && prober checksum </mnt/file").run().expect(0);
    assert_eq!(ended.field("input"), format!("100000 {:016x}", Checksum::of(&Pattern::bytes(100_000))));
}

/// Guest and host over a TAP: addresses, ping, TCP both ways.
#[test]
fn network() {
    require_kvm!();
    require_root!();
    const BYTES: usize = 500_000;
    let network = TapNetwork::new();
    let script = format!(
        "
echo address: $(ip -4 -o addr show eth0)
echo mac: $(cat /sys/class/net/eth0/address)
echo routes: $(ip route)
ping -c 2 -W 20 10.9.0.1 >/tmp/ping 2>&1; echo ping: $?
prober tcp-serve 5001
prober tcp-send 10.9.0.1:5002 {BYTES}
"
    );
    let pattern = Pattern::bytes(BYTES);
    let listener = network.within(|| TcpListener::bind("10.9.0.1:5002")).unwrap();
    let running = Vmm::prober()
        .within(&network.prefix())
        .args(["--net", "tap=tap0,mac=02:00:00:00:00:07,ip=10.9.0.2/24,gw=10.9.0.1"])
        .shell(&script)
        .start();
    running.wait_for("listening: 5001");
    // To the guest, which sends back what comes.
    let mut there = network.within(|| TcpStream::connect("10.9.0.2:5001")).unwrap();
    let mut back = there.try_clone().unwrap();
    let echoed = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        back.read_to_end(&mut bytes).map(|_| bytes)
    });
    there.write_all(&pattern).unwrap();
    there.shutdown(Shutdown::Write).unwrap();
    assert!(echoed.join().unwrap().unwrap() == pattern, "other bytes came back");
    // And from it.
    let (mut connection, peer) = listener.accept().unwrap();
    assert_eq!(peer.ip().to_string(), "10.9.0.2");
    let mut received = Vec::new();
    connection.read_to_end(&mut received).unwrap();
    assert!(received == pattern, "the guest sent other bytes");
    connection.write_all(b"thank you").unwrap();
    drop(connection);
    let ended = running.wait().expect(0);
    assert_eq!(ended.field("answer"), "thank you");
    assert!(ended.field("address").contains("10.9.0.2/24"));
    assert_eq!(ended.field("mac"), "02:00:00:00:00:07");
    assert!(ended.field("routes").contains("default via 10.9.0.1"));
    assert_eq!(ended.field("ping"), "0");
}
