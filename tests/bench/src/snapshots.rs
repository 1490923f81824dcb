//! `bench snapshots`: warm starts, restores, clones, and how long a machine stands still to be saved.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;

use crate::memory;
use crate::report::{Demand, Figure, Report};
use crate::run::{Account, Setup, account, need, started};

/// vmm's default.
const GUEST_MIB: u64 = 256;
const CLONES: usize = 20;
/// How often clones are made: each time there are [`CLONES`] of them.
const ROUNDS: u32 = 5;
/// Long enough for a start's last work to be over.
const SETTLED: Duration = Duration::from_secs(1);
/// What a full guest has filled.
const FILLED: &str = "209715200";

/// Measures `runs` warm starts, restores and pauses, after one of each that warms caches and makes the template.
pub fn measure(vmm: &Path, images: &Path, runs: u32) -> anyhow::Result<Report> {
    let setup = Setup {
        vmm: need(vmm)?,
        kernel: need(&images.join("vmlinux"))?,
        rootfs: need(&images.join("ctr.img"))?,
    };
    let prober = Setup { rootfs: need(&images.join("tests.img"))?, ..setup.clone() };
    let place = Place::new()?;
    let demand = |must, aim| Some(Demand { must, aim });

    let warm =
        several("warm start", runs, || account(&mut setup.command(&["--timing=json", "--", "true"]), b""))?;
    let (saves, restored) = saved_and_restored(&setup, &place, runs)?;
    let clones = clones(&setup, &place, runs.min(ROUNDS))?;
    let full = full(&prober, &place, runs.min(ROUNDS))?;

    let own = |accounts: &[Account]| accounts.iter().map(Account::own_ms).collect::<anyhow::Result<Vec<_>>>();
    let emulated = |phase: &str| -> anyhow::Result<Vec<f64>> {
        warm.iter().filter_map(|a| a.emulated(phase).transpose()).collect()
    };
    let kind = if emulated("exit")?.is_empty() { "kernel mode on the CPU" } else { "emulated kernel mode" };
    let figures = [
        Figure::new("our own time to a template's first KVM_RUN", "ms", own(&warm)?, demand(5.0, 2.0)),
        Figure::new("our own time to a restored snapshot's", "ms", own(&restored)?, demand(5.0, 2.0)),
        Figure::new(
            "vmm --rootfs ctr.img -- true, warm, all in all",
            "s",
            warm.iter().map(Account::all_s).collect(),
            demand(2.5, 0.8),
        ),
        Figure::new("  emulated kernel instructions in it", "million", emulated("exit")?, demand(4.0, 1.5)),
        Figure::new("  of these until the image is mounted", "million", emulated("agent_up")?, None),
        Figure::new(
            "20 clones, all answering with their new identity",
            "s",
            clones.iter().map(|round| round.seconds).collect(),
            demand(8.0, 3.0),
        ),
        Figure::new(
            "memory of each further idle clone (PSS)",
            "MiB",
            clones.into_iter().flat_map(|round| round.memory_mib).collect(),
            demand(16.0, 8.0),
        ),
        Figure::new("pause of an idle guest for a snapshot to tmpfs", "ms", saves, demand(400.0, 100.0)),
        Figure::new("pause of one that has filled 200 MiB", "ms", full, demand(400.0, 100.0)),
    ];
    Ok(Report {
        title: format!("snapshots: 1 vCPU, {GUEST_MIB} MiB; medians of {runs} runs, of 5 at most for clones"),
        host: kind.into(),
        figures: figures.into_iter().flatten().collect(),
    })
}

fn several<T>(what: &str, runs: u32, work: impl Fn() -> anyhow::Result<T>) -> anyhow::Result<Vec<T>> {
    let mut results = Vec::new();
    for run in 0..=runs {
        eprintln!("{what}: run {run} of {runs}");
        let result = work()?;
        if run > 0 {
            results.push(result);
        }
    }
    Ok(results)
}

/// A directory of our own on a tmpfs, gone when this is.
struct Place(PathBuf);

