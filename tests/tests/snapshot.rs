//! Save and restore: a guest that would notice goes on in another process as if nothing had been.

#![allow(clippy::unwrap_used, reason = "tests may")]

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tests::machine::{Api, Place, kill, restore};
use tests::{Ended, Running, TapNetwork, Vmm, require_kvm, require_root};

/// The last count that a witness (`prober witness`) has printed.
fn count(running: &Running) -> u64 {
    let out = running.so_far();
    let mut counts =
        out.lines().rev().filter_map(|line| line.strip_prefix("count: ")?.split(' ').next()?.parse().ok());
    counts.next().unwrap_or(0)
}

/// The first nonce that it has printed.
fn nonce(running: &Running) -> String {
    running.wait_for("nonce: ");
    running.wait_for("count: ");
    let out = running.so_far();
    out.lines().find_map(|line| Some(line.split_once("nonce: ")?.1.trim().to_owned())).unwrap()
}

/// Waits until all of a witness's writers have gone on, `times`.
#[track_caller]
fn goes_on(running: &Running, times: usize) {
    let before = running.so_far().matches("count: ").count();
    running.wait_for_count("count: ", before + times);
    assert!(!running.so_far().contains("broken"), "{}", running.so_far());
}

/// A guest's TCP connection, a line at a time.
struct Line(BufReader<TcpStream>);

impl Line {
    fn ask(&mut self, question: &str) -> String {
        writeln!(self.0.get_mut(), "{question}").unwrap();
        let mut answer = String::new();
        self.0.read_line(&mut answer).unwrap();
        answer.trim().to_owned()
    }

    fn number(&mut self, question: &str) -> u64 {
        self.ask(question).parse().unwrap()
    }
}

/// Counts, writes to a disk, holds a connection, and keeps a number in memory only.
fn a_guest_goes_on(cpus: &str) {
    let (place, network) = (Place::new(), TapNetwork::new());
    let (disk, saved) = (place.disk("disk", 1), place.path("saved"));
    let (first, second) = (place.api("first"), place.api("second"));
    let original = Vmm::prober()
        .within(&network.prefix())
        .args(["--cpus", cpus, "--net", "tap=tap0,ip=10.9.0.2/24"])
        .disk(&disk)
        .api(&first)
        .command(&["prober", "witness", "/dev/vdb", "5001"])
        .start();
    let nonce = nonce(&original);
    let mut line = network.within(|| {
        let stream = TcpStream::connect("10.9.0.2:5001").unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
        Line(BufReader::new(stream))
    });
    assert_eq!(line.ask("before"), "echo before");
    let before = line.number("count");
    let report = first.save(&saved, false);
    assert!(report.out().contains("frozen: copies"), "{}", report.transcript());
    // The original goes on, and so does not share its end with the copy.
    goes_on(&original, 1);
    let reached = count(&original);
    kill(original);
    let copy = restore(&saved, &second).within(&network.prefix()).start();
    goes_on(&copy, 2);
    assert_eq!(self::nonce(&copy), nonce, "memory has what it had");
    assert_eq!(line.ask("after"), "echo after", "the connection is the same");
    assert_eq!(line.ask("nonce"), nonce);
    assert!(line.number("count") > before, "it goes on where it was: {before}, {reached}");
    // A machine that is busy may wake anybody late.
    let slept = (0..3).map(|_| line.number("sleep")).min().unwrap();
    assert!((1000..=1500).contains(&slept), "a second took {slept} ms");
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let theirs = line.number("time");
    assert!(theirs.abs_diff(now) <= 5, "the guest's clock: {theirs}, not {now}");
    goes_on(&copy, 1);
    second.done(&["shutdown", "--force"]);
    copy.wait();
}

#[test]
fn a_guest_goes_on_with_1_vcpu() {
    require_kvm!();
    require_root!();
    a_guest_goes_on("1");
}

#[test]
fn a_guest_goes_on_with_2_vcpus() {
    require_kvm!();
    require_root!();
    a_guest_goes_on("2");
}

/// Rounds of save, kill and restore while blocks are written and read: as many as fit into a minute, or 100 with `VMM_SLOW`.
#[test]
fn no_request_is_lost_or_doubled() {
    require_kvm!();
    let slow = std::env::var_os("VMM_SLOW").is_some();
    let (rounds, limit) = if slow { (100, Duration::MAX) } else { (20, Duration::from_secs(45)) };
    let place = Place::new();
    let disk = place.disk("disk", 1);
    let mut api = place.api("0");
    let mut running = Vmm::prober()
        .args(["--cpus", "2"])
        .disk(&disk)
        .api(&api)
        .command(&["prober", "witness", "/dev/vdb", "0"])
        .start();
    let nonce = nonce(&running);
    let begun = Instant::now();
    let (mut done, mut last) = (0, 0);
    while done < rounds && begun.elapsed() < limit {
        done += 1;
        let next = place.api(&done.to_string());
        let saved = place.path(&format!("saved-{}", done % 2));
        api.save(&saved, false);
        kill(running);
        running = restore(&saved, &next).start();
        goes_on(&running, 1);
        assert_eq!(self::nonce(&running), nonce, "round {done}");
        let now = count(&running);
        assert!(now > last, "round {done}: it counted {now} after {last}");
        (last, api) = (now, next);
    }
    println!("{done} rounds, {last} blocks");
    assert!(done >= 2);
}

