//! `vmm --kernel … --rootfs …`: a container in a virtual machine, or with `--init` an ordinary virtual machine.

use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use machine::builder;
use machine::config::{BlockConfig, ConsoleConfig, DeviceConfig, Initramfs, MachineConfig};
use machine::host::{Host, KernelMode};
use machine::plan::rootfs::FileSystem;
use machine::plan::{Plan, rootfs};
use machine::timeline::Timeline;
use protocol::{ByteString, Disk, Network, Root};

use crate::args::RunArgs;
use crate::assets::ASSETS;
use crate::drive::{self, Caught, Settings};
use crate::session::{self, Opening, Request};
use crate::template;
use crate::terminal;

/// Where kernel mode is emulated, `CPUID` shows programs the host's AVX whatever the guest was given, but the guest's kernel does not
/// switch the wide registers: a process finds another's values in them. This keeps the C library from using them by itself.
/// (glibc manual, "Hardware Capability Tunables"; those with `_Usable` are from before 2.33.)
const NO_WIDE_REGISTERS: &str = "GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX,-AVX2,-AVX512F,-AVX512BW,-AVX512CD,\
                                 -AVX512DQ,-AVX512VL,-FMA,-FMA4,-F16C,-AVX_Usable,-AVX2_Usable,-AVX512F_Usable";

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
        config.devices.insert(0, DeviceConfig::Block(BlockConfig { path: Some(path.clone()), read_only }));
        if args.init {
            config.boot.cmdline = root_words(file_system, read_only) + &config.boot.cmdline;
        }
        request.root.file_system = file_system.name().into();
    } else if config.boot.initramfs == Initramfs::BuiltIn {
        anyhow::bail!("no root file system: give --rootfs FILE, or --help for more");
    }
    let caught = Caught::now()?;
    let host = Host::detect()?;
    if host.kernel_mode() == KernelMode::Emulated {
        // First, so that whoever says otherwise is heard. What the kernel does not know becomes its init's environment.
        request.env.insert(0, NO_WIDE_REGISTERS.into());
        if args.init {
            config.boot.cmdline = format!("{NO_WIDE_REGISTERS} {}", config.boot.cmdline);
        }
    }
    let settings = |opening| -> anyhow::Result<Settings> {
        Ok(Settings {
            opening,
            raw: if args.init {
                config.console == ConsoleConfig::Stdio
            } else {
                args.tty && args.interactive
            },
            api: drive::api_socket(args.api_socket.as_ref())?,
            paused: args.paused,
            ready: None,
            timing: args.timing,
        })
    };
    if !args.init && !args.no_template && args.rootfs.is_some() {
        match template::copy(&config, &mut request, &host, timeline)? {
            Some((machine, channels)) => {
                let settings = settings(Some(Opening::Template(request)))?;
                return drive::drive(machine, channels, caught, settings, timeline);
            }
            None => log::debug!("this machine boots: no template fits it"),
        }
    }
    let (plan, boot) = Plan::new(&config, &host, &ASSETS)?;
    warn(&plan);
    let opening = (!args.init).then_some(Opening::Boot(request));
    let settings = settings(opening)?;
    let (machine, channels) = builder::build(plan, boot, &host, &session::PORTS, timeline)?;
    drive::drive(machine, channels, caught, settings, timeline)
}

/// Says what a person should know of a plan although it is no error.
pub fn warn(plan: &Plan) {
    for warning in &plan.warnings {
        log::warn!("{warning}");
    }
}

fn can_be_written(file_system: FileSystem) -> bool {
    !matches!(file_system, FileSystem::Erofs | FileSystem::Squashfs)
}

/// Tells the kernel what the root is. The agent hears it from the session.
fn root_words(file_system: FileSystem, read_only: bool) -> String {
    let mode = if read_only { "ro" } else { "rw" };
    format!("root=/dev/vda rootfstype={} {mode} ", file_system.name())
}

/// What the container is asked to be.
fn request(args: &RunArgs, config: &MachineConfig) -> anyhow::Result<Request> {
    if args.tty && args.interactive && !terminal::is_terminal() {
        anyhow::bail!("standard input is not a terminal: leave -t away, or -i");
    }
    let bytes = |text: &std::ffi::OsStr| ByteString(text.as_bytes().to_vec());
    let disks = config.devices.iter().filter_map(|device| match device {
        DeviceConfig::Block(block) => Some(block.path.is_none()),
        _ => None,
    });
    // The root comes before them.
    let first = if args.rootfs.is_some() { b'b' } else { b'a' };
    let disk = |(letter, spare)| {
        let name = format!("vd{}", char::from(letter));
        Disk { device: name.clone(), name, spare }
    };
    Ok(Request {
        root: Root { device: "vda".into(), file_system: String::new() },
        command: args.command.iter().map(|word| bytes(word)).collect(),
        env: args.env.iter().filter_map(|word| environment(word)).collect(),
        workdir: args.workdir.as_deref().map(bytes),
        user: args.user.clone(),
        hostname: args.hostname.clone(),
        interactive: args.interactive,
        terminal: args.tty.then(terminal::size),
        disks: (first..=b'z').zip(disks).map(disk).collect(),
        network: network(config),
        vsock: args.vsock.is_some(),
    })
}

/// The guest's first network interface, if it has one.
pub fn network(config: &MachineConfig) -> Option<Network> {
    config.devices.iter().find_map(|device| match device {
        DeviceConfig::Net(net) => Some(Network {
            interface: "eth0".into(),
            // The card has told the guest's driver its own.
            mac: None,
            address: net.address.map(|a| protocol::Ipv4Cidr { address: a.address(), prefix: a.prefix() }),
            gateway: net.gateway,
        }),
        _ => None,
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
