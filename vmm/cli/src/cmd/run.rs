//! `vmm --kernel … --rootfs …`: a container in a virtual machine, or with `--init` an ordinary virtual machine.

use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use machine::Machine;
use machine::builder;
use machine::config::{BlockConfig, ConsoleConfig, DeviceConfig, Initramfs, MachineConfig};
use machine::controller::{Ending, PanicWords};
use machine::host::{Host, KernelMode};
use machine::plan::rootfs::FileSystem;
use machine::plan::{Assets, Plan, rootfs};
use machine::timeline::Timeline;
use protocol::{ByteString, CONTROL_PORT, Network, STREAM_PORT};

use crate::args::RunArgs;
use crate::log_line::say;
use crate::session::{self, Links, Remote, Request, Session, Verdict};
use crate::signals::{Ended, Signals};
use crate::terminal::{self, RawMode};
use crate::{exit_code, keyboard, timing};

/// The agent, as `images/initramfs/build` packed it.
const ASSETS: Assets = Assets { initramfs: include_bytes!(concat!(env!("OUT_DIR"), "/initramfs.cpio")) };

/// How many of the guest's last lines are shown when it ended badly.
const LAST_LINES: usize = 40;
/// Where kernel mode is emulated, `CPUID` shows programs the host's AVX whatever the guest was given, but the guest's kernel does not
/// switch the wide registers: a process finds another's values in them. This keeps the C library from using them by itself.
/// (glibc manual, "Hardware Capability Tunables"; those with `_Usable` are from before 2.33.)
const NO_WIDE_REGISTERS: &str = "GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX,-AVX2,-AVX512F,-AVX512BW,-AVX512CD,\
                                 -AVX512DQ,-AVX512VL,-FMA,-FMA4,-F16C,-AVX_Usable,-AVX2_Usable,-AVX512F_Usable";

/// How long the console's last output may take to be written.
const CONSOLE_PATIENCE: Duration = Duration::from_secs(1);

/// Runs it, and returns the exit code.
///
/// # Errors
/// Whatever keeps the machine from being built; nothing is left behind then.
pub fn run(args: &RunArgs, timeline: &Arc<Timeline>) -> anyhow::Result<u8> {
    let mut config = args.machine()?;
    let mut request = request(args, &config)?;
    if let Some(path) = &args.rootfs {
        let file_system = rootfs::check(path)?;
        let read_only = !args.init || !can_be_written(file_system);
        config.devices.insert(0, DeviceConfig::Block(BlockConfig { path: path.clone(), read_only }));
        config.boot.cmdline = root_words(args.init, file_system, read_only) + &config.boot.cmdline;
    } else if config.boot.initramfs == Initramfs::BuiltIn {
        anyhow::bail!("no root file system: give --rootfs FILE, or --help for more");
    }
    let ended = Ended::default();
    let signals = Signals::catch(ended.clone()).context("cannot handle signals")?;
    let host = Host::detect()?;
    if host.facts.kvm.kernel_mode == KernelMode::Emulated {
        // First, so that whoever says otherwise is heard. What the kernel does not know becomes its init's environment.
        request.env.insert(0, NO_WIDE_REGISTERS.into());
        if args.init {
            config.boot.cmdline = format!("{NO_WIDE_REGISTERS} {}", config.boot.cmdline);
        }
    }
    let plan = Plan::new(&config, &host, &ASSETS)?;
    for warning in &plan.warnings {
        log::warn!("{warning}");
    }
    let (machine, mut channels) = builder::build(plan, &host, &session::PORTS, timeline)?;

    let (ending, verdict) = if args.init {
        signals.forward(None, machine.handle()).context("cannot handle signals")?;
        let typed = config.console == ConsoleConfig::Stdio;
        let _raw =
            if typed { keyboard::connect(&machine).context("cannot read the keyboard")? } else { None };
        (machine.run(PanicWords::MayBeAnybodys), None)
    } else {
        let remote = Remote::default();
        signals.forward(Some(remote.clone()), machine.handle()).context("cannot handle signals")?;
        let (Some(control), Some(streams)) =
            (channels.listener(CONTROL_PORT), channels.listener(STREAM_PORT))
        else {
            anyhow::bail!("the machine has no vsock device to reach its agent by: leave one in --config");
        };
        let links = Links { control, streams, machine: machine.handle(), timeline: timeline.clone() };
        let session = Session::start(links, request, remote).context("cannot start a thread")?;
        let _raw = if args.tty && args.interactive { RawMode::enter() } else { None };
        let ending = machine.run(PanicWords::AreTheEnd);
        (ending, session.verdict(|| ended.get().is_some()))
    };
    let console = machine.console();
    if !console.flush(CONSOLE_PATIENCE) || console.dropped() > 0 {
        log::warn!("the console was read too slowly: some of what the guest printed is lost");
    }
    let code = conclude(args.init, &ending, verdict, ended.get(), &machine);
    if let Some(format) = args.timing {
        say(&timing::report(timeline, format));
    }
    // The process ends now, and its threads with it: to wait for each would be to wait for a disk that hangs. What must not be
    // left behind is the socket's name.
    drop(channels);
    std::mem::forget(machine);
    Ok(code)
}

