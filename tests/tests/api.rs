//! `vmm ctl`: a real guest that is started, paused, given a disk and shut down.

#![allow(clippy::unwrap_used, reason = "tests may")]

use std::time::Duration;

use prober::{Checksum, Pattern};
use tests::machine::Place;
use tests::{Vmm, require_kvm};

/// Counts until it is told to end.
const COUNT: &str =
    "trap 'echo got TERM; exit 7' TERM; n=0; while :; do n=$((n+1)); echo count: $n; sleep 0.1; done";

/// Started later, paused, resumed, and asked to end; what does not fit its state is refused.
#[test]
fn pause_resume_and_an_orderly_end() {
    require_kvm!();
    let place = Place::new();
    let api = place.api("api");
    let running = Vmm::container().api(&api).arg("--paused").shell(COUNT).start();
    while !api.socket().exists() {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(api.done(&[]).contains("created"), "{}", api.done(&[]));
    api.refuses(&["pause"], &["running"]);
    api.done(&["start"]);
    running.wait_for("count: 1\n");
    api.refuses(&["start"], &["running"]);
    api.refuses(&["resume"], &["running"]);

    api.done(&["pause"]);
    api.refuses(&["pause"], &["paused"]);
    // What it has printed already arrives; nothing more is printed.
    std::thread::sleep(Duration::from_millis(500));
    let before = running.so_far();
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(running.so_far(), before, "it stands still");
    assert!(api.done(&["describe"]).contains("paused"));
    api.done(&["resume"]);
    let printed = before.matches("count: ").count();
    running.wait_for_count("count: ", printed + 3);

    let metrics = api.done(&["metrics"]);
    assert!(metrics.contains("vCPU 0") && metrics.contains("(vsock)"), "{metrics}");
    let prometheus = api.done(&["metrics", "--prometheus"]);
    assert!(prometheus.contains("# TYPE"), "{prometheus}");
    let json: serde_json::Value = serde_json::from_str(&api.done(&["--json"])).unwrap();
    assert_eq!(json["state"], "running");

    api.done(&["shutdown"]);
    let ended = running.wait().expect(7);
    assert!(ended.out().ends_with("got TERM\n"), "{}", ended.transcript());
    assert_eq!(ended.err(), "");
    assert!(!api.socket().exists(), "the socket is gone");
}

/// Who does not listen is ended when the time is up; and at once by force.
#[test]
fn an_end_by_force() {
    require_kvm!();
    let place = Place::new();
    for words in [&["shutdown", "--timeout", "0.5"][..], &["shutdown", "--force"]] {
        let api = place.api("api");
        let script = "trap '' TERM; echo ready; while :; do sleep 1; done";
        let running = Vmm::container().api(&api).shell(script).start();
        running.wait_for("ready");
        api.done(words);
        let ended = running.wait();
        assert_ne!(ended.code(), 7);
        assert!(!api.socket().exists(), "the socket is gone");
    }
}

/// A slot of the description's gets its disk while the guest runs.
#[test]
fn a_disk_comes_later() {
    require_kvm!();
    const BYTES: usize = 1 << 20;
    let place = Place::new();
    let api = place.api("api");
    let config = place.path("machine.json");
    std::fs::write(&config, r#"{"devices": [{"block": {}}]}"#).unwrap();
    let disk = place.path("disk");
    std::fs::write(&disk, Pattern::bytes(BYTES)).unwrap();
    let script = "echo size: $(blockdev --getsize64 /dev/vdb); \
                  until [ $(blockdev --getsize64 /dev/vdb) -gt 0 ]; do sleep 0.1; done; \
                  prober checksum </dev/vdb; prober pattern 512 | dd of=/dev/vdb seek=9 conv=notrunc,fsync 2>/dev/null";
    let running = Vmm::prober().arg("--config").arg(&config).api(&api).shell(script).start();
    running.wait_for("size: 0");
    let json: serde_json::Value = serde_json::from_str(&api.done(&["--json"])).unwrap();
    let devices = json["devices"].as_array().unwrap();
    let spare = devices.iter().find(|d| d["kind"] == "block" && d["backend"].is_null()).unwrap();
    let (slot, disk) = (spare["slot"].to_string(), disk.to_str().unwrap());
    api.refuses(&["attach", "99", "--disk", disk], &["99"]);
    api.refuses(&["attach", &slot, "--disk", &format!("{disk},ro")], &["read-only"]);
    api.done(&["attach", &slot, "--disk", disk]);
    let ended = running.wait().expect(0);
    assert_eq!(ended.field("input"), format!("{BYTES} {:016x}", Checksum::of(&Pattern::bytes(BYTES))));
    let written = std::fs::read(disk).unwrap();
    assert!(written[9 * 512..10 * 512] == Pattern::bytes(512), "what the guest wrote is in the file");
}
