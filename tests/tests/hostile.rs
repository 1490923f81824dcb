//! Hostile processes in the guest. Whatever they try, each dies alone, as on a processor, and the machine goes on.
//!
//! On hosts that emulate kernel mode this is about the VMM, which stands in for the processor there; on others about the
//! processor, and passes for a lesser reason.

#![allow(clippy::unwrap_used, reason = "tests may")]

use tests::{Vmm, artefacts, require, require_kvm};

const KILLED: &str = "signal 11";
const ILLEGAL: &str = "signal 4";
const TRAPPED: &str = "signal 5";
/// It went through, and did nothing that is not a process's own business.
const HARMLESS: &str = "exit 9";

/// Attempts for which processors differ, or whose instruction a process may have.
fn expected(attempt: &str) -> &'static [&'static str] {
    match attempt {
        // Let in where it looks like a system call, and then it is one. A processor faults.
        "lstar, as a syscall would" if require::kernel_mode_is_emulated() => &["exit 0"],
        "non-canonical stack" => &[KILLED, "signal 7"],
        "ud2" | "clac" | "rsm" => &[ILLEGAL],
        // Every make of processor has its own answer; a hypervisor's is an error in a register.
        "vmcall" | "vmmcall" | "monitor" => &[ILLEGAL, KILLED, HARMLESS],
        // #GP on a processor; #UD where the host cannot say which instruction it could not emulate.
        "int 14" | "int 0x20" => &[KILLED, ILLEGAL],
        // Depends on what the kernel switched on.
        "xgetbv" | "xrstor" => &[ILLEGAL, HARMLESS, KILLED],
        "sysret" => &[ILLEGAL, KILLED],
        "int3" | "int 3" | "icebp" | "single step over a syscall" => &[TRAPPED],
        "cmpxchg16b" | "popcnt" | "fwait" | "fxsave" => &[HARMLESS],
        "syscall with the direction and alignment flags" | "syscall across pages" => &[HARMLESS],
        // No port, for nobody.
        "iopl" | "ioperm" => &["-1"],
        _ => &[KILLED],
    }
}

#[test]
fn processes_die_alone() {
    require_kvm!();
    let address = |symbol| format!("{:#x}", artefacts::kernel_symbol(symbol));
    let script = format!(
        "prober hostile {} {}; echo code: $?; echo alive: $(cat /proc/uptime)",
        address("entry_SYSCALL_64"),
        address("asm_exc_page_fault")
    );
    let directory = tempfile::tempdir().unwrap();
    let console = directory.path().join("console");
    let ended = Vmm::prober()
        .cold()
        .arg("--console")
        .arg(&console)
        .args(["--cmdline", "loglevel=0"])
        .limit(std::time::Duration::from_secs(900))
        .shell(&script)
        .run()
        .expect(0);
    assert_eq!(ended.field("code"), "0");
    assert!(!ended.field("alive").is_empty());
    let mut wrong = Vec::new();
    let mut attempts = 0;
    for line in ended.out().lines() {
        let Some((attempt, outcome)) = line.trim_end().split_once(": ") else { continue };
        if ["code", "alive"].contains(&attempt) {
            continue;
        }
        attempts += 1;
        if !expected(attempt).contains(&outcome) {
            wrong.push(format!("{attempt}: {outcome}, not {:?}", expected(attempt)));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    let written = std::fs::read_to_string(&console).unwrap();
    assert!(!written.contains("!!"), "a process wrote to the serial port: {written:?}");
    assert!(attempts > 70, "{attempts} attempts\n{}", ended.transcript());
}

/// Two processes that take turns on one processor, and two that run on two.
#[test]
fn processes_keep_their_registers() {
    require_kvm!();
    let ended =
        Vmm::prober().args(["--cpus", "2"]).shell("taskset 1 prober registers; prober registers").run();
    let ended = ended.expect(0);
    let outcomes: Vec<_> =
        ended.out().lines().filter_map(|l| l.strip_prefix("registers: ").map(str::to_owned)).collect();
    assert_eq!(outcomes, ["kept", "kept"], "{}", ended.transcript());
}
