//! The agent's session with real namespaces, mounts and processes, on the machine that runs the tests. See `guest`.

#![allow(clippy::unwrap_used, reason = "tests")]

mod escape;
mod guest;
mod snapshot;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::thread;

use protocol::{ExitStatus, FailReason, FromAgent, Start, StreamKind, ToAgent, WindowSize};

use guest::{Guest, collect, command, disk, shell, text, unavailable};

/// Not a test: what each test starts as its guest.
#[test]
#[ignore = "started by the other tests"]
fn guest_process() {
    guest::process();
}

/// Not a test: a container that tries to get out of its root.
#[test]
#[ignore = "started by another test"]
fn escape_artist() {
    escape::try_everything();
}

fn exited(code: u8) -> FromAgent {
    FromAgent::Exited(ExitStatus::Code(code))
}

#[test]
fn output_and_exit_code() {
    if unavailable() {
        return;
    }
    let ran = Guest::boot().run(shell("echo out; echo err >&2; exit 3"));
    assert_eq!((ran.last, &*ran.stdout, &*ran.stderr), (exited(3), "out\n", "err\n"));
}

#[test]
fn the_container_is_a_world_of_its_own() {
    if unavailable() {
        return;
    }
    let script = "echo pid=$$ host=$(hostname) procs=$(ls -d /proc/[0-9]* | wc -l); cut -d' ' -f2,3 /proc/mounts; \
                  ls -l /dev | awk '{print $1, $NF}'; ls /; echo $(ls /proc/self/fd); id; \
                  grep -E 'Seccomp:|CapBnd' /proc/self/status; readlink /dev/stdout; echo x >/dev/null; umask; \
                  cat /sys/class/net/lo/flags; echo y >/etc/new; cat /etc/new; touch /sys/x";
    let ran = Guest::boot().run(Start { disks: vec![disk("vdb", "vda")], ..shell(script) });
    assert_eq!(ran.last, exited(1), "{} {}", ran.stdout, ran.stderr);
    let out = &ran.stdout;
    // PID 1, and the subshell, ls and wc.
    assert!(out.starts_with("pid=1 host=box procs="), "{out}");
    // In the order in which they were made: some before there was a container.
    let mounts = [
        "/sys sysfs",
        "/dev tmpfs",
        "/dev/shm tmpfs",
        "/dev/mqueue mqueue",
        "/dev/pts devpts",
        "/ overlay",
        "/proc proc",
    ];
    let seen: Vec<_> = out.lines().skip(1).take(mounts.len()).collect();
    assert_eq!(seen, mounts);
    for line in [
        "crw-rw-rw- null",
        "crw-rw-rw- tty",
        "brw-rw---- vdb",
        "lrwxrwxrwx /proc/self/fd/1",
        "lrwxrwxrwx pts/ptmx",
        "uid=0(root) gid=0(root)",
        "Seccomp:\t2",
        "0022",
        "y",
    ] {
        assert!(out.lines().any(|l| l == line), "{line}: {out}");
    }
    // stdio and the directory that is listed.
    assert!(out.lines().any(|l| l == "0 1 2 3"), "{out}");
    assert!(out.lines().any(|l| l == "0x9"), "loopback is not up: {out}");
    for outside in ["/image", "/scratch", "/control", "stream"] {
        assert!(!out.contains(outside), "{outside}: {out}");
    }
    let capabilities = out.lines().find_map(|l| l.strip_prefix("CapBnd:\t")).unwrap();
    assert_eq!(u64::from_str_radix(capabilities, 16).unwrap() & (1 << 16 | 1 << 17 | 1 << 22), 0);
    assert!(ran.stderr.contains("Read-only file system"), "{}", ran.stderr);
}

#[test]
fn no_way_out_of_the_root() {
    if unavailable() {
        return;
    }
    let arguments =
        ["/bin/tests", "--ignored", "--exact", "escape_artist", "--nocapture", "--test-threads=1"];
    let start = Start { env: vec![escape::VARIABLE.into()], ..command(&arguments) };
    let ran = Guest::boot().run(start);
    assert_eq!(ran.last, exited(0), "{} {}", ran.stdout, ran.stderr);
    // All of them were tried, and what lies below the container's root is not the agent's.
    assert!(ran.stdout.contains("below: clock control image stream\n"), "{}", ran.stdout);
}

