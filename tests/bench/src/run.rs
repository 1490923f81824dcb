//! One run of vmm, with its own account of it (`--timing=json`).

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::time::{ClockId, clock_gettime};
use serde::Deserialize;

/// What is run.
#[derive(Clone)]
pub struct Setup {
    /// The binary.
    pub vmm: PathBuf,
    /// The kernel.
    pub kernel: PathBuf,
    /// The container's image.
    pub rootfs: PathBuf,
}

/// What vmm says of its own run, and when it was started and had ended.
pub struct Account {
    started: Duration,
    ended: Duration,
    timing: Timing,
}

#[derive(Deserialize)]
struct Timing {
    phases: Vec<Phase>,
    kvm_setup_ns: u64,
}

#[derive(Deserialize)]
struct Phase {
    phase: String,
    monotonic_ns: u64,
    emulated_instructions: Option<u64>,
}

/// The clock that vmm's own marks are on.
fn now() -> Duration {
    let time = clock_gettime(ClockId::Monotonic);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

impl Setup {
    /// vmm with `arguments`, ready to be started.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.vmm);
        command.arg("--kernel").arg(&self.kernel).arg("--rootfs").arg(&self.rootfs).args(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Starts a container that runs until it is killed, and returns it once it has printed a line.
    pub fn start(&self, flags: &[&str], script: &str) -> anyhow::Result<Child> {
        let mut command = self.command(flags);
        started(command.args(["--", "/bin/sh", "-c", script]))
    }

    /// Boots a machine that runs `/bin/echo` in a container to its end.
    pub fn measure(&self) -> anyhow::Result<Account> {
        let mut command = self.command(&["--no-template", "--timing=json", "--", "/bin/echo", "hello"]);
        account(&mut command, b"hello\n")
    }
}

/// Starts `command`, and returns it once it has printed something.
pub fn started(command: &mut Command) -> anyhow::Result<Child> {
    let mut child = command.spawn()?;
    let mut byte = [0];
    let printed = child.stdout.as_mut().context("no stdout")?;
    std::io::Read::read_exact(printed, &mut byte).context("the container did not start")?;
    Ok(child)
}

/// Runs `command`, a vmm with `--timing=json` whose container is to print `expected`, to its end.
pub fn account(command: &mut Command, expected: &[u8]) -> anyhow::Result<Account> {
    let started = now();
    let output = command.output()?;
    let ended = now();
    let said = String::from_utf8_lossy(&output.stderr);
    if output.stdout != expected || !output.status.success() {
        bail!("the container did not run ({}): {said}", output.status);
    }
    let line = said.lines().last().unwrap_or_default();
    let timing = serde_json::from_str(line).with_context(|| format!("vmm's timing: {line}"))?;
    Ok(Account { started, ended, timing })
}

impl Account {
    fn phase(&self, name: &str) -> anyhow::Result<&Phase> {
        self.timing
            .phases
            .iter()
            .find(|p| p.phase == name)
            .with_context(|| format!("vmm did not reach {name}"))
    }

    /// Seconds from just before the process was made until it was gone.
    pub fn all_s(&self) -> f64 {
        self.ended.saturating_sub(self.started).as_secs_f64()
    }

    /// Milliseconds from just before the process was made to `phase`.
    pub fn wall_ms(&self, phase: &str) -> anyhow::Result<f64> {
        let at = Duration::from_nanos(self.phase(phase)?.monotonic_ns);
        Ok((at.saturating_sub(self.started)).as_secs_f64() * 1e3)
    }

    /// Milliseconds from just before the process was made to the first `KVM_RUN`, without those in KVM's system calls.
    pub fn own_ms(&self) -> anyhow::Result<f64> {
        let kvm = Duration::from_nanos(self.timing.kvm_setup_ns);
        Ok((self.wall_ms("first_run")? - kvm.as_secs_f64() * 1e3).max(0.0))
    }

    /// Millions of instructions that KVM had emulated by `phase`; `None` where the host does not emulate kernel mode.
    pub fn emulated(&self, phase: &str) -> anyhow::Result<Option<f64>> {
        let count = self.phase(phase)?.emulated_instructions.filter(|n| *n > 0);
        // Far below 2^52.
        #[allow(clippy::cast_precision_loss)]
        Ok(count.map(|n| n as f64 / 1e6))
    }
}

/// A file that must be there.
pub fn need(path: &Path) -> anyhow::Result<PathBuf> {
    if !path.exists() {
        bail!("{} is missing: run ./scripts/setup first", path.display());
    }
    Ok(path.to_path_buf())
}
