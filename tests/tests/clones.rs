//! `vmm snapshot clone`: one machine becomes many, each a machine of its own.

#![allow(clippy::unwrap_used, reason = "tests may")]

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tests::machine::Place;
use tests::{Vmm, require_kvm};

const CLONES: usize = 20;

/// A clone that somebody else started: gone when this is.
struct Clone {
    pid: i32,
    hostname: String,
    machine_id: String,
    socket: PathBuf,
    output: PathBuf,
}

impl Clone {
    fn read(json: &serde_json::Value) -> Self {
        let text = |key: &str| json[key].as_str().unwrap().to_owned();
        Clone {
            pid: i32::try_from(json["pid"].as_i64().unwrap()).unwrap(),
            hostname: text("hostname"),
            machine_id: text("machine_id"),
            socket: text("api_socket").into(),
            output: text("output").into(),
        }
    }

    /// What the guest said of itself, when it has.
    #[track_caller]
    fn changed(&self) -> Vec<String> {
        let begun = Instant::now();
        loop {
            let out = fs::read_to_string(&self.output).unwrap();
            let line = out.lines().find_map(|line| line.strip_prefix("changed: "));
            if let Some(line) = line.filter(|_| out.ends_with('\n')) {
                return line.split(' ').map(str::to_owned).collect();
            }
            assert!(begun.elapsed() < Duration::from_secs(120), "{} printed {out:?}", self.output.display());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// What its process has open, but for what has no identity.
    fn files(&self) -> BTreeSet<PathBuf> {
        // Descriptors that cargo and the runner of the tests leave to everybody are not vmm's doing.
        let inherited = files("self");
        files(&self.pid.to_string()).difference(&inherited).cloned().collect()
    }
}

fn files(process: &str) -> BTreeSet<PathBuf> {
    let entries = fs::read_dir(format!("/proc/{process}/fd")).unwrap().flatten();
    let links = entries.filter_map(|entry| fs::read_link(entry.path()).ok());
    let nameless =
        |link: &PathBuf| link.starts_with("/dev") || link.to_string_lossy().starts_with("anon_inode:");
    links.filter(|link| !nameless(link)).collect()
}

impl Drop for Clone {
    fn drop(&mut self) {
        let _ = kill_process(Pid::from_raw(self.pid).unwrap(), Signal::KILL);
    }
}

fn distinct<'a>(what: &str, of: impl Iterator<Item = &'a str>) {
    let all: Vec<_> = of.collect();
    assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), all.len(), "{what}: {all:?}");
}

#[test]
fn twenty_clones_are_twenty_machines() {
    require_kvm!();
    let place = Place::new();
    let (api, directory, disk) = (place.api("api"), place.path("clones"), place.disk("disk", 1));
    let script = "echo mine >/dev/vdb; exec prober changed";
    let original = Vmm::prober().disk(&disk).api(&api).shell(script).start();
    original.wait_for("original: ");
    let nonce = original.so_far().trim().rsplit(' ').next().unwrap().to_owned();
    let ended = Vmm::new()
        .args(["snapshot", "clone", "--json", "-n", &CLONES.to_string(), "--directory"])
        .arg(&directory)
        .arg(api.socket())
        .run();
    let json: serde_json::Value = serde_json::from_slice(&ended.stdout).unwrap_or_default();
    let clones: Vec<_> = json.as_array().into_iter().flatten().map(Clone::read).collect();
    let ended = ended.expect(0);
    assert_eq!((clones.len(), ended.err().as_str()), (CLONES, ""));

    let said: Vec<_> = clones.iter().map(Clone::changed).collect();
    for (clone, said) in clones.iter().zip(&said) {
        assert_eq!(said[0], clone.hostname);
        assert_eq!(said[1], clone.machine_id);
        assert_eq!(said[3], nonce, "its memory is the original's");
    }
    distinct("names", said.iter().map(|said| said[0].as_str()));
    distinct("machine ids", said.iter().map(|said| said[1].as_str()));
    distinct("random numbers", said.iter().map(|said| said[2].as_str()).chain([nonce.as_str()]));
    assert!(!original.so_far().contains("changed"), "the original is who it was");

    // Each can be asked; none has a file of another's but what nobody writes.
    let files: Vec<_> = clones.iter().map(Clone::files).collect();
    for (clone, files) in clones.iter().zip(&files).take(3) {
        let state = Vmm::new().arg("ctl").arg(&clone.socket).run().expect(0).out();
        assert!(state.contains("running"), "{state}");
        assert!(files.contains(&clone.output), "{files:?}");
    }
    let shared: BTreeSet<_> = files[0].intersection(&files[1]).collect();
    let read_only = |link: &&&PathBuf| {
        let name = link.to_string_lossy();
        // The image; what the disk was and the memory when the clones were made, which they map copy-on-write.
        name.ends_with("tests.img") || name.contains("/snapshot/")
    };
    let wrong: Vec<_> = shared.iter().filter(|link| !read_only(link)).collect();
    assert!(wrong.is_empty(), "two clones share {wrong:?}");

    // They end, leave no sockets, and the original does not mind.
    for clone in &clones {
        Vmm::new().arg("ctl").arg(&clone.socket).args(["shutdown", "--force"]).run().expect(0);
    }
    // The answer comes before the end.
    let begun = Instant::now();
    while let Some(clone) = clones.iter().find(|clone| clone.socket.exists()) {
        assert!(begun.elapsed() < Duration::from_secs(60), "{} is still there", clone.socket.display());
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(api.done(&[]).contains("running"));
}
