//! Snapshots from somebody who wants us harm: every checksum is right, and the content is not. And saves that are cut short.
//!
//! What a guest does with registers and memory that never were its own is the guest's affair: it may run, panic or be lost. `vmm` says
//! what is wrong in one line, or ends as it does with any guest; it does not panic, die of a signal or hang, and touches nothing.
//! `VMM_HOSTILE_VARIANTS` in the environment asks for more variants than the usual ones, without a limit of time.

#![allow(clippy::unwrap_used, reason = "tests may")]

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tests::{Ended, Running, Vmm, artefacts, require_kvm, require_root};

const COUNT: &str = "trap 'exit 3' TERM; i=0; while :; do echo n$i; i=$((i+1)); sleep 0.1; done";

/// A generator of its own: the same variants every time.
struct Dice(u64);

impl Dice {
    fn word(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn roll(&mut self, sides: usize) -> usize {
        usize::try_from(self.word() >> 11).unwrap() % sides
    }
}

/// A container that counts, and its control API.
fn counting(socket: &Path) -> Running {
    let running = Vmm::container().arg("--api-socket").arg(socket).shell(COUNT).start();
    running.wait_for("n3");
    running
}

fn save(socket: &Path, directory: &Path) -> Ended {
    Vmm::new().args(["snapshot", "save"]).arg(socket).arg(directory).run()
}

fn inspect(directory: &Path) -> Ended {
    Vmm::new().args(["snapshot", "inspect", "--verify"]).arg(directory).run()
}

/// A snapshot of a container that counts.
fn snapshot(home: &Path) -> PathBuf {
    let (socket, directory) = (home.join("api"), home.join("good"));
    let running = counting(&socket);
    save(&socket, &directory).expect(0);
    end(running);
    directory
}

/// Ends it as a person would who has no patience, and looks at how it ended.
#[track_caller]
fn end(running: Running) -> Ended {
    for _ in 0..3 {
        running.signal(Signal::TERM);
        std::thread::sleep(Duration::from_millis(60));
    }
    let ended = running.wait();
    assert_eq!(ended.status.signal(), None, "{}", ended.transcript());
    ended
}

/// The manifest with other values for some of its fields, and the checksum that belongs to it.
fn forge_manifest(directory: &Path, change: impl FnOnce(&mut serde_json::Value)) {
    let path = directory.join("manifest");
    let text = fs::read_to_string(&path).unwrap();
    let mut json = serde_json::from_str(text.split_once('\n').unwrap().1).unwrap();
    change(&mut json);
    let json = json.to_string();
    let first = format!("vmm-snapshot 1 {} {:08x}", json.len(), crc32fast::hash(json.as_bytes()));
    fs::remove_file(&path).unwrap();
    fs::write(&path, format!("{first}\n{json}")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
}

fn forge_state(directory: &Path, bytes: &[u8]) {
    fs::remove_file(directory.join("state")).unwrap();
    fs::write(directory.join("state"), bytes).unwrap();
    fs::set_permissions(directory.join("state"), fs::Permissions::from_mode(0o600)).unwrap();
    forge_manifest(directory, |json| {
        json["state"]["bytes"] = bytes.len().into();
        json["state"]["crc"] = crc32fast::hash(bytes).into();
    });
}

/// A copy whose memory is the same file, or one of its own.
fn copy(from: &Path, to: &Path, own_memory: bool) {
    let _ = fs::remove_dir_all(to);
    fs::create_dir(to).unwrap();
    fs::set_permissions(to, fs::Permissions::from_mode(0o700)).unwrap();
    for name in ["manifest", "state"] {
        fs::copy(from.join(name), to.join(name)).unwrap();
    }
    if own_memory {
        let copied = std::process::Command::new("cp")
            .args(["--sparse=always", "--preserve=mode"])
            .args([from.join("memory"), to.join("memory")])
            .status();
        assert!(copied.unwrap().success());
    } else {
        fs::hard_link(from.join("memory"), to.join("memory")).unwrap();
    }
}

/// The pages of a memory file that are no zeros.
fn pages(memory: &fs::File) -> Vec<u64> {
    let pages = memory.metadata().unwrap().len() / 4096 - 1;
    let mut page = [0; 4096];
    (0..pages)
        .filter(|number| {
            memory.read_exact_at(&mut page, number * 4096).unwrap();
            page != [0; 4096]
        })
        .collect()
}

/// Spoils the copy in `directory`, in the way that belongs to `number`; says how.
fn spoil(directory: &Path, number: usize, variants: usize, dice: &mut Dice, used: &[u64]) -> String {
    if number % 4 == 3 {
        let memory = fs::OpenOptions::new().write(true).open(directory.join("memory")).unwrap();
        let count = [1, 20, 400, used.len()][dice.roll(4)];
        for _ in 0..count {
            let page = used[dice.roll(used.len())];
            let words: Vec<u8> = match dice.roll(3) {
                0 => vec![0xff; 4096],
                1 => (0..512).flat_map(|_| dice.word().to_le_bytes()).collect(),
                // Entries of page tables and rings that look right.
                _ => (0..512_u64)
                    .flat_map(|i| ((dice.word() & 0xfff_f000) | 0x67 | i << 52).to_le_bytes())
                    .collect(),
            };
            let at = dice.roll(500) * 8;
            let len = if dice.roll(2) == 0 { 4096 - at } else { 8 };
            memory.write_all_at(&words[at..at + len], page * 4096 + at as u64).unwrap();
        }
        return format!("{count} pages");
    }
    let mut state = fs::read(directory.join("state")).unwrap();
    // All of the state in turn: chips, vCPUs with registers, MSRs and local APIC, devices.
    let at = state.len() * number / variants + dice.roll(32);
    let at = at.min(state.len() - 1);
    let len = [1, 2, 8, 64][dice.roll(4)].min(state.len() - at);
    let kind = dice.roll(4);
    for byte in &mut state[at..at + len] {
        *byte = match kind {
            0 => 0xff,
            1 => 0,
            2 => *byte ^ 1 << dice.roll(8),
            _ => u8::try_from(dice.roll(256)).unwrap(),
        };
    }
    forge_state(directory, &state);
    format!("{len} bytes of state at {at}, kind {kind}")
}

#[test]
fn forged_snapshots_harm_nobody() {
    require_kvm!();
    let home = tempfile::tempdir().unwrap();
    let good = snapshot(home.path());
    let before = identity(&good);
    let image = identity(artefacts::sample().parent().unwrap());
    let used = pages(&fs::File::open(good.join("memory")).unwrap());
    let wanted = std::env::var("VMM_HOSTILE_VARIANTS").ok().map(|count| count.parse().unwrap());
    let variants: usize = wanted.unwrap_or(60);
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    let (begin, bad) = (Instant::now(), home.path().join("bad"));
    let mut outcomes = std::collections::BTreeMap::<i32, usize>::new();
    for number in 0..variants {
        if wanted.is_none() && begin.elapsed() > Duration::from_secs(60) {
            println!("{number} of {variants} variants in a minute");
            break;
        }
        copy(&good, &bad, number % 4 == 3);
        let how = spoil(&bad, number, variants, &mut dice, &used);
        let restored = Vmm::new().arg("restore").arg(&bad).limit(Duration::from_secs(40)).start();
        let patience = Instant::now();
        while patience.elapsed() < Duration::from_millis(400) && restored.is_running() {
            std::thread::sleep(Duration::from_millis(10));
        }
        let ended = end(restored);
        let said = ended.err();
        let code = ended.code();
        assert!(
            !said.contains("panicked") && !said.contains("RUST_BACKTRACE"),
            "{how}\n{}",
            ended.transcript()
        );
        // Refused; the container's own or ours by signal; the guest's panic or loss.
        assert!([0, 3, 125, 143, 250, 251].contains(&code), "{how}: {code}\n{}", ended.transcript());
        if code == 125 {
            assert!(said.lines().count() >= 1 && said.starts_with("vmm: "), "{how}\n{}", ended.transcript());
        }
        *outcomes.entry(code).or_default() += 1;
    }
    println!("exit codes and how often: {outcomes:?}");
    assert_eq!(identity(&good), before, "the snapshot was written to");
    assert_eq!(identity(artefacts::sample().parent().unwrap()), image, "the images were written to");
    // The honest one works as ever.
    let restored = Vmm::new().arg("restore").arg(&good).start();
    restored.wait_for_count("n", 3);
    end(restored);
}

/// Names, lengths and times of the files in a directory.
fn identity(directory: &Path) -> Vec<(PathBuf, u64, i64, i64)> {
    let mut files: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let found = fs::metadata(&path).unwrap();
            (path, found.len(), found.mtime(), found.mtime_nsec())
        })
        .collect();
    files.sort();
    files
}

