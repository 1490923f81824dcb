//! Bad input: one line that says what is wrong and what to do, an exit code of `vmm`'s own, and nothing left behind.

#![allow(clippy::unwrap_used, reason = "tests may")]

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Signal;
use tests::kernel::{self, BzImage};
use tests::{Ended, Vmm, artefacts, require_kvm, require_root};

/// Long for a refusal, short for a boot on a machine that is busy.
const SOON: Duration = Duration::from_secs(60);

/// A directory for a test's files, and what is to be found in it afterwards.
struct Place {
    directory: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Place { directory: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    fn names(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.directory.path()).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        names.sort();
        names
    }

    /// Runs it here, with a socket and a console asked for, and checks that it is refused and leaves neither.
    #[track_caller]
    fn refuses(&self, vmm: Vmm, words: &[&str]) -> String {
        let before = self.names();
        let line = self.run(vmm).refused(words);
        assert_eq!(self.names(), before, "something was left behind: {line}");
        println!("{line}");
        line
    }

    fn run(&self, vmm: Vmm) -> Ended {
        vmm.unprepared()
            .arg("--vsock")
            .arg(self.path("vsock"))
            .arg("--console")
            .arg(self.path("console"))
            .command(&["true"])
            .limit(SOON)
            .run()
    }
}

fn kernel(kernel: impl AsRef<OsStr>) -> Vmm {
    Vmm::kernel(kernel).arg("--rootfs").arg(artefacts::sample())
}

fn root(image: &Path) -> Vmm {
    Vmm::kernel(artefacts::vmlinux()).arg("--rootfs").arg(image)
}

#[test]
fn kernels() {
    require_kvm!();
    let place = Place::new();
    let vmlinux = std::fs::read(artefacts::vmlinux()).unwrap();
    let bzimage = BzImage::read(&artefacts::bzimage());
    let zstd = BzImage::read(&artefacts::bzimage_of("zstd"));

    place.refuses(kernel(place.path("none")), &["none", "check the path"]);
    place.refuses(kernel(place.directory.path()), &["not a"]);
    place.refuses(kernel(place.file("empty", "")), &["empty"]);
    place.refuses(kernel(place.file("text", "not a kernel at all\n".repeat(100))), &["text"]);
    place.refuses(kernel(place.file("cut-elf", &vmlinux[..vmlinux.len() / 2])), &["cut-elf"]);
    place.refuses(kernel(place.file("cut-header", &vmlinux[..100])), &["cut-header"]);
    place.refuses(kernel(place.file("cut-bzimage", bzimage.truncated())), &["cut-bzimage"]);
    place.refuses(kernel(place.file("arm", kernel::elf(&[0; 4096], 183))), &["arm", "x86"]);
    let mut arm_image = vec![0; 4096];
    arm_image[0x38..0x3c].copy_from_slice(b"ARMd");
    place.refuses(kernel(place.file("arm-image", arm_image)), &["arm-image"]);
    place.refuses(kernel(place.file("lz4", bzimage.damaged())), &["lz4"]);
    place.refuses(kernel(place.file("zstd", zstd.damaged())), &["zstd"]);
    place.refuses(kernel(place.file("bomb", zstd.bomb())), &["bomb"]);
    place.refuses(kernel(artefacts::sample()), &["ctr.img"]);
}

#[test]
fn root_images() {
    require_kvm!();
    let place = Place::new();
    place.refuses(root(&place.path("none")), &["none", "not exist"]);
    place.refuses(root(place.directory.path()), &["not a"]);
    place.refuses(root(&place.file("empty", "")), &["empty"]);
    place.refuses(root(&place.file("zeros", vec![0; 1 << 20])), &["zeros", "file system"]);
    place.refuses(root(&place.file("text", "hello\n".repeat(1000))), &["text", "file system"]);
    place.refuses(root(&artefacts::vmlinux()), &["vmlinux", "kernel"]);
    let whole = std::fs::read(artefacts::sample()).unwrap();
    place.refuses(root(&place.file("cut", &whole[..whole.len() / 2])), &["cut"]);
    place.refuses(Vmm::kernel(artefacts::vmlinux()), &["--rootfs"]);
}

#[test]
fn machines() {
    require_kvm!();
    let place = Place::new();
    let good = Vmm::container;
    place.refuses(good().args(["--memory", "100000G"]), &["memory", "host"]);
    place.refuses(good().args(["--memory", "99999999999999999999G"]), &["memory"]);
    place.refuses(good().args(["--memory", "1M"]), &["32"]);
    place.refuses(good().args(["--memory", "lots"]), &["lots"]);
    place.refuses(good().args(["--cpus", "0"]), &["cpus", "1 to 64"]);
    place.refuses(good().args(["--cpus", "10000"]), &["cpus", "1 to 64"]);
    place.refuses(good().args(["--cpus", "65"]), &["cpus", "1 to 64"]);
    place.refuses(good().args(["--net", "tap=none-such0"]), &["none-such0"]);
    place.refuses(good().args(["--net", "tap=lo"]), &["lo"]);
    place.refuses(good().args(["--net", "bridge=br0"]), &["bridge"]);
    place.refuses(good().arg("--disk").arg(place.path("none")), &["none", "not exist"]);
    place.refuses(good().arg("--disk").arg(place.file("empty", "")), &["empty"]);
    place.refuses(good().arg("--initrd").arg(place.path("none")), &["none"]);
    place.refuses(good().args(["--cmdline", "new\nline"]), &["cmdline"]);
    place.refuses(good().arg("--cmdline").arg("x".repeat(5000)), &["cmdline"]);
    place.refuses(good().arg("--frobnicate"), &["--frobnicate"]);
    place.refuses(good().args(["--cpus", "1", "--cpus", "2"]), &["--cpus"]);
    place.refuses(Vmm::new().arg("--rootfs").arg(artefacts::sample()), &["kernel"]);
}