impl Place {
    fn new() -> anyhow::Result<Self> {
        let path = Path::new("/dev/shm").join(format!("vmm-bench-{}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Place(path))
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).to_string_lossy().into_owned()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A machine, ended when this is dropped.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a machine says of having been saved.
#[derive(Deserialize)]
struct Saved {
    pause_us: u64,
    frozen: bool,
}

/// Has the machine at `socket` saved to `directory`, and returns how long it stood still, in milliseconds.
fn save(setup: &Setup, socket: &str, directory: &str) -> anyhow::Result<f64> {
    let mut command = Command::new(&setup.vmm);
    let output = command.args(["ctl", socket, "--json", "snapshot", directory]).output()?;
    if !output.status.success() {
        bail!(
            "not saved: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let saved: Saved = serde_json::from_slice(&output.stdout).context("vmm ctl snapshot")?;
    if !saved.frozen {
        bail!("the container was not frozen");
    }
    // Minutes at most.
    #[allow(clippy::cast_precision_loss)]
    Ok(saved.pause_us as f64 / 1e3)
}

/// Pauses of an idle guest, and the restores of what was saved: its container waits for input, which in the copies ends at once.
fn saved_and_restored(setup: &Setup, place: &Place, runs: u32) -> anyhow::Result<(Vec<f64>, Vec<Account>)> {
    let (socket, directory) = (place.path("idle.sock"), place.path("idle"));
    let script = "echo up; read nothing; exit 0";
    let mut command = setup.command(&["-i", "--api-socket", &socket, "--", "/bin/sh", "-c", script]);
    let machine = Machine(started(command.stdin(Stdio::piped()))?);
    std::thread::sleep(SETTLED);
    let saves = several("save", runs, || save(setup, &socket, &directory))?;
    drop(machine);
    let restored = several("restore", runs, || {
        let mut command = Command::new(&setup.vmm);
        command.args(["restore", &directory, "-i", "--timing=json"]).stdin(Stdio::null());
        account(&mut command, b"")
    })?;
    fs::remove_dir_all(&directory)?;
    Ok((saves, restored))
}

/// Pauses of a guest nearly all of whose memory has content.
fn full(setup: &Setup, place: &Place, runs: u32) -> anyhow::Result<Vec<f64>> {
    let (socket, directory) = (place.path("full.sock"), place.path("full"));
    eprintln!("filling a guest's memory");
    let mut command = setup.command(&["--api-socket", &socket, "--", "prober", "fill", FILLED]);
    let _machine = Machine(started(&mut command)?);
    std::thread::sleep(SETTLED);
    let saves = several("save a full guest", runs, || save(setup, &socket, &directory))?;
    fs::remove_dir_all(&directory)?;
    Ok(saves)
}

/// Clones that were made at once.
struct Round {
    seconds: f64,
    memory_mib: Vec<f64>,
}

#[derive(Deserialize)]
struct Clone {
    pid: u32,
}

/// The clones of one round, ended when this is dropped.
struct Clones(Vec<Clone>);

impl Drop for Clones {
    fn drop(&mut self) {
        for clone in &self.0 {
            if let Some(pid) = i32::try_from(clone.pid).ok().and_then(Pid::from_raw) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        // They are no children of ours. One that nobody has waited for has no words left.
        let lives = |clone: &Clone| {
            fs::read(format!("/proc/{}/cmdline", clone.pid)).is_ok_and(|words| !words.is_empty())
        };
        while self.0.iter().any(lives) {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn clones(setup: &Setup, place: &Place, rounds: u32) -> anyhow::Result<Vec<Round>> {
    let socket = place.path("original.sock");
    let original = setup.start(&["--api-socket", &socket], "echo up; exec sleep 1000")?;
    let _original = Machine(original);
    std::thread::sleep(SETTLED);
    several("20 clones", rounds, || round(setup, place, &socket))
}

fn round(setup: &Setup, place: &Place, socket: &str) -> anyhow::Result<Round> {
    let (directory, answer) = (place.path("clones"), place.path("answer"));
    let begun = Instant::now();
    let status = Command::new(&setup.vmm)
        .args(["snapshot", "clone", socket, "-n", &CLONES.to_string(), "--json", "--directory", &directory])
        .stdin(Stdio::null())
        .stdout(File::create(&answer)?)
        .status()?;
    let seconds = begun.elapsed().as_secs_f64();
    if !status.success() {
        bail!("vmm snapshot clone: {status}");
    }
    let clones = Clones(serde_json::from_slice(&fs::read(&answer)?).context("vmm snapshot clone")?);
    if clones.0.len() != CLONES {
        bail!("{} clones instead of {CLONES}", clones.0.len());
    }
    std::thread::sleep(SETTLED);
    let memory_mib =
        clones.0.iter().map(|clone| memory::proportional_mib(clone.pid)).collect::<anyhow::Result<_>>()?;
    drop(clones);
    fs::remove_dir_all(&directory)?;
    Ok(Round { seconds, memory_mib })
}