/// A guest gets no file of the host by a manifest that names one.
#[test]
fn forged_manifests_get_nothing_of_the_host() {
    require_kvm!();
    let home = tempfile::tempdir().unwrap();
    let good = snapshot(home.path());
    let secret = home.path().join("secret");
    fs::write(&secret, vec![b'x'; 4096]).unwrap();
    let before = identity(home.path());
    let bad = home.path().join("bad");
    let forged = |change: &dyn Fn(&mut serde_json::Value)| {
        copy(&good, &bad, false);
        forge_manifest(&bad, change);
        let ended = Vmm::new().arg("restore").arg(&bad).limit(Duration::from_secs(40)).run();
        assert_eq!(ended.code(), 125, "{}", ended.transcript());
        ended
    };
    let named = |json: &mut serde_json::Value| {
        json["config"]["devices"][0]["block"]["path"] = secret.to_str().unwrap().into();
        json["config"]["devices"][0]["block"]["read_only"] = false.into();
    };
    // A writable disk that the snapshot does not bring along; then the same without any disks.
    forged(&named).refused(&["manifest is damaged", "disk"]);
    forged(&|json| {
        named(json);
        json["disks"] = serde_json::json!([]);
    })
    .refused(&["a disk is missing"]);
    // Another file in the place of the read-only disk.
    forged(&|json| json["disks"][0]["content"]["Shared"]["path"] = secret.to_str().unwrap().into())
        .refused(&["secret", "since the snapshot was saved"]);
    for (field, value) in [("vcpus", 0.into()), ("vcpus", 255.into()), ("devices", serde_json::json!([]))] {
        forged(&|json| json["config"][field] = value.clone()).refused(&["bad"]);
    }
    forged(&|json| json["memory"]["size"] = u64::MAX.into()).refused(&["memory is damaged"]);
    forged(&|json| json["guest"] = "greeted".into()).refused(&["template"]);
    // Others may write it.
    copy(&good, &bad, false);
    fs::set_permissions(&bad, fs::Permissions::from_mode(0o777)).unwrap();
    Vmm::new().arg("restore").arg(&bad).run().refused(&["chmod go-w"]);
    fs::remove_dir_all(&bad).unwrap();
    assert_eq!(identity(home.path()), before);
}

