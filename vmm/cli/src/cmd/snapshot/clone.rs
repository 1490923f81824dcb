//! `vmm snapshot clone SOCKET -n N`: a running machine becomes many, each in a process of its own.
//!
//! The machine is saved once, and every clone maps the same memory copy-on-write. When all of them run the snapshot's name is removed:
//! what they map stays for as long as they do.

use std::collections::VecDeque;
use std::fs::{self, DirBuilder, File};
use std::io::{self, BufRead, BufReader, PipeReader, pipe};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use machine::api::client::Answer;
use machine::config::DeviceConfig;
use machine::snapshot::manifest::GuestStage;
use machine::snapshot::{SnapshotId, directory};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Serialize;

use super::ctl;
use crate::exit_code;
use crate::log_line::say;

/// How long a clone may take, on a host that is busy with all of them.
const PATIENCE: Duration = Duration::from_secs(120);

/// A clone.
#[derive(Serialize)]
struct Clone {
    number: u16,
    pid: u32,
    hostname: String,
    machine_id: String,
    api_socket: PathBuf,
    output: PathBuf,
    log: PathBuf,
}

/// A clone whose guest has not answered yet.
struct Starting {
    clone: Clone,
    child: Child,
    ready: BufReader<PipeReader>,
}

/// Makes `count` clones of the machine at `socket`.
pub fn run(socket: &Path, count: u16, place: Option<&Path>, json: bool) -> anyhow::Result<u8> {
    let begun = Instant::now();
    let place = make_place(place)?;
    let snapshot = place.join("snapshot");
    let saved = ctl::snapshot(socket, &snapshot, false).map(Answer::content);
    if !matches!(saved, Ok(Ok(_))) {
        // Only if it is empty.
        let _ = fs::remove_dir(&place);
    }
    if let Err(refusal) = saved? {
        say(&format!("vmm: {refusal}"));
        return Ok(exit_code::REFUSED);
    }
    let clones = start(&place, &snapshot, count);
    // Whoever runs has it mapped.
    let removed = directory::remove(&snapshot);
    if clones.is_err() {
        let _ = fs::remove_dir(&place);
    }
    let clones = clones?;
    removed?;
    if json {
        println!("{}", serde_json::to_string_pretty(&clones)?);
        return Ok(0);
    }
    println!("{:<8}{:>8}  {:<16}{:<34}API SOCKET", "CLONE", "PID", "HOSTNAME", "MACHINE ID");
    for clone in &clones {
        let socket = clone.api_socket.display();
        println!(
            "{:<8}{:>8}  {:<16}{:<34}{socket}",
            clone.number, clone.pid, clone.hostname, clone.machine_id
        );
    }
    println!(
        "{count} clones in {:.2} s; what they print is in {}/N.out",
        begun.elapsed().as_secs_f64(),
        place.display()
    );
    Ok(0)
}

fn make_place(place: Option<&Path>) -> anyhow::Result<PathBuf> {
    let place = match place {
        Some(place) => std::path::absolute(place)?,
        None => {
            let run = Path::new("/run/vmm");
            let above = if rustix::process::geteuid().is_root() && fs::create_dir_all(run).is_ok() {
                run.to_path_buf()
            } else {
                std::env::temp_dir()
            };
            above.join(format!("clones-{}", SnapshotId::random()?))
        }
    };
    let made = DirBuilder::new().recursive(true).mode(0o700).create(&place);
    made.with_context(|| format!("cannot make {}", place.display()))?;
    Ok(place)
}

/// Starts all clones, and waits until each has become a machine of its own. When one does not, none is left.
///
/// No more at once than there are processors: where kernel mode is emulated a tick of the guest's clock costs a millisecond or two, and
/// guests of which each gets a tenth of a processor do little else than tick.
fn start(place: &Path, snapshot: &Path, count: u16) -> anyhow::Result<Vec<Clone>> {
    let manifest = directory::manifest(snapshot)?;
    if manifest.guest != GuestStage::Frozen {
        bail!(
            "the machine runs no container: in an ordinary VM nobody could make each clone another one; use vmm snapshot save, and vmm restore"
        );
    }
    let has_card = manifest.config.devices.iter().any(|device| matches!(device, DeviceConfig::Net(_)));
    let at_once = std::thread::available_parallelism().map_or(1, usize::from);
    let mut numbers = 1..=count;
    let mut starting = VecDeque::with_capacity(at_once);
    let mut running = Vec::with_capacity(count.into());
    let mut failure = None;
    loop {
        while failure.is_none() && starting.len() < at_once {
            let Some(number) = numbers.next() else { break };
            match spawn(place, snapshot, number, has_card) {
                Ok(clone) => starting.push_back(clone),
                Err(error) => failure = Some(error),
            }
        }
        let Some(mut clone) = starting.pop_front() else { break };
        let mut line = String::new();
        let heard = wait(clone.ready.get_ref()).and_then(|()| clone.ready.read_line(&mut line));
        if failure.is_none() && !matches!(heard, Ok(1..)) {
            let log = fs::read_to_string(&clone.clone.log).unwrap_or_default();
            let said = log.lines().last().unwrap_or("it said nothing").to_owned();
            failure = Some(anyhow::anyhow!("clone {} did not start: {said}", clone.clone.number));
        }
        running.push(clone);
    }
    if let Some(failure) = failure {
        for mut clone in running {
            let _ = clone.child.kill();
            let _ = clone.child.wait();
        }
        bail!(failure);
    }
    Ok(running.into_iter().map(|clone| clone.clone).collect())
}

fn spawn(place: &Path, snapshot: &Path, number: u16, has_card: bool) -> anyhow::Result<Starting> {
    let machine_id = SnapshotId::random()?.to_string();
    let hostname = format!("vmm-{}", machine_id.get(..8).unwrap_or_default());
    let file = |ending: &str| place.join(format!("{number}.{ending}"));
    let (api_socket, output, log) = (file("sock"), file("out"), file("log"));
    let (ready, tell) = pipe().context("cannot make a pipe")?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0("vmm").arg("restore").arg(snapshot).arg("--api-socket").arg(&api_socket);
    command.args(["--hostname", &hostname, "--machine-id", &machine_id]);
    if has_card {
        // One TAP cannot have two cards. The API gives each its own.
        command.args(["--net", "none"]);
    }
    // The pipe comes as standard input, which a clone has none of.
    command.args(["--ready-fd", "0"]).stdin(tell);
    command.stdout(File::create(&output).with_context(|| format!("cannot make {}", output.display()))?);
    command.stderr(File::create(&log).with_context(|| format!("cannot make {}", log.display()))?);
    // Not of our terminal's foreground: its Ctrl-C is not for them.
    command.process_group(0);
    let child = command.spawn().context("cannot start a clone")?;
    let clone = Clone { number, pid: child.id(), hostname, machine_id, api_socket, output, log };
    Ok(Starting { clone, child, ready: BufReader::new(ready) })
}

/// Waits until a clone says something, or has gone.
fn wait(ready: &PipeReader) -> io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(|_| io::ErrorKind::InvalidInput)?;
        match poll(&mut [PollFd::new(ready, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
