//! A vCPU that is called back from the guest all the time goes on where it was: nothing of the guest's state may depend on when.

#![allow(clippy::unwrap_used, reason = "tests may")]

use std::fs;
use std::thread::sleep;
use std::time::Duration;

use tests::{Vmm, require_kvm};

/// The first real-time signal that glibc leaves to programs (`SIGRTMIN`): what vmm kicks its vCPUs with.
const KICK: libc::c_int = 34;

/// The thread of process `pid` with this name.
fn thread(pid: u32, name: &str) -> Option<libc::pid_t> {
    fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten().find_map(|task| {
        let comm = fs::read_to_string(task.path().join("comm")).ok()?;
        (comm.trim() == name).then(|| task.file_name().to_str()?.parse().ok())?
    })
}

#[test]
fn thousands_of_kicks_change_nothing() {
    require_kvm!();
    let script =
        "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; echo counted to $i; ls / | wc -l; exit 5";
    let running = Vmm::container().cold().shell(script).start();
    let pid = running.pid();
    let vcpu = loop {
        match thread(pid, "vcpu0") {
            Some(vcpu) => break vcpu,
            None => sleep(Duration::from_millis(5)),
        }
    };
    let process = libc::pid_t::try_from(pid).unwrap();
    let kicker = std::thread::spawn(move || {
        let mut kicks = 0;
        // SAFETY: tgkill takes three numbers; a thread that is gone is an error, and the end.
        while unsafe { libc::syscall(libc::SYS_tgkill, process, vcpu, KICK) } == 0 {
            kicks += 1;
            sleep(Duration::from_millis(3));
        }
        kicks
    });
    let ended = running.wait().expect(5);
    let kicks = kicker.join().unwrap();
    assert!(ended.out().starts_with("counted to 200000\n"), "{}", ended.out());
    assert!(kicks > 100, "only {kicks} kicks");
}