#[test]
fn what_cannot_be_started() {
    if unavailable() {
        return;
    }
    let reason = |start| match Guest::boot().run(start).last {
        FromAgent::Failed { reason, message } => (reason, message),
        other => panic!("{other:?}"),
    };
    assert_eq!(reason(command(&["no-such"])).0, FailReason::NotFound);
    assert_eq!(reason(command(&["/bin/no-such"])).0, FailReason::NotFound);
    assert_eq!(reason(command(&["/bin/data"])).0, FailReason::NotExecutable);
    assert_eq!(reason(command(&["/etc"])).0, FailReason::NotExecutable);
    assert_eq!(reason(command(&[])).0, FailReason::Setup);
    let (kind, message) = reason(Start { user: "nobody".into(), ..command(&["true"]) });
    assert_eq!((kind, &*message), (FailReason::Setup, "no user \"nobody\" in the container's /etc/passwd"));
    let (kind, message) = reason(Start { disks: vec![disk("vdb", "../x")], ..command(&["true"]) });
    assert_eq!((kind, &*message), (FailReason::Setup, "\"../x\" is not the name of a disk"));
    assert_eq!(reason(Start { disks: vec![disk("vdb", "vdzz")], ..command(&["true"]) }).0, FailReason::Setup);
}

#[test]
fn users_directories_and_environment() {
    if unavailable() {
        return;
    }
    let start = Start {
        user: "web".into(),
        cwd: "/var/lib/made".into(),
        env: vec!["A=b c".into(), (&b"RAW=\xff\xfe"[..]).into()],
        ..shell("id -u; id -g; id -G; pwd; env; echo again >/dev/stdout; printf '\\377' | cat; touch x")
    };
    let mut guest = Guest::boot();
    guest.start(start);
    let [stdout, stderr] = guest.accept_pipes(false).try_into().map(|s: [_; 2]| s.map(collect)).unwrap();
    assert!(matches!(guest.hear(), FromAgent::Started { .. }));
    assert_eq!(guest.hear(), exited(1));
    let out = stdout.join().unwrap();
    assert!(out.starts_with(b"33\n34\n34 29\n/var/lib/made\n"), "{}", out.escape_ascii());
    assert!(out.ends_with(b"again\n\xff"), "{}", out.escape_ascii());
    for line in [&b"A=b c"[..], b"RAW=\xff\xfe", b"HOME=/srv", b"HOSTNAME=box"] {
        assert!(out.split(|&b| b == b'\n').any(|l| l == line), "{}", out.escape_ascii());
    }
    assert!(text(stderr).contains("Permission denied"));
}

#[test]
fn signals() {
    if unavailable() {
        return;
    }
    for (signal, last) in [(15, exited(7)), (9, FromAgent::Exited(ExitStatus::Signal(9)))] {
        let mut guest = Guest::boot();
        guest.start(shell("trap 'exit 7' TERM; echo ready; while :; do sleep 0.05; done"));
        let streams = guest.accept_pipes(false);
        let mut line = String::new();
        BufReader::new(&streams[0]).read_line(&mut line).unwrap();
        assert!(matches!(guest.hear(), FromAgent::Started { .. }));
        for nonsense in [0, -1, 65, i32::MAX] {
            guest.say(&ToAgent::Signal(nonsense));
        }
        guest.say(&ToAgent::Signal(signal));
        assert_eq!(guest.hear(), last);
    }
}

