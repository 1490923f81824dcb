//! What a test needs of the host. What is not there skips the test by name, or fails it where `CI=true` says that it must be
//! there.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::OnceLock;

/// Returns from the test, with a line that names it, unless `/dev/kvm` can be used.
#[macro_export]
macro_rules! require_kvm {
    () => {
        $crate::require!($crate::require::kvm(), "/dev/kvm")
    };
}

/// Returns from the test, with a line that names it, unless we are root: namespaces, TAPs and bind mounts need it.
#[macro_export]
macro_rules! require_root {
    () => {
        $crate::require!($crate::require::root(), "root")
    };
}

/// Returns from the test, with a line that names it, unless this host emulates kernel mode. Elsewhere there is nothing to test:
/// so this is never a failure.
#[macro_export]
macro_rules! require_emulated_kernel_mode {
    () => {
        if !$crate::require::kernel_mode_is_emulated() {
            println!("skipped: {} needs a host that emulates kernel mode", $crate::test_name!());
            return;
        }
    };
}

/// Returns from the test, with a line that names it, unless `$condition` holds.
#[macro_export]
macro_rules! require {
    ($condition:expr, $what:expr) => {
        if !$crate::require::have($condition, $what, $crate::test_name!()) {
            return;
        }
    };
}

/// The name of the test that it stands in.
#[macro_export]
macro_rules! test_name {
    () => {{
        fn here() {}
        let name = ::std::any::type_name_of_val(&here);
        name.strip_suffix("::here").unwrap_or(name)
    }};
}

/// Whether `present`; says that `test` is skipped, or panics with `CI=true`, where not.
pub fn have(present: bool, what: &str, test: &str) -> bool {
    if !present {
        assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "{test} needs {what}, and CI=true");
        println!("skipped: {test} needs {what}");
        // For the count at the end of ./scripts/test.
        if let Some(list) = std::env::var_os("VMM_SKIPPED")
            && let Ok(mut list) = File::options().append(true).create(true).open(list)
        {
            let _ = writeln!(list, "{test} needs {what}");
        }
    }
    present
}

/// Whether `/dev/kvm` can be opened for use.
pub fn kvm() -> bool {
    static USABLE: OnceLock<bool> = OnceLock::new();
    *USABLE.get_or_init(|| {
        File::options().read(true).write(true).open("/dev/kvm").is_ok_and(|kvm| kvm.as_raw_fd() >= 0)
    })
}

/// Whether we are root.
pub fn root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Whether this host emulates kernel mode, as `vmm info` says.
pub fn kernel_mode_is_emulated() -> bool {
    static EMULATED: OnceLock<bool> = OnceLock::new();
    *EMULATED.get_or_init(|| {
        let info = Command::new(crate::artefacts::vmm()).args(["info", "--json"]).output();
        let text = info.map(|output| output.stdout).unwrap_or_default();
        let json: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
        json.pointer("/kvm/kernel_mode").or(json.get("kernel_mode")).is_some_and(|mode| mode == "emulated")
    })
}

/// Bytes of memory that a guest could have without anybody suffering.
pub fn memory_available() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
