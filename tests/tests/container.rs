//! What a container is given and what comes of it: isolation, streams, signals, exit codes, terminals.

#![allow(clippy::unwrap_used, reason = "tests may")]

use rustix::process::Signal;
use tests::{Terminal, Vmm, artefacts, require_kvm};

/// One container that looks around.
#[test]
fn isolation() {
    require_kvm!();
    let script = r#"
echo pid: $$
echo hostname: $(hostname)
echo processes: $(ls /proc | grep -c '^[0-9]')
echo root: $(ls / | tr '\n' ' ')
echo mounts: $(grep -vcE ' (/|/proc|/sys|/dev|/dev/[a-z]*) ' /proc/mounts)
echo outer: [$(ls -d /image /scratch /init /pts /upper /work 2>/dev/null)]
echo up: $(ls /.. | tr '\n' ' ')
for namespace in pid mnt uts ipc cgroup; do echo ns $namespace: $(readlink /proc/self/ns/$namespace); done
echo cgroup: $(grep ^0 /proc/1/cgroup)
echo vsock: $(prober vsock-open 2>&1)
echo hello >/bin/written && echo written: $(cat /bin/written)
rm /bin/vi && echo removed: $(ls /bin/vi 2>&1)
echo disks: $(ls /dev | grep -c '^vd')
echo modules: $(insmod /bin/busybox 2>&1)
echo memory: $(head -c1 /dev/mem 2>&1)
echo sys: $(touch /sys/kernel/x 2>&1)
# An orphan: its parent ends at once, and we collect it.
sh -c 'sleep 0.2 & echo orphan: $!'
sleep 2
echo zombies: $(grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null | wc -l)
"#;
    let image = std::fs::read(artefacts::guest_programs()).unwrap();
    let ended = Vmm::prober().args(["--hostname", "box"]).shell(script).run().expect(0);
    assert_eq!(ended.field("pid"), "1");
    assert_eq!(ended.field("hostname"), "box");
    // The shell, and a subshell with its pipeline.
    assert!(ended.field("processes").parse::<u32>().unwrap() <= 5, "{}", ended.transcript());
    assert_eq!(ended.field("root"), "bin dev etc mnt proc root run sys tmp");
    assert_eq!(ended.field("up"), ended.field("root"), "there is nothing above /");
    assert_eq!(ended.field("mounts"), "0", "{}", ended.transcript());
    assert_eq!(ended.field("outer"), "[]");
    // What the kernel starts with has the first numbers (PROC_*_INIT_INO).
    for (namespace, first) in [
        ("pid", 0xeffffffcu32),
        ("mnt", 0xf000_0000),
        ("uts", 0xeffffffe),
        ("ipc", 0xefffffff),
        ("cgroup", 0xeffffffb),
    ] {
        let link = ended.field(&format!("ns {namespace}"));
        assert!(link.starts_with(namespace) && !link.contains(&format!("[{first}]")), "{link}");
    }
    assert_eq!(ended.field("cgroup"), "0::/", "it sees nothing of the cgroup that it is in");
    assert_eq!(ended.field("vsock"), "vsock: errno 97", "EAFNOSUPPORT");
    assert_eq!(ended.field("written"), "hello");
    assert!(ended.field("removed").contains("No such file"));
    assert_eq!(ended.field("disks"), "0");
    assert!(ended.field("modules").contains("insmod"));
    assert!(ended.field("memory").contains("head"));
    assert!(ended.field("sys").contains("Read-only"));
    assert_eq!(ended.field("zombies"), "0");
    assert_eq!(std::fs::read(artefacts::guest_programs()).unwrap(), image, "the image is as it was");
}

/// 20 MB each way, byte for byte, and what goes to standard error stays apart.
#[test]
fn bulk() {
    const BYTES: usize = 20_000_000;
    require_kvm!();
    let input: Vec<u8> = prober::Pattern::bytes(BYTES).into_iter().rev().collect();
    let sum = prober::Checksum::of(&input);
    let ended = Vmm::prober()
        .arg("-i")
        .stdin(input)
        .shell(&format!("prober checksum >&2 && prober pattern {BYTES} && echo done >&2"))
        .run()
        .expect(0);
    assert_eq!(ended.err(), format!("input: {BYTES} {sum:016x}\ndone\n"));
    assert_eq!(ended.stdout.len(), BYTES);
    assert!(ended.stdout == prober::Pattern::bytes(BYTES), "the bytes are others");
}

/// The image's own command, on an ext4 image; its file is as it was.
#[test]
fn sample_of_ext4() {
    require_kvm!();
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("ctr.ext4.img");
    std::fs::copy(artefacts::sample_ext4(), &image).unwrap();
    let ended = Vmm::kernel(artefacts::vmlinux())
        .arg("--rootfs")
        .arg(&image)
        .args(["--hostname", "sample"])
        .run()
        .expect(0);
    let out = ended.out();
    assert!(out.starts_with("Hello from a container in a virtual machine of its own.\n"), "{out}");
    assert!(out.contains("hostname   sample") && out.contains("1 demo") && out.contains("Linux version 6."));
    assert!(std::fs::read(&image).unwrap() == std::fs::read(artefacts::sample_ext4()).unwrap());
}