/// A snapshot, what has changed since, and what has changed since then: the last has all. Without the first it is worth nothing.
#[test]
fn diffs() {
    require_kvm!();
    let place = Place::new();
    let disk = place.disk("disk", 1);
    let (first, second) = (place.api("first"), place.api("second"));
    let original = Vmm::prober()
        .arg("--track-dirty")
        .disk(&disk)
        .api(&first)
        .command(&["prober", "witness", "/dev/vdb", "0"])
        .start();
    let nonce = nonce(&original);
    let names = ["whole", "diff", "diff-of-diff"].map(|name| place.path(name));
    let written = |directory: &Path| {
        use std::os::unix::fs::MetadataExt;
        std::fs::metadata(directory.join("memory")).unwrap().blocks() * 512
    };
    for (at, name) in names.iter().enumerate() {
        first.save(name, at > 0);
        goes_on(&original, 2);
    }
    kill(original);
    assert!(written(&names[1]) < written(&names[0]) / 2, "a diff is smaller");
    let list = Vmm::new().args(["snapshot", "ls"]).arg(place.path("")).run().expect(0).out();
    assert_eq!((list.matches("whole").count(), list.matches(" diff\n").count()), (2, 2), "{list}");
    let copy = restore(&names[2], &second).start();
    goes_on(&copy, 2);
    assert_eq!(self::nonce(&copy), nonce);
    kill(copy);
    Vmm::new().args(["snapshot", "rm"]).arg(&names[0]).run().expect(0);
    restore(&names[2], &place.api("third")).run().expect(125).refused(&["whole"]);
    let inspected = Vmm::new().args(["snapshot", "inspect"]).arg(&names[2]).run().expect(0);
    assert!(inspected.field("restores    not here").contains("whole"), "{}", inspected.transcript());
}

/// What a snapshot says of itself, and what cannot be restored.
#[test]
fn listed_inspected_removed_and_refused() {
    require_kvm!();
    let place = Place::new();
    let (saved, paused) = (place.path("saved"), place.path("paused"));
    let api = place.api("first");
    let original = Vmm::container().api(&api).shell("echo ready; exec sleep 1000").start();
    original.wait_for("ready");
    api.save(&saved, false);
    // Only whole machines have diffs.
    let diff = |to: &Path| Vmm::new().args(["snapshot", "save", "--diff"]).arg(api.socket()).arg(to).run();
    let refused = diff(&place.path("diff")).expect(1).err();
    assert!(refused.starts_with("vmm: ") && refused.contains("--track-dirty"), "{refused}");
    // A container that stood still before anybody could freeze it.
    api.done(&["pause"]);
    api.refuses(&["snapshot", paused.to_str().unwrap()], &["paused", "running"]);
    kill(original);

    let snapshot = |words: &[&str]| Vmm::new().arg("snapshot").args(words).run();
    let (above, saved) = (place.path(""), saved.to_str().unwrap());
    let list = snapshot(&["ls", above.to_str().unwrap()]).expect(0).out();
    let lines: Vec<_> = list.lines().collect();
    assert!(lines.len() == 2 && lines[0].starts_with("NAME"), "{list}");
    assert!(lines.iter().any(|line| line.starts_with("saved ") && line.contains("256M")), "{list}");
    let inspected = snapshot(&["inspect", "--verify", saved]).expect(0).out();
    for word in ["container", "1 vCPUs, 256M", "here; all of its memory is as it was written"] {
        assert!(inspected.contains(word), "{word:?} is not in {inspected}");
    }
    let json: serde_json::Value =
        serde_json::from_str(&snapshot(&["inspect", "--json", saved]).expect(0).out()).unwrap();
    assert_eq!(json["config"]["vcpus"], 1);

    let refuses = |directory: &Path, words: &[&str]| -> Ended {
        let ended = restore(directory, &place.api("second")).run().expect(125);
        ended.refused(words);
        assert!(!place.path("second").exists(), "the socket is gone");
        ended
    };
    refuses(&place.path("none"), &["none"]);
    refuses(Path::new(env!("CARGO_MANIFEST_DIR")), &["tests"]);
    let template = Vmm::new().args(["template", "ls"]).templates(tests::templates::store()).run().expect(0);
    let name = template.out().lines().nth(1).unwrap().split(' ').next().unwrap().to_owned();
    refuses(&tests::templates::store().join(&name), &["is a template"]);
    snapshot(&["inspect", above.to_str().unwrap()]).expect(125).refused(&["snapshot"]);

    snapshot(&["rm", saved]).expect(0);
    assert!(!Path::new(saved).exists());
    snapshot(&["rm", saved]).expect(125).refused(&["saved"]);
    snapshot(&["rm", env!("CARGO_MANIFEST_DIR")]).expect(125).refused(&["tests"]);
    assert!(Path::new(env!("CARGO_MANIFEST_DIR")).join("src").exists(), "what is no snapshot stays");
}

/// No machine is behind a socket.
#[test]
fn nobody_to_save() {
    let place = Place::new();
    let api: Api = place.api("nobody");
    api.ask(&["pause"]).expect(125).refused(&["nobody"]);
    let save = Vmm::new().args(["snapshot", "save"]).arg(api.socket()).arg(place.path("saved")).run();
    save.expect(125).refused(&["nobody"]);
}