/// Whoever can write the file can cut it short; that is the end, and the reason is said.
#[test]
fn memory_that_goes_away_is_explained() {
    require_kvm!();
    let home = tempfile::tempdir().unwrap();
    let good = snapshot(home.path());
    let restored = Vmm::new().arg("restore").arg(&good).limit(Duration::from_secs(60)).start();
    restored.wait_for_count("n", 2);
    let memory = fs::OpenOptions::new().write(true).open(good.join("memory")).unwrap();
    memory.set_len(0).unwrap();
    std::thread::sleep(Duration::from_millis(1500));
    let ended = end(restored);
    assert!([3, 125, 143, 250, 251].contains(&ended.code()), "{}", ended.transcript());
    assert!(!ended.err().contains("panicked"), "{}", ended.transcript());
}

#[test]
fn a_save_that_is_killed_leaves_the_old_or_the_new() {
    require_kvm!();
    let home = tempfile::tempdir().unwrap();
    let directory = snapshot(home.path());
    let socket = home.path().join("api2");
    let mut dice = Dice(42);
    for round in 0..6 {
        let running = Vmm::new().arg("restore").arg(&directory).arg("--api-socket").arg(&socket).start();
        running.wait_for_count("n", 2);
        // Over the very snapshot from which it goes on.
        save(&socket, &directory).expect(0);
        assert_eq!(leftovers(home.path()), Vec::<String>::new(), "round {round}: the next save cleans up");
        let saver = {
            let (socket, directory) = (socket.clone(), directory.clone());
            std::thread::spawn(move || while save(&socket, &directory).code() == 0 {})
        };
        std::thread::sleep(Duration::from_millis(20 + u64::try_from(dice.roll(250)).unwrap()));
        running.signal(Signal::KILL);
        running.wait();
        saver.join().unwrap();
        let found = inspect(&directory).expect(0);
        assert!(found.out().contains("here; all of its memory"), "round {round}\n{}", found.transcript());
        let _ = fs::remove_file(&socket);
    }
    let restored = Vmm::new().arg("restore").arg(&directory).arg("--api-socket").arg(&socket).start();
    restored.wait_for_count("n", 2);
    save(&socket, &directory).expect(0);
    assert_eq!(leftovers(home.path()), Vec::<String>::new());
    end(restored);
}

