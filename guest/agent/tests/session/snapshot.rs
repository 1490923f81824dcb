//! What the agent does around a snapshot: holds the container, and in the copy makes another machine of this one. The tests copy nothing, so
//! the copy is the original, which is all the same to the agent.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use protocol::{ExitStatus, FromAgent, Identity, Network, Seed, Start, StreamKind, ToAgent};

use crate::exited;
use crate::guest::{Guest, collect, shell, text, unavailable};

fn identity(hostname: Option<&str>) -> ToAgent {
    ToAgent::Restored(Box::new(Identity {
        clock: 7_000_000_009,
        seed: Seed([3; 32]),
        hostname: hostname.map(Into::into),
        machine_id: [0xcd; 16],
        network: None,
    }))
}

fn freeze(guest: &mut Guest) {
    guest.say(&ToAgent::Freeze);
    assert_eq!(guest.hear(), FromAgent::Frozen);
}

/// Whether these tests cannot run here.
fn cannot_freeze() -> bool {
    if unavailable() {
        return true;
    }
    let v2 = std::fs::read_to_string("/proc/mounts").unwrap().contains(" cgroup2 ");
    assert!(v2 || std::env::var("CI").is_err(), "needs cgroup v2");
    if !v2 {
        eprintln!("skipped: needs cgroup v2");
    }
    !v2
}

/// What comes on a stream within a moment.
fn what_comes(mut stream: &UnixStream) -> String {
    stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let mut bytes = Vec::new();
    let mut piece = [0; 4096];
    // Until nothing comes for that long.
    while let Ok(count @ 1..) = stream.read(&mut piece) {
        bytes.extend_from_slice(&piece[..count]);
    }
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    String::from_utf8(bytes).unwrap()
}

#[test]
fn without_a_container_nothing_has_to_be_held() {
    if unavailable() {
        return;
    }
    let mut guest = Guest::greeted();
    freeze(&mut guest);
    guest.say(&ToAgent::Thaw);
    guest.begin();
    assert_eq!(guest.run(shell("exit 4")).last, exited(4));
}

#[test]
fn a_frozen_container_does_nothing_and_notices_nothing() {
    if cannot_freeze() {
        return;
    }
    // Several processes, one in a session of its own, one that keeps making others, and one that is waited for as after vfork.
    let script = "trap 'echo got USR1' USR1; trap 'echo CONT' CONT; (while :; do echo child; sleep 0.01; done) & \
                  (while :; do true & wait $!; done) & setsid sh -c 'while :; do echo session; sleep 0.01; done' & \
                  while :; do echo main; sleep 0.01; done";
    let mut guest = Guest::boot();
    guest.start(shell(script));
    let [stdout, _stderr] = guest.accept_pipes(false).try_into().unwrap();
    assert!(matches!(guest.hear(), FromAgent::Started { .. }));
    let mut reader = BufReader::new(&stdout);
    let mut wait_for = |what: &str| {
        let mut line = String::new();
        while line.trim() != what {
            line.clear();
            assert!(reader.read_line(&mut line).unwrap() > 0, "{what} did not come");
        }
    };
    for round in 0..5 {
        for who in ["main", "child", "session"] {
            wait_for(who);
        }
        freeze(&mut guest);
        what_comes(&stdout);
        assert_eq!(what_comes(&stdout), "", "round {round}");
        guest.say(&ToAgent::Signal(10));
        assert_eq!(what_comes(&stdout), "", "a signal does not wake it");
        guest.say(&ToAgent::Thaw);
        wait_for("got USR1");
    }
    guest.say(&ToAgent::Signal(9));
    assert_eq!(guest.hear(), FromAgent::Exited(ExitStatus::Signal(9)));
    assert!(!text(collect(stdout)).contains("CONT"));
}

#[test]
fn a_freeze_can_be_taken_back() {
    if cannot_freeze() {
        return;
    }
    let mut guest = Guest::boot();
    guest.start(shell("echo ready; read line; exit 6"));
    let [stdout, _stderr] = guest.accept_pipes(false).try_into().unwrap();
    assert!(matches!(guest.hear(), FromAgent::Started { .. }));
    drop(stdout);
    for _ in 0..50 {
        guest.say(&ToAgent::Freeze);
        guest.say(&ToAgent::Thaw);
        match guest.hear() {
            FromAgent::Frozen => (),
            // Without input it ends at once, but each question is answered before.
            last => return assert_eq!(last, exited(6)),
        }
    }
}

#[test]
fn streams_are_served_while_it_is_frozen() {
    if cannot_freeze() {
        return;
    }
    let mut guest = Guest::boot();
    guest.start(Start { stdin: true, ..shell("echo ready; cat") });
    let [stdin, stdout, stderr] = guest.accept_pipes(true).try_into().unwrap();
    assert!(matches!(guest.hear(), FromAgent::Started { .. }));
    let mut ready = [0; 6];
    (&stdout).read_exact(&mut ready).unwrap();
    freeze(&mut guest);
    // More than a pipe and a socket hold together: the rest goes when it runs again.
    let sent = vec![b'x'; 1 << 20];
    let writer = std::thread::spawn({
        let (mut stdin, sent) = (stdin.try_clone().unwrap(), sent.clone());
        move || {
            stdin.write_all(&sent).unwrap();
            stdin.shutdown(std::net::Shutdown::Write).unwrap();
        }
    });
    assert_eq!(what_comes(&stdout), "");
    guest.say(&identity(None));
    let FromAgent::Restored { streams } = guest.hear() else { panic!() };
    let kinds: Vec<_> = streams.iter().map(|(kind, _)| *kind).collect();
    assert_eq!(kinds, [StreamKind::Stdin, StreamKind::Stdout, StreamKind::Stderr]);
    let (stdout, stderr) = (collect(stdout), collect(stderr));
    writer.join().unwrap();
    assert!(stdout.join().unwrap() == sent);
    assert_eq!(guest.hear(), exited(0));
    assert_eq!(text(stderr), "");
}

