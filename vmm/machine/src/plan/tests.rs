//! Real files, sockets and locks; a machine's plan as a whole where the host has KVM.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;

use proptest::prelude::*;
use rustix::fs::{CWD, FileType, Mode, mknodat};

use super::rootfs::FileSystem;
use super::*;
use crate::config::{ByteSize, ConsoleConfig, RngConfig};

fn file(dir: &Path, name: &str, content: &[u8]) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, content).unwrap();
    path
}

fn pipe(dir: &Path) -> PathBuf {
    let path = dir.join("pipe");
    mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    path
}

/// The error as a person sees it: one line, the path, and `expected` in it.
#[track_caller]
fn refused<T>(result: Result<T, impl std::error::Error>, path: &Path, expected: &str) {
    let Err(error) = result else { panic!("{} was taken", path.display()) };
    let text = error.to_string();
    assert!(
        text.contains(expected) && text.contains(path.to_str().unwrap()) && !text.contains('\n'),
        "{text}"
    );
}

#[test]
fn disks_are_checked() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let good = file(dir, "good", &[0; 1024]);
    let disk = Disk::open(&good, false).unwrap();
    assert_eq!((disk.size, disk.read_only), (1024, false));
    let flags = rustix::fs::fcntl_getfl(&disk.file).unwrap();
    assert!(!flags.contains(rustix::fs::OFlags::NONBLOCK));

    for (path, expected) in [
        (file(dir, "odd", &[0; 513]), "its 513 bytes are not whole sectors of 512"),
        (file(dir, "empty", b""), "it is empty"),
        (dir.join("absent"), "it does not exist"),
        (good.join("below"), "it does not exist"),
        (pipe(dir), "not a regular file or block device"),
        (dir.to_path_buf(), "not a regular file or block device"),
        ("/dev/null".into(), "not a regular file or block device"),
    ] {
        refused(Disk::open(&path, true), &path, expected);
        refused(Disk::open(&path, false), &path, expected);
    }
}

#[test]
fn a_disk_has_one_writer_or_many_readers() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(dir.path(), "disk", &[0; 512]);
    let readers = [Disk::open(&path, true).unwrap(), Disk::open(&path, true).unwrap()];
    refused(Disk::open(&path, false), &path, "another machine (or another --disk) uses it");
    drop(readers);
    let writer = Disk::open(&path, false).unwrap();
    refused(Disk::open(&path, true), &path, "another machine (or another --disk) writes it");
    refused(Disk::open(&path, false), &path, "uses it");
    drop(writer);
    Disk::open(&path, true).unwrap();
}

#[test]
fn a_socket_is_the_owners_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm.sock");
    let socket = ListeningSocket::bind(&path).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    UnixStream::connect(&path).unwrap();
    refused(ListeningSocket::bind(&path), &path, "another process listens there");
    // The first is ours, the second looked whether somebody listens.
    assert!(socket.listener().accept().is_ok() && socket.listener().accept().is_ok());
    assert_eq!(socket.listener().accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    drop(socket);
    assert!(!path.exists());

    // What a killed process left is replaced.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let socket = ListeningSocket::bind(&path).unwrap();
    // What came in its place is not removed.
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "mine").unwrap();
    drop(socket);
    refused(ListeningSocket::bind(&path), &path, "something else has this name");
    assert_eq!(std::fs::read(&path).unwrap(), b"mine");

    let absent = dir.path().join("absent/vm.sock");
    refused(ListeningSocket::bind(&absent), &absent, "there is no such directory");
    let long = dir.path().join("x".repeat(97));
    refused(ListeningSocket::bind(&long), &long, "longer than 96 bytes");
}

#[test]
fn a_console_is_created_or_emptied() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(dir.path(), "old", b"old");
    let open = |path: &Path| ConsoleOutput::open(&ConsoleConfig::File(path.into()));
    let ConsoleOutput::File(mut console) = open(&path).unwrap() else { panic!("no file") };
    console.write_all(b"new").unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"new");
    let pipe = pipe(dir.path());
    refused(open(&pipe), &pipe, "nobody reads this pipe");
    refused(open(dir.path()), dir.path(), "console ");
}