fn can_be_written(file_system: FileSystem) -> bool {
    !matches!(file_system, FileSystem::Erofs | FileSystem::Squashfs)
}

/// Tells the kernel, or the agent, what the root is.
fn root_words(init: bool, file_system: FileSystem, read_only: bool) -> String {
    let mode = if read_only { "ro" } else { "rw" };
    match init {
        true => format!("root=/dev/vda rootfstype={} {mode} ", file_system.name()),
        // A word that the kernel does not know becomes the agent's environment.
        false => format!("{}={} ", protocol::ROOTFS_VARIABLE, file_system.name()),
    }
}

/// What the container is asked to be.
fn request(args: &RunArgs, config: &MachineConfig) -> anyhow::Result<Request> {
    if args.tty && args.interactive && !terminal::is_terminal() {
        anyhow::bail!("standard input is not a terminal: leave -t away, or -i");
    }
    let bytes = |text: &std::ffi::OsStr| ByteString(text.as_bytes().to_vec());
    let disks = config.devices.iter().filter(|d| matches!(d, DeviceConfig::Block(_))).count();
    // The root comes before them.
    let first = if args.rootfs.is_some() { b'b' } else { b'a' };
    let network = config.devices.iter().find_map(|device| match device {
        DeviceConfig::Net(net) => Some(Network {
            interface: "eth0".into(),
            address: net.address.map(|a| protocol::Ipv4Cidr { address: a.address(), prefix: a.prefix() }),
            gateway: net.gateway,
        }),
        _ => None,
    });
    Ok(Request {
        command: args.command.iter().map(|word| bytes(word)).collect(),
        env: args.env.iter().filter_map(|word| environment(word)).collect(),
        workdir: args.workdir.as_deref().map(bytes),
        user: args.user.clone(),
        hostname: args.hostname.clone(),
        interactive: args.interactive,
        terminal: args.tty.then(terminal::size),
        disks: (first..=b'z').take(disks).map(|letter| format!("vd{}", char::from(letter))).collect(),
        network,
        vsock: args.vsock.is_some(),
    })
}

/// `NAME=value`, or `NAME` with the value that it has here; `None` where it has none.
fn environment(word: &std::ffi::OsStr) -> Option<ByteString> {
    if word.as_bytes().contains(&b'=') {
        return Some(ByteString(word.as_bytes().to_vec()));
    }
    let value = std::env::var_os(word)?;
    Some(ByteString([word.as_bytes(), b"=", value.as_bytes()].concat()))
}

/// Says how it ended where that is not for the container to say, and returns the exit code.
fn conclude(
    init: bool,
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
        (None, Ending::Reset | Ending::PoweredOff) if init => 0,
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