#[test]
fn the_copy_is_another_machine() {
    if cannot_freeze() {
        return;
    }
    let mut guest = Guest::boot();
    let report = "hostname; cat /etc/machine-id; echo $(ifconfig eth0 | grep -oE 'HWaddr [^ ]*|inet addr:[^ ]*'); \
                  echo $(route -n | grep ^0.0.0.0 | cut -c 1-31)";
    let network = Network {
        interface: "eth0".into(),
        mac: Some([2, 0, 0, 0, 0, 1]),
        address: "10.9.0.2/24".parse().ok(),
        gateway: Some([10, 9, 0, 1].into()),
    };
    let start = Start {
        stdin: true,
        network: Some(network.clone()),
        ..shell(&format!("while read line; do {report}; done; exit 5"))
    };
    guest.start(start);
    let [stdin, stdout, _stderr] = guest.accept_pipes(true).try_into().unwrap();
    assert!(matches!(guest.hear(), FromAgent::Started { .. }));
    let mut reader = BufReader::new(&stdout);
    let mut ask = || {
        (&stdin).write_all(b"go\n").unwrap();
        [(); 4].map(|()| {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            line.trim_end().to_owned()
        })
    };
    let before = ["box", &"ab".repeat(16), "HWaddr 02:00:00:00:00:01 inet addr:10.9.0.2", "0.0.0.0 10.9.0.1"];
    assert_eq!(ask(), before);

    // Nothing new but what is always new.
    freeze(&mut guest);
    guest.say(&identity(None));
    assert!(matches!(guest.hear(), FromAgent::Restored { .. }));
    let same = [before[0], &"cd".repeat(16), before[2], before[3]];
    assert_eq!(ask(), same);

    freeze(&mut guest);
    let network = Network {
        mac: Some([2, 0, 0, 0, 0, 9]),
        address: "10.7.0.3/16".parse().ok(),
        gateway: Some([10, 7, 7, 7].into()),
        ..network
    };
    let ToAgent::Restored(mut other) = identity(Some("other")) else { panic!() };
    other.network = Some(network);
    guest.say(&ToAgent::Restored(other));
    assert!(matches!(guest.hear(), FromAgent::Restored { .. }));
    let after =
        ["other", &"cd".repeat(16), "HWaddr 02:00:00:00:00:09 inet addr:10.7.0.3", "0.0.0.0 10.7.7.7"];
    assert_eq!(ask(), after);
    assert_eq!(guest.clocks(), [5_000_000_007, 7_000_000_009, 7_000_000_009]);
    stdin.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(guest.hear(), exited(5));
}

#[test]
fn who_cannot_become_another_does_not_go_on() {
    if cannot_freeze() {
        return;
    }
    let mut guest = Guest::boot();
    guest.start(shell("while :; do sleep 0.01; echo on; done"));
    let [stdout, _stderr] = guest.accept_pipes(false).try_into().unwrap();
    assert!(matches!(guest.hear(), FromAgent::Started { .. }));
    freeze(&mut guest);
    what_comes(&stdout);
    guest.say(&identity(Some(&"x".repeat(65))));
    assert!(matches!(guest.hear(), FromAgent::Failed { .. }));
    assert_eq!(what_comes(&stdout), "");
}

#[test]
fn an_end_is_not_told_twice() {
    if cannot_freeze() {
        return;
    }
    let mut guest = Guest::boot();
    guest.start(shell("echo said; exec sleep 1000"));
    let [stdout, _stderr] = guest.accept_pipes(false).try_into().unwrap();
    assert!(matches!(guest.hear(), FromAgent::Started { .. }));
    assert_eq!(what_comes(&stdout), "said\n");
    freeze(&mut guest);
    // The freezer lets through what kills.
    guest.say(&ToAgent::Signal(9));
    guest.control.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    assert!(protocol::read_message::<FromAgent>(&mut guest.control).is_err(), "it is told after the thaw");
    guest.control.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    guest.say(&identity(Some("other")));
    assert!(matches!(guest.hear(), FromAgent::Restored { .. }));
    assert_eq!(guest.hear(), FromAgent::Exited(ExitStatus::Signal(9)));
}

#[test]
fn a_frozen_container_can_be_ended() {
    if cannot_freeze() {
        return;
    }
    let mut guest = Guest::boot();
    guest.start(shell("trap 'exit 8' TERM; echo ready; while :; do sleep 0.01; done"));
    let [stdout, _stderr] = guest.accept_pipes(false).try_into().unwrap();
    assert!(matches!(guest.hear(), FromAgent::Started { .. }));
    assert_eq!(what_comes(&stdout), "ready\n");
    freeze(&mut guest);
    guest.say(&ToAgent::Shutdown);
    assert_eq!(guest.hear(), exited(8));
}