#[test]
fn an_initramfs_is_read_within_limits() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let good = file(dir, "good", &[7; 100]);
    assert_eq!(read_initramfs(&good, 100).unwrap(), [7; 100]);
    for (path, expected) in [
        (good, "larger than half"),
        (file(dir, "empty", b""), "the file is empty"),
        (pipe(dir), "not a regular file"),
        (dir.into(), "not a regular file"),
        (dir.join("absent"), "check the path"),
    ] {
        refused(read_initramfs(&path, 99), &path, expected);
    }
    let built_in = |initramfs| super::initramfs(&MachineConfig::default(), &Assets { initramfs });
    assert!(matches!(built_in(b""), Err(PlanError::NoAgent)));
    assert!(matches!(built_in(b"070701"), Ok(Some(Cow::Borrowed(b"070701")))));
}

/// An image with these bytes at these places.
fn image(len: usize, parts: &[(usize, &[u8])]) -> Vec<u8> {
    let mut image = vec![0; len];
    for (at, bytes) in parts {
        image[*at..at + bytes.len()].copy_from_slice(bytes);
    }
    image
}

#[test]
fn root_images_are_recognised() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let erofs: &[(usize, &[u8])] =
        &[(1024, &[0xe2, 0xe1, 0xf5, 0xe0]), (1036, &[12]), (1060, &2_u32.to_le_bytes())];
    let ext: &[(usize, &[u8])] = &[(1080, &[0x53, 0xef]), (1028, &8_u32.to_le_bytes())];
    let squashfs: &[(usize, &[u8])] = &[(0, b"hsqs"), (40, &4096_u64.to_le_bytes())];
    for (name, content, expected) in [
        ("erofs", image(8192, erofs), FileSystem::Erofs),
        ("ext", image(8192, ext), FileSystem::Ext4),
        ("squashfs", image(4096, squashfs), FileSystem::Squashfs),
        ("xfs", image(4096, &[(0, b"XFSB")]), FileSystem::Xfs),
        ("btrfs", image(1 << 17, &[(0x1_0040, b"_BHRfS_M")]), FileSystem::Btrfs),
    ] {
        let path = file(dir, name, &content);
        assert_eq!(rootfs::check(&path).unwrap(), expected);
        assert_eq!(rootfs::detect(&std::fs::File::open(&path).unwrap()).unwrap(), Some(expected));
    }
    for (name, content, expected) in [
        ("empty", vec![], "the file is empty"),
        ("short-erofs", image(4096, erofs), "truncated: its erofs has 8192 bytes, the file 4096"),
        ("short-ext", image(2048, ext), "truncated: its ext4 has 8192 bytes, the file 2048"),
        ("short-squashfs", image(64, squashfs), "truncated: its squashfs has 4096 bytes, the file 64"),
        ("gzip", image(2048, &[(0, b"\x1f\x8b")]), "it is gzip-compressed, not a file system"),
        ("tar", image(2048, &[(257, b"ustar"), (1080, &[0x53, 0xef])]), "it is a tar archive"),
        ("qcow2", image(2048, &[(0, b"QFI\xfb")]), "it is a qcow2 disk"),
        ("iso", image(0x9000, &[(0x8001, b"CD001"), (510, &[0x55, 0xaa])]), "it is a CD image"),
        ("bzImage", image(2048, &[(0x202, b"HdrS"), (510, &[0x55, 0xaa])]), "it is a Linux kernel (bzImage)"),
        ("mbr", image(2048, &[(510, &[0x55, 0xaa])]), "it is a disk with a partition table"),
        ("gpt", image(2048, &[(512, b"EFI PART")]), "it is a disk with a partition table"),
        ("zeros", image(2048, &[]), "it is a file of zeros"),
        ("text", b"hello".to_vec(), "not a file system"),
    ] {
        let path = file(dir, name, &content);
        refused(rootfs::check(&path), &path, expected);
    }
    for (path, expected) in [
        (dir.join("absent"), "it does not exist"),
        (dir.into(), "mkfs.erofs"),
        (pipe(dir), "not a regular file"),
    ] {
        refused(rootfs::check(&path), &path, expected);
    }
}

proptest! {
    #[test]
    fn no_superblock_makes_the_check_panic(
        magic in 0_usize..4, head in proptest::collection::vec(any::<u8>(), 0..2048),
    ) {
        let mut head = head;
        let (at, bytes): (usize, &[u8]) =
            [(0, &b"hsqs"[..]), (1024, &[0xe2, 0xe1, 0xf5, 0xe0]), (1080, &[0x53, 0xef]), (0, b"")][magic];
        if let Some(place) = head.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&head).unwrap();
        let _ = rootfs::check(file.path());
    }
}