#[test]
fn many_bytes_through_stdin_and_stdout() {
    if unavailable() {
        return;
    }
    let mut guest = Guest::boot();
    guest.start(Start { stdin: true, ..command(&["cat"]) });
    let [stdin, stdout, stderr] = guest.accept_pipes(true).try_into().unwrap();
    let sent: Vec<u8> = (0..20_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let (stdout, stderr) = (collect(stdout), collect(stderr));
    (&stdin).write_all(&sent).unwrap();
    stdin.shutdown(Shutdown::Write).unwrap();
    assert!(matches!(guest.hear(), FromAgent::Started { .. }));
    assert_eq!(guest.hear(), exited(0));
    assert!(stdout.join().unwrap() == sent);
    assert_eq!(text(stderr), "");
}

#[test]
fn a_container_that_does_not_read() {
    if unavailable() {
        return;
    }
    let mut guest = Guest::boot();
    guest.start(Start { stdin: true, ..shell("exec 0<&-; sleep 0.3; echo fine") });
    let [stdin, stdout, _stderr] = guest.accept_pipes(true).try_into().unwrap();
    let stdout = collect(stdout);
    // Ends when the agent gives up the stream.
    assert!((&stdin).write_all(&vec![0; 20_000_000]).is_err());
    assert!(matches!(guest.hear(), FromAgent::Started { .. }));
    assert_eq!(guest.hear(), exited(0));
    assert_eq!(text(stdout), "fine\n");
}

#[test]
fn a_host_that_does_not_read() {
    if unavailable() {
        return;
    }
    let mut guest = Guest::boot();
    guest
        .start(shell("trap 'echo bye >&2; exit 7' TERM; yes & echo ready >&2; while :; do sleep 0.05; done"));
    let [stdout, stderr] = guest.accept_pipes(false).try_into().unwrap();
    let mut stderr = BufReader::new(stderr);
    let mut line = String::new();
    stderr.read_line(&mut line).unwrap();
    assert!(matches!(guest.hear(), FromAgent::Started { .. }));
    thread::sleep(std::time::Duration::from_millis(200));
    guest.say(&ToAgent::Signal(15));
    line.clear();
    stderr.read_to_string(&mut line).unwrap();
    assert_eq!(line, "bye\n");
    // What the pipe held is delivered all the same, and then the end is.
    let out = text(collect(stdout));
    assert!(out.len() > 60_000 && out.starts_with("y\ny\n"), "{}", out.len());
    assert_eq!(guest.hear(), exited(7));
}

#[test]
fn processes_in_the_background_end_with_the_first() {
    if unavailable() {
        return;
    }
    let ran = Guest::boot().run(shell("sleep 1000 & sleep 1000 & echo done"));
    assert_eq!((ran.last, &*ran.stdout), (exited(0), "done\n"));
}

#[test]
fn a_terminal() {
    if unavailable() {
        return;
    }
    let mut guest = Guest::boot();
    let script = "tty; stty size; stat -c %u /dev/console; echo $TERM; read x; stty size; echo got $x; seq 1 3000; exit 5";
    let terminal = Some(WindowSize { rows: 11, columns: 22 });
    guest.start(Start { terminal, stdin: true, ..shell(script) });
    let (kind, stream) = guest.accept();
    assert_eq!(kind, StreamKind::Terminal);
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut line = || {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        line
    };
    assert_eq!([line(), line(), line(), line()], ["/dev/pts/0\r\n", "11 22\r\n", "0\r\n", "xterm\r\n"]);
    assert!(matches!(guest.hear(), FromAgent::Started { .. }));
    guest.say(&ToAgent::Resize(WindowSize { rows: 33, columns: 44 }));
    // Two connections: the size is sure to be there only when the agent has had time to read it.
    thread::sleep(std::time::Duration::from_millis(200));
    (&stream).write_all(b"typed\r").unwrap();
    assert_eq!([line(), line(), line()], ["typed\r\n", "33 44\r\n", "got typed\r\n"]);
    let mut rest = String::new();
    reader.read_to_string(&mut rest).unwrap();
    assert!(rest.ends_with("2999\r\n3000\r\n") && rest.lines().count() == 3000);
    assert_eq!(guest.hear(), exited(5));
}

#[test]
fn the_end_of_what_is_typed() {
    if unavailable() {
        return;
    }
    let mut guest = Guest::boot();
    let terminal = Some(WindowSize { rows: 1, columns: 1 });
    guest.start(Start { terminal, stdin: true, ..shell("cat; echo over") });
    let (_, stream) = guest.accept();
    (&stream).write_all(b"line\r").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert!(text(collect(stream)).ends_with("line\r\nover\r\n"));
    assert!(matches!(guest.hear(), FromAgent::Started { .. }));
    assert_eq!(guest.hear(), exited(0));
}

#[test]
fn the_host_ends_it() {
    if unavailable() {
        return;
    }
    let mut guest = Guest::boot();
    guest.start(shell("trap 'echo bye; exit 4' TERM; while :; do sleep 0.05; done"));
    let [stdout, _stderr] = guest.accept_pipes(false).try_into().unwrap();
    assert!(matches!(guest.hear(), FromAgent::Started { .. }));
    // The trap is set when the shell has begun; a signal before that has no effect, and the grace ends.
    thread::sleep(std::time::Duration::from_millis(300));
    guest.say(&ToAgent::Shutdown);
    assert_eq!(guest.hear(), exited(4));
    assert_eq!(text(collect(stdout)), "bye\n");
    // Its end without a container, and its end with one that does not want to.
    Guest::boot().say(&ToAgent::Shutdown);
    let mut guest = Guest::boot();
    guest.start(command(&["sleep", "1000"]));
    let streams = guest.accept_pipes(false);
    assert!(matches!(guest.hear(), FromAgent::Started { .. }));
    guest.control.shutdown(Shutdown::Both).unwrap();
    guest.wait();
    drop(streams);
}

#[test]
fn the_machine_is_one_of_its_own() {
    if unavailable() {
        return;
    }
    let guest = Guest::boot();
    assert_eq!(guest.clocks(), [5_000_000_007]);
    let script = "cat /etc/machine-id; cat /proc/self/cgroup | grep ^0";
    let ran = guest.run(shell(script));
    assert_eq!(ran.stdout, format!("{}\n0::/\n", "ab".repeat(16)));
    assert_eq!(ran.last, exited(0), "{}", ran.stderr);
}
