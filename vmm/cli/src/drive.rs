//! From a machine that stands ready to its exit code: signals, terminal, session, API, and what is said at the end.
//!
//! Used by everything that runs a machine, however it came about: booted, copied from a template, restored from a snapshot.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use machine::Machine;
use machine::api::{Limits, Server};
use machine::channels::Channels;
use machine::control::Control;
use machine::controller::{Ending, PanicWords};
use machine::plan::ListeningSocket;
use machine::snapshot::manifest::GuestStage;
use machine::timeline::Timeline;
use protocol::{CONTROL_PORT, STREAM_PORT};

use crate::args::TimingFormat;
use crate::log_line::say;
use crate::session::{Guest, Links, Opening, Session, Verdict};
use crate::signals::{Ended, Signals};
use crate::terminal::RawMode;
use crate::{exit_code, keyboard, timing};

/// How many of the guest's last lines are shown when it ended badly.
const LAST_LINES: usize = 40;
/// How long the console's last output may take to be written.
const CONSOLE_PATIENCE: Duration = Duration::from_secs(1);

/// What a machine is run with.
pub struct Settings {
    /// How the session with its agent begins; `None` for an ordinary VM.
    pub opening: Option<Opening>,
    /// What is typed goes to the machine unprocessed: to its container's terminal, or to its console.
    pub raw: bool,
    /// Where to serve the control API. Bound before the machine was built: that may fail.
    pub api: Option<ListeningSocket>,
    /// Wait for the API to start the machine.
    pub paused: bool,
    /// Told, with a line, when the guest has taken its new identity.
    pub ready: Option<Box<dyn Write + Send>>,
    /// What to print about time.
    pub timing: Option<TimingFormat>,
}

/// Signals, caught before anything that takes long.
pub struct Caught {
    signals: Signals,
    ended: Ended,
}

impl Caught {
    /// From now on signals wait for the machine.
    ///
    /// # Errors
    /// When the host refuses the handlers.
    pub fn now() -> anyhow::Result<Self> {
        let ended = Ended::default();
        let signals = Signals::catch(ended.clone()).context("cannot handle signals")?;
        Ok(Caught { signals, ended })
    }
}

/// Binds the control API's socket, if there is to be one.
///
/// # Errors
/// When it cannot be bound.
pub fn api_socket(path: Option<&PathBuf>) -> anyhow::Result<Option<ListeningSocket>> {
    Ok(path.map(|path| ListeningSocket::bind(path)).transpose()?)
}

/// The agent, as the controller knows it.
struct Driver(Guest);

impl machine::Guest for Driver {
    fn stage(&self) -> GuestStage {
        GuestStage::Running
    }

    fn freeze(&mut self, patience: Duration) -> Result<(), String> {
        self.0.freeze(patience)
    }

    fn thaw(&mut self) {
        self.0.thaw();
    }

    fn shutdown(&mut self) -> bool {
        self.0.shutdown()
    }
}

/// Runs `machine` to its end, and returns the exit code.
///
/// # Errors
/// When it could not be started.
pub fn drive(
    mut machine: Machine,
    mut channels: Channels,
    caught: Caught,
    settings: Settings,
    timeline: &Arc<Timeline>,
) -> anyhow::Result<u8> {
    let Settings { opening, raw, api, paused, ready, timing } = settings;
    let Caught { signals, ended } = caught;
    let control: Arc<dyn Control> = Arc::new(machine.handle());
    let api = api.map(|socket| Server::start(socket, control, Limits::default()));
    let api = api.transpose().context("cannot serve the control API")?;
    let container = opening.is_some();

    let (ending, verdict) = match opening {
        None => {
            signals.forward(None, machine.handle()).context("cannot handle signals")?;
            let _raw =
                if raw { keyboard::connect(&machine).context("cannot read the keyboard")? } else { None };
            start(&mut machine, paused)?;
            if let Some(mut ready) = ready {
                // Nobody is asked. Whoever wanted to be told may have gone.
                let _ = writeln!(ready, "ready");
            }
            (machine.run(PanicWords::MayBeAnybodys, &mut machine::Own), None)
        }
        Some(opening) => {
            let guest = Guest::default();
            signals.forward(Some(guest.clone()), machine.handle()).context("cannot handle signals")?;
            let (Some(control), Some(streams)) =
                (channels.listener(CONTROL_PORT), channels.listener(STREAM_PORT))
            else {
                anyhow::bail!("the machine has no vsock device to reach its agent by: leave one in --config");
            };
            let links =
                Links { control, streams, machine: machine.handle(), timeline: timeline.clone(), ready };
            let session = Session::start(links, opening, guest.clone()).context("cannot start a thread")?;
            let _raw = if raw { RawMode::enter() } else { None };
            start(&mut machine, paused)?;
            let ending = machine.run(PanicWords::AreTheEnd, &mut Driver(guest));
            (ending, session.verdict(|| ended.get().is_some()))
        }
    };
    drop(api);
    let console = machine.console();
    if !console.flush(CONSOLE_PATIENCE) || console.dropped() > 0 {
        log::warn!("the console was read too slowly: some of what the guest printed is lost");
    }
    let code = conclude(container, &ending, verdict, ended.get(), &machine);
    if let Some(format) = timing {
        say(&timing::report(timeline, format));
    }
    // The process ends now, and its threads with it: to wait for each would be to wait for a disk that hangs. What must not be
    // left behind is the socket's name.
    drop(channels);
    std::mem::forget(machine);
    Ok(code)
}

fn start(machine: &mut Machine, paused: bool) -> anyhow::Result<()> {
    if !paused {
        machine.start()?;
    }
    Ok(())
}

/// Says how it ended where that is not for the container to say, and returns the exit code.
fn conclude(
    container: bool,
    ending: &Ending,
    verdict: Option<Verdict>,
    signal: Option<u8>,
    machine: &Machine,
) -> u8 {
    match (verdict, ending) {
        (Some(Verdict::Exited(code)), _) => code,
        (Some(Verdict::Failed(code, message)), _) => {
            say(&format!("vmm: {message}"));
            code
        }
        (None, Ending::Panicked) => {
            last_lines(machine, "the guest's kernel panicked");
            exit_code::GUEST_PANIC
        }
        (None, Ending::Fatal(reason)) => {
            last_lines(machine, &format!("the guest cannot go on: {reason}"));
            exit_code::GUEST_LOST
        }
        (None, Ending::Stopped) => signal.unwrap_or(0),
        (None, Ending::Reset | Ending::PoweredOff) if !container => 0,
        (None, Ending::Reset | Ending::PoweredOff) => {
            last_lines(machine, "the VM ended before its container did");
            exit_code::GUEST_LOST
        }
    }
}

fn last_lines(machine: &Machine, what: &str) {
    let lines = machine.console().last_lines(LAST_LINES);
    match lines.is_empty() {
        true => say(&format!("vmm: {what}; its console shows nothing")),
        false => say(&format!("vmm: {what}; the last lines of its console:\n{}", lines.join("\n"))),
    }
}