#[test]
fn configurations() {
    require_kvm!();
    let place = Place::new();
    let with = |text: &str| Vmm::container().arg("--config").arg(place.file("vm.json", text));
    place.file("vm.json", "");
    place.refuses(with(r#"{"vcpus": 1, "colour": "red"}"#), &["vm.json:1:", "colour"]);
    place.refuses(with("{\n  \"memory\": { \"sise\": \"64M\" }\n}"), &["vm.json:2:", "sise"]);
    place.refuses(with(r#"{"devices": [{"floppy": {}}]}"#), &["floppy"]);
    place.refuses(with(r#"{"vcpus": "many"}"#), &["vm.json:1:"]);
    place.refuses(with("{"), &["vm.json:1:"]);
    place.refuses(with(""), &["vm.json"]);
    place.refuses(with(&" ".repeat(2 << 20)), &["vm.json", "1 MiB"]);
    place.refuses(Vmm::container().arg("--config").arg(place.path("none.json")), &["none.json"]);
    // PVH of a file that has no such entry.
    let tiny = place.file("tiny", kernel::tiny(&[0xf4]));
    let json = serde_json::json!({ "boot": { "kernel": tiny, "protocol": "pvh" } }).to_string();
    let file = place.file("vm.json", json);
    let vmm = Vmm::new().arg("--config").arg(file).arg("--rootfs").arg(artefacts::sample());
    place.refuses(vmm, &["tiny", "PVH"]);
}

#[test]
fn consoles_and_sockets() {
    require_kvm!();
    let place = Place::new();
    let run = |vmm: Vmm| vmm.unprepared().command(&["true"]).limit(SOON).run();
    let missing = place.path("nowhere/console");
    run(Vmm::container().arg("--console").arg(&missing)).refused(&["nowhere/console"]);
    let missing = place.path("nowhere/vsock");
    run(Vmm::container().arg("--vsock").arg(&missing)).refused(&["nowhere/vsock"]);
    // Somebody else's file is not replaced.
    let file = place.file("precious", "content");
    run(Vmm::container().arg("--vsock").arg(&file)).refused(&["precious"]);
    assert_eq!(std::fs::read(&file).unwrap(), b"content");
    assert_eq!(place.names(), [file]);
}

#[test]
fn dev_kvm_missing() {
    require_kvm!();
    require_root!();
    let place = Place::new();
    let hidden = ["unshare", "-m", "sh", "-c", "mount -t tmpfs none /dev && exec \"$0\" \"$@\""];
    place.refuses(Vmm::container().within(&hidden), &["/dev/kvm does not exist"]);
    let other = ["unshare", "-m", "sh", "-c", "mount --bind /dev/null /dev/kvm && exec \"$0\" \"$@\""];
    place.refuses(Vmm::container().within(&other), &["/dev/kvm"]);
}

#[test]
fn dev_kvm_not_permitted() {
    require_kvm!();
    require_root!();
    let place = Place::new();
    // Where another user can reach them.
    std::fs::set_permissions(place.directory.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .unwrap();
    let copy = |from: &Path, name: &str| {
        let to = place.path(name);
        std::fs::copy(from, &to).unwrap();
        std::fs::set_permissions(&to, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        to
    };
    let vmm = copy(&artefacts::vmm(), "vmm");
    let (kernel, image) = (copy(&artefacts::vmlinux(), "vmlinux"), copy(&artefacts::sample(), "ctr.img"));
    // The node's mode is changed in a /dev of its own. The copy takes the original's place.
    let script = "mount -t tmpfs none /dev && mknod -m 600 /dev/kvm c 10 232 && mknod -m 666 /dev/null c 1 3 && \
                  shift && exec setpriv --reuid 65534 --regid 65534 --clear-groups \"$0\" \"$@\"";
    let before = place.names();
    let line = Vmm::kernel(kernel)
        .arg("--rootfs")
        .arg(image)
        .within(&["unshare", "-m", "sh", "-c", script, vmm.to_str().unwrap()])
        .command(&["true"])
        .limit(SOON)
        .run()
        .refused(&["/dev/kvm", "permission"]);
    println!("{line}");
    assert_eq!(place.names(), before);
}

/// The first one has the disk; who comes second hears so, and the first goes on.
#[test]
fn two_machines_on_one_disk() {
    require_kvm!();
    let place = Place::new();
    let disk = place.file("disk", vec![0; 1 << 20]);
    let with_disk = |suffix: &str| Vmm::container().arg("--disk").arg(format!("{}{suffix}", disk.display()));
    let mut first = with_disk("").arg("-i").shell("echo ready; read line; echo got: $line").start();
    first.wait_for("ready");
    place.refuses(with_disk(""), &["disk", "another machine"]);
    place.refuses(with_disk(",ro"), &["disk", "another machine"]);
    first.write(b"on\n");
    assert_eq!(first.wait().expect(0).field("got"), "on");
}

/// Machines that are killed, and those that end, leave no process, no socket and no file.
#[test]
fn nothing_is_left_behind() {
    require_kvm!();
    let place = Place::new();
    let start =
        || Vmm::container().arg("--vsock").arg(place.path("vsock")).shell("echo up; exec sleep 1000").start();
    let running = start();
    running.wait_for("up");
    assert_eq!(place.names(), [place.path("vsock")]);
    assert_eq!(running.insist(Signal::TERM).code(), 143);
    assert_eq!(place.names(), Vec::<PathBuf>::new(), "the socket is gone");
}