fn leftovers(home: &Path) -> Vec<String> {
    let names = fs::read_dir(home).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.contains(".partial-")).collect()
}

#[test]
fn saves_that_cannot_be_change_nothing() {
    require_kvm!();
    require_root!();
    let home = tempfile::tempdir().unwrap();
    let (socket, full, locked) =
        (home.path().join("api"), home.path().join("full"), home.path().join("locked"));
    fs::create_dir(&full).unwrap();
    fs::create_dir(&locked).unwrap();
    let script = format!(
        "umask 0; mount -t tmpfs -o size=4m none {} && mount -t tmpfs -o ro none {} && exec \"$@\"",
        full.display(),
        locked.display()
    );
    let running = Vmm::container()
        .within(&["unshare", "--mount", "--propagation", "private", "sh", "-c", &script, "sh"])
        .arg("--api-socket")
        .arg(&socket)
        .shell(COUNT)
        .start();
    running.wait_for("n3");
    let theirs = |path: &Path| PathBuf::from(format!("/proc/{}/root{}", running.pid(), path.display()));
    let file = home.path().join("file");
    fs::write(&file, "mine").unwrap();
    let link = home.path().join("link");
    std::os::unix::fs::symlink(home.path(), &link).unwrap();
    let foreign = home.path().join("foreign");
    fs::create_dir(&foreign).unwrap();
    fs::write(foreign.join("manifest"), "mine").unwrap();
    for (target, words) in [
        (full.join("snap"), "No space left"),
        (locked.join("snap"), "Read-only file system"),
        (file.clone(), "something else"),
        (link, "something else"),
        (foreign.clone(), "something else"),
        (file.join("below"), "file"),
    ] {
        let ended = save(&socket, &target);
        assert_eq!(ended.code(), 1, "{}", ended.transcript());
        assert_eq!(ended.err().lines().count(), 1, "{}", ended.transcript());
        assert!(ended.err().contains(words), "{words}\n{}", ended.transcript());
    }
    for directory in [&full, &locked] {
        assert_eq!(fs::read_dir(theirs(directory)).unwrap().count(), 0, "{}", directory.display());
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), "mine");
    assert_eq!(fs::read_dir(&foreign).unwrap().count(), 1);
    assert_eq!(leftovers(home.path()), Vec::<String>::new());
    // It goes on, and can be saved where there is room; to nobody else but us, whatever the umask.
    let count = running.so_far().matches('n').count();
    running.wait_for_count("n", count + 5);
    let good = home.path().join("good");
    save(&socket, &good).expect(0);
    assert_eq!(fs::metadata(&good).unwrap().mode() & 0o777, 0o700);
    for entry in fs::read_dir(&good).unwrap() {
        assert_eq!(entry.unwrap().metadata().unwrap().mode() & 0o777, 0o600);
    }
    end(running);
}

#[test]
fn little_memory_is_said() {
    require_kvm!();
    let home = tempfile::tempdir().unwrap();
    let good = snapshot(home.path());
    for mib in [60_u64, 100, 200, 260, 280, 300, 400] {
        let limit = format!("--as={}", mib << 20);
        let restored = Vmm::new()
            .within(&["prlimit", &limit])
            .arg("restore")
            .arg(&good)
            .limit(Duration::from_secs(60))
            .start();
        std::thread::sleep(Duration::from_millis(500));
        let ended = end(restored);
        if mib <= 260 {
            ended.refused(&[]);
        } else {
            assert!([3, 125, 143].contains(&ended.code()), "{mib} MiB: {}", ended.transcript());
        }
    }
}
