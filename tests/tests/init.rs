//! Machines without a container: `--init`, guests that panic or hang, kernels of a few instructions.

#![allow(clippy::unwrap_used, reason = "tests may")]

use rustix::process::Signal;
use tests::kernel::tiny;
use tests::{Vmm, image, require_kvm};

/// The console both ways, a root that is written, and a power-off.
#[test]
fn ext4_console_and_poweroff() {
    require_kvm!();
    let directory = tempfile::tempdir().unwrap();
    let script = "/bin/busybox mount -t proc none /proc
echo pid: $$ root: $(/bin/busybox grep ' / ' /proc/mounts | /bin/busybox tail -n1)
echo kept >/kept
echo ready
read -r line
echo line: $line
/bin/busybox sync
/bin/busybox poweroff -f";
    let root = image::with_init(directory.path(), "ext4", script);
    let mut running = Vmm::init(&root).start();
    running.wait_for("ready");
    running.write(b"typed\n");
    let ended = running.wait().expect(0);
    assert!(ended.field("pid").starts_with("1 root: /dev/root / ext4 rw"), "{}", ended.transcript());
    assert_eq!(ended.field("line"), "typed");
    let kept = std::process::Command::new("debugfs").args(["-R", "cat /kept"]).arg(&root).output().unwrap();
    assert_eq!(kept.stdout, b"kept\n", "it is on the disk");
}

#[test]
fn erofs_and_reboot() {
    require_kvm!();
    let directory = tempfile::tempdir().unwrap();
    let root = image::with_init(directory.path(), "erofs", "echo hello: init\n/bin/busybox reboot -f");
    let ended = Vmm::init(&root).args(["--cpus", "2"]).run().expect(0);
    assert_eq!(ended.field("hello"), "init");
}

/// The kernel panics when its init ends. Its last lines come on standard error.
#[test]
fn panic() {
    require_kvm!();
    let directory = tempfile::tempdir().unwrap();
    let root = image::with_init(directory.path(), "erofs", "echo farewell");
    let console = directory.path().join("console");
    let ended = Vmm::init(&root).arg("--console").arg(&console).run().expect(250);
    let err = ended.err();
    assert!(err.starts_with("vmm: the guest's kernel panicked; the last lines of its console:\n"), "{err}");
    assert!(err.contains("farewell") && err.contains("Kernel panic - not syncing"), "{err}");
    assert!(std::fs::read_to_string(&console).unwrap().contains("Kernel panic"));
}

/// The kernel falls below a container: here because it was told to when memory is short.
#[test]
fn panic_below_a_container() {
    require_kvm!();
    let ended = Vmm::prober()
        .cold()
        .args(["--memory", "64M", "--cmdline", "sysctl.vm.panic_on_oom=2"])
        .shell("echo before; exec prober hog 100000000")
        .run()
        .expect(250);
    assert_eq!(ended.out(), "before\n");
    assert!(ended.err().starts_with("vmm: the guest's kernel panicked"), "{}", ended.transcript());
}

/// A kernel that hangs with interrupts off hears nothing, and is ended all the same.
#[test]
fn a_hung_guest_is_ended() {
    require_kvm!();
    let directory = tempfile::tempdir().unwrap();
    // cli; jmp .
    let mut code = vec![0xfa];
    let kernel = directory.path().join("kernel");
    // Says "!" first: mov dx, 0x3f8; mov al, '!'; out dx, al
    code.extend([0x66, 0xba, 0xf8, 0x03, 0xb0, b'!', 0xee, 0xeb, 0xfe]);
    std::fs::write(&kernel, tiny(&code)).unwrap();
    for (signal, code) in [(Signal::TERM, 143), (Signal::INT, 130)] {
        let running = Vmm::kernel(&kernel).arg("--init").args(["--cpus", "2"]).start();
        running.wait_for("!");
        running.signal(signal);
        assert_eq!(running.wait().code(), code);
    }
}

/// Ends that need no Linux.
#[test]
fn tiny_kernels() {
    require_kvm!();
    let directory = tempfile::tempdir().unwrap();
    let run = |name: &str, code: &[u8]| {
        let kernel = directory.path().join(name);
        std::fs::write(&kernel, tiny(code)).unwrap();
        Vmm::kernel(&kernel).arg("--init").run()
    };
    // mov al, 0xfe; out 0x64, al: the keyboard controller's reset.
    run("reset", &[0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe]).expect(0);
    // cli; hlt: nothing wakes it any more.
    run("halt", &[0xfa, 0xf4, 0xeb, 0xfd]).expect(0);
    // lidt of nothing, and an exception: a triple fault.
    run("triple", &[0x6a, 0x00, 0x6a, 0x00, 0x0f, 0x01, 0x1c, 0x24, 0x0f, 0x0b]).expect(0);
}
