//! A session with the host, from Hello to the last message.

use protocol::{ByteString, ExitStatus, FromAgent, PROTOCOL_VERSION, Root, ToAgent};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;

use crate::container::{self, Plan};
use crate::control::Control;
use crate::error::{Error, at};
use crate::freezer::Freezer;
use crate::mounts::Furniture;
use crate::relay::Running;
use crate::{identity, network, stdio, sys};

/// How long the host has to read the last message and end the VM, before the VM ends itself.
const FAREWELL: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// What of the machine a session uses that a process elsewhere does not have: tests put something else in its place.
pub trait Machine {
    /// Makes the agent's own root, as far as it does not take an image.
    fn prepare(&self) -> Result<(), Error>;

    /// Sets the time of day: nanoseconds since 1970.
    fn set_clock(&self, nanoseconds: u64) -> Result<(), Error>;

    /// Mounts the image, makes the container's root of it, and reads its configuration, if it has one.
    fn open_image(&self, root: &Root) -> Result<Option<ByteString>, Error>;

    /// Waits until a disk has its medium.
    fn wait_for_disk(&self, device: &str) -> Result<(), Error>;

    /// Makes a connection to the host's stream port: non-blocking, and perhaps not established yet.
    fn connect_stream(&self) -> rustix::io::Result<OwnedFd>;
}

/// Runs one session on an established control connection, and returns when the VM may end.
pub fn serve(socket: OwnedFd, machine: &dyn Machine) {
    let mut control = Control::new(socket);
    let last = match session(&mut control, machine) {
        Ok(status) => FromAgent::Exited(status),
        Err(Error::Ended) => return,
        Err(error) => {
            crate::log(&alloc::format!("vmm-agent: {error}\n"));
            error.message()
        }
    };
    // What was sent to the host leaves the guest by and by, so the VM must not end before the host has said that it has all.
    if control.send(&last).is_ok() {
        while wait_for(&control, FAREWELL) && control.receive().is_ok() {
            while let Ok(Some(message)) = control.next() {
                if message == ToAgent::Shutdown {
                    return;
                }
            }
        }
    }
}

fn wait_for(control: &Control, timeout: Timespec) -> bool {
    matches!(poll(&mut [PollFd::new(control, PollFlags::IN)], Some(&timeout)), Ok(1))
}

fn session(control: &mut Control, machine: &dyn Machine) -> Result<ExitStatus, Error> {
    machine.prepare()?;
    network::start()?;
    sys::unshare_names().map_err(at("unshare names"))?;
    let furniture = Furniture::make()?;
    // Only a snapshot of the running container needs it.
    let freezer = Freezer::new().ok();
    control.send(&FromAgent::Hello { version: PROTOCOL_VERSION })?;

    // Here a template is taken, and its copies go on.
    let ToAgent::Begin(begin) = next_request(control)? else { return Err(out_of_turn()) };
    identity::reseed(&begin.seed)?;
    machine.set_clock(begin.clock)?;
    let config = machine.open_image(&begin.root)?;
    control.send(&FromAgent::Image { config })?;

    let ToAgent::Start(start) = next_request(control)? else { return Err(out_of_turn()) };
    if let Some(network) = &start.network {
        network::configure(network)?;
    }
    for disk in start.disks.iter().filter(|disk| !disk.spare) {
        machine.wait_for_disk(&disk.device)?;
    }
    let (ends, streams) = stdio::prepare(&start, machine, &furniture)?;
    let cgroup = freezer.as_ref().map(Freezer::cgroup);
    let plan =
        Plan { start: &start, ends: &ends, machine_id: &begin.machine_id, furniture: &furniture, cgroup };
    let main = container::spawn(&plan)?;
    // The container may unmount what it has, so nothing of ours is to be in it.
    drop(furniture);
    let terminal = ends.into_terminal();
    let children = sys::child_signals().map_err(at("make a descriptor for signals"))?;
    control.send(&FromAgent::Started { pid: main.as_raw_nonzero().get().unsigned_abs() })?;
    let mut running = Running::new(machine, main, children, streams, terminal, freezer);
    let status = running.relay(control)?;
    if !start.disks.is_empty() {
        // What the container had mounted is unmounted by its end; what it wrote to a disk without that is not.
        rustix::fs::sync();
    }
    Ok(status)
}

/// What the host wants done next, before there is a container.
fn next_request(control: &mut Control) -> Result<ToAgent, Error> {
    loop {
        match control.wait()? {
            request @ (ToAgent::Begin(_) | ToAgent::Start(_)) => return Ok(request),
            ToAgent::Shutdown => return Err(Error::Ended),
            // Nothing runs that would have to be held.
            ToAgent::Freeze => control.send(&FromAgent::Frozen)?,
            // A person who types early; and what is for a container.
            ToAgent::Signal(_) | ToAgent::Resize(_) | ToAgent::Thaw | ToAgent::Restored(_) => (),
        }
    }
}

fn out_of_turn() -> Error {
    Error::Request("the host sent a message out of turn".into())
}