/// A static x86-64 ELF executable with one page of code at 16 MiB.
fn kernel() -> Vec<u8> {
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    let header = [2_u16, 62].map(u16::to_le_bytes).concat();
    elf.extend(
        [
            header,
            1_u32.to_le_bytes().into(),
            (16_u64 << 20).to_le_bytes().into(),
            64_u64.to_le_bytes().into(),
        ]
        .concat(),
    );
    elf.extend([0; 12]);
    elf.extend([64_u16, 56, 1, 0, 0, 0].map(u16::to_le_bytes).concat());
    elf.extend([1_u32, 5].map(u32::to_le_bytes).concat());
    elf.extend([4096_u64, 16 << 20, 16 << 20, 4096, 4096, 4096].map(u64::to_le_bytes).concat());
    elf.resize(8192, 0xf4);
    elf
}

#[test]
fn a_plan_holds_everything_and_leaves_nothing() {
    let host = match Host::detect() {
        Ok(host) => host,
        Err(e) if std::env::var_os("CI").is_none() => {
            return eprintln!("skipped: a_plan_holds_everything: {e}");
        }
        Err(e) => panic!("{e}"),
    };
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let (root, data, socket) =
        (file(dir, "root", &[0; 512]), file(dir, "data", &[0; 512]), dir.join("vm.sock"));
    let mut config = MachineConfig::default();
    config.boot.kernel = file(dir, "vmlinux", &kernel());
    config.devices = vec![
        DeviceConfig::Block(BlockConfig { path: Some(root), read_only: true }),
        DeviceConfig::Block(BlockConfig { path: Some(data.clone()), read_only: false }),
        DeviceConfig::Vsock(VsockConfig { cid: 3, uds_path: Some(socket.clone()) }),
        DeviceConfig::Rng(RngConfig {}),
    ];
    let assets = Assets { initramfs: b"070701" };
    let (plan, boot) = Plan::new(&config, &host, &assets).unwrap();
    assert_eq!(boot.initramfs.as_deref(), Some(assets.initramfs));
    assert_eq!(plan.devices.iter().map(|slot| slot.irq).collect::<Vec<_>>(), [5, 6, 7, 9]);
    assert!(matches!(&plan.devices[1].device, PlannedDevice::Block { medium: Some(_), read_only: false }));
    assert!(socket.exists() && matches!(plan.console, ConsoleOutput::None));
    refused(Plan::new(&config, &host, &assets), &data, "another machine");
    drop(plan);
    assert!(!socket.exists());

    // A fault that is found late takes back what was made before.
    config.console = ConsoleConfig::File(dir.join("absent/console"));
    refused(Plan::new(&config, &host, &assets), &dir.join("absent/console"), "console ");
    assert!(!socket.exists());
    config.console = ConsoleConfig::File(dir.join("console"));
    config.boot.kernel = file(dir, "empty", b"");
    assert!(matches!(Plan::new(&config, &host, &assets), Err(PlanError::Kernel(_))));
    assert!(!dir.join("console").exists());
}

#[test]
fn scarcity_is_a_warning() {
    let mut config = MachineConfig::default();
    let Ok(host) = Host::detect() else { return eprintln!("skipped: scarcity_is_a_warning: no KVM") };
    let mut facts = host.facts;
    facts.system.cpus = 2;
    facts.system.memory_available = ByteSize::mib(256);
    assert!(warnings(&config, &facts).is_empty());
    config.vcpus = 3;
    config.memory.size = ByteSize::mib(257);
    let warnings = warnings(&config, &facts);
    assert!(warnings[0].starts_with("3 vCPUs share this host's 2 CPUs"));
    assert!(warnings[1].starts_with("257M of memory is more than the 256 MiB available now"));
}

#[test]
fn chosen_addresses_differ() {
    let (a, b) = (random_mac().unwrap(), random_mac().unwrap());
    assert!(a != b && a.is_unicast() && a.bytes()[0] & 2 == 2);
}

#[test]
fn a_disk_is_found_again_from_anywhere() {
    // Tests run in the package's directory.
    let file = tempfile::NamedTempFile::new_in(".").unwrap();
    file.as_file().set_len(512).unwrap();
    let name: PathBuf = file.path().file_name().unwrap().into();
    let block = BlockConfig { path: Some(name.clone()), read_only: true };
    let planned = PlannedDevice::open(0, &mut DeviceConfig::Block(block)).unwrap();
    let PlannedDevice::Block { medium: Some(disk), .. } = planned else { panic!("{planned:?}") };
    assert_eq!(disk.path, Some(std::env::current_dir().unwrap().join(name)));
}