#[test]
fn environment_directory_and_user() {
    require_kvm!();
    let script = "echo home: $HOME; echo given: $GIVEN; echo inherited: ${VMM_TEST_INHERITED-none}; echo empty: [$EMPTY]; \
                  echo directory: $(pwd); echo user: $(id -u):$(id -g); echo args: $0 $1 $2; \
                  echo again >/dev/stdout; echo stdin: $(wc -c)";
    let ended = Vmm::container()
        .args(["-e", "GIVEN=a b=c", "-e", "EMPTY=", "-e", "VMM_TEST_INHERITED"])
        .args(["-w", "/srv/new", "-u", "65534:100"])
        .command(&["sh", "-c", script, "zero", "o n e", "*"])
        .run()
        .expect(0);
    assert_eq!(ended.field("given"), "a b=c");
    assert_eq!(ended.field("inherited"), "none", "it is not set here either");
    assert_eq!(ended.field("empty"), "[]");
    assert_eq!(ended.field("directory"), "/srv/new");
    assert_eq!(ended.field("user"), "65534:100");
    assert!(ended.field("args").starts_with("zero o n e"));
    assert!(ended.out().contains("\nagain\n"));
    assert_eq!(ended.field("stdin"), "0", "without -i there is none");
}

#[test]
fn exit_code_3_and_streams_apart() {
    require_kvm!();
    let ended = Vmm::container().shell("printf 'out\\0\\377'; printf 'err\\n' >&2; exit 3").run().expect(3);
    assert_eq!(ended.stdout, b"out\0\xff");
    assert_eq!(ended.stderr, b"err\n");
}

#[test]
fn exit_code_126_not_executable() {
    require_kvm!();
    let ended = Vmm::container().command(&["/etc/passwd"]).run().expect(126);
    ended.refused(&["/etc/passwd"]);
}

#[test]
fn exit_code_127_not_there() {
    require_kvm!();
    let ended = Vmm::container().command(&["no-such-command", "--flag"]).run().expect(127);
    ended.refused(&["no-such-command"]);
}

/// pid 1 of a namespace cannot be killed from inside it, but by its kernel: here for the processor time that it took.
#[test]
fn exit_code_137_killed() {
    require_kvm!();
    let ended = Vmm::container().shell("echo spinning; ulimit -t 2; while :; do :; done").run().expect(137);
    assert_eq!(ended.out(), "spinning\n");
}

#[test]
fn sigterm_reaches_a_trap() {
    require_kvm!();
    let running = Vmm::container()
        .shell("trap 'echo got TERM; exit 7' TERM; trap 'echo got USR1' USR1; echo ready; while :; do sleep 0.2; done")
        .start();
    running.wait_for("ready");
    running.signal(Signal::USR1);
    running.wait_for("got USR1");
    running.signal(Signal::TERM);
    let ended = running.wait().expect(7);
    assert!(ended.out().ends_with("got TERM\n"));
}

/// Who ignores every signal is ended all the same by the third.
#[test]
fn who_insists_is_heard() {
    require_kvm!();
    let running = Vmm::container().shell("trap '' TERM INT; echo ready; while :; do sleep 1; done").start();
    running.wait_for("ready");
    assert_eq!(running.insist(Signal::INT).code(), 130);
}

/// Before there is a container, a signal ends `vmm`.
#[test]
fn sigterm_while_booting() {
    require_kvm!();
    let running = Vmm::container().cold().command(&["true"]).start();
    // Its handler is there when the machine's own threads are.
    let tasks = format!("/proc/{}/task", running.pid());
    loop {
        let names = std::fs::read_dir(&tasks)
            .unwrap()
            .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
        if names.into_iter().any(|name| name.trim() == "session") {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    running.signal(Signal::TERM);
    assert_eq!(running.wait().code(), 143);
}

/// A terminal: its size, a new size, Ctrl-C, its modes before and after.
#[test]
fn terminal() {
    require_kvm!();
    let terminal = Terminal::open(33, 101);
    // A signal ends `read`, or waits for its end.
    let script = "trap 'echo now: $(stty size)' WINCH; trap 'echo got INT' INT; \
                  echo size: $(stty size) tty: $(tty); echo ready; \
                  until read -t 1 -r line; do :; done; echo line: $line; exit 5";
    let running = Vmm::container().args(["-i", "-t"]).shell(script).start_on(&terminal);
    running.wait_for("ready");
    assert!(!terminal.is_cooked(), "every key goes to the guest");
    terminal.resize(40, 120);
    running.wait_for("now: 40 120");
    terminal.type_keys("\x03");
    running.wait_for("got INT");
    terminal.type_keys("typed\r");
    let ended = running.wait().expect(5);
    assert_eq!(ended.field("size"), "33 101 tty: /dev/pts/0");
    assert_eq!(ended.field("line"), "typed");
    assert!(terminal.is_cooked(), "the terminal is given back as it was");
}
