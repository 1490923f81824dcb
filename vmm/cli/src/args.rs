//! The command line: what can be said, and how it becomes a [`MachineConfig`]. No file is opened here but `--config`.

pub mod ctl;
pub mod snapshot;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::{ArgAction, Args, Parser, Subcommand};
use machine::config::{
    BlockConfig, ByteSize, ConsoleConfig, DeviceConfig, Initramfs, Ipv4Cidr, MAX_VCPUS, MacAddress,
    MachineConfig, NetConfig, RngConfig, VsockConfig,
};

const AFTER_HELP: &str = "\
Examples:
  vmm --kernel bzImage --rootfs ctr.img                     the image's own command
  vmm --kernel bzImage --rootfs ctr.img -it -- /bin/sh      a shell
  vmm --kernel bzImage --rootfs ctr.img --disk data.img -- fsck /dev/vdb
  vmm --kernel bzImage --rootfs vm.img --init               an ordinary VM
  vmm ctl SOCKET                                            what a machine with --api-socket SOCKET is doing
  vmm info                                                  what this host offers

Exit codes:
  the container's own; 126 and 127 when its command cannot be executed or is not there; 128 + n when signal n killed it
  125 when vmm refuses or fails, 250 when the guest's kernel panics, 251 when the VM ends before the container does
  of ctl and snapshot: 1 when the machine that was asked refuses";

/// Runs a container in a virtual machine of its own.
#[derive(Debug, Parser)]
#[command(name = "vmm", version, max_term_width = 120, after_help = AFTER_HELP, args_conflicts_with_subcommands = true)]
pub struct Cli {
    /// Another thing to do than to run.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// What to run.
    #[command(flatten)]
    pub run: RunArgs,
    /// Say more; twice for debugging
    #[arg(short, long, action = ArgAction::Count, global = true)]
    pub verbose: u8,
}

/// Other things to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Ask a running machine, through its --api-socket
    Ctl(ctl::CtlArgs),
    /// Run a machine from a snapshot, as a machine of its own
    Restore(snapshot::RestoreArgs),
    /// Take and look after snapshots: a machine with its memory and its disks, in a directory
    Snapshot {
        /// What to do.
        #[command(subcommand)]
        command: snapshot::SnapshotCommand,
    },
    /// Look after templates: booted machines that `vmm --rootfs` starts from
    Template {
        /// What to do.
        #[command(subcommand)]
        command: snapshot::TemplateCommand,
    },
    /// Say what this host offers: KVM, VT-x or AMD-V, paging, memory, and what is missing
    Info {
        /// Print JSON with stable keys
        #[arg(long)]
        json: bool,
    },
}

/// `vmm --kernel … --rootfs …`
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Linux kernel: a bzImage (gzip, zstd, lz4 or xz) or an ELF vmlinux
    #[arg(long, value_name = "FILE", help_heading = "Machine")]
    pub kernel: Option<PathBuf>,
    /// File system of the container (EROFS, ext4 or squashfs), used read-only under a layer in memory
    #[arg(long, value_name = "FILE", help_heading = "Machine")]
    pub rootfs: Option<PathBuf>,
    /// Number of virtual CPUs, 1 to 64 [default: 1]
    #[arg(long, value_name = "N", value_parser = cpus, help_heading = "Machine")]
    pub cpus: Option<u8>,
    /// Memory, such as 64M or 2G [default: 256M]
    #[arg(long, value_name = "SIZE", help_heading = "Machine")]
    pub memory: Option<ByteSize>,
    /// Initramfs to start instead of vmm's own agent
    #[arg(long, value_name = "FILE", help_heading = "Machine")]
    pub initrd: Option<PathBuf>,
    /// Words to add to the kernel's command line
    #[arg(long, value_name = "TEXT", help_heading = "Machine")]
    pub cmdline: Option<String>,
    /// Another disk, raw: /dev/vdb, /dev/vdc … in the container
    #[arg(long = "disk", value_name = "FILE[,ro]", help_heading = "Machine")]
    pub disks: Vec<DiskArg>,
    /// Network: none, or an existing TAP interface, with the guest's own addresses if wanted
    #[arg(
        long,
        value_name = "none|tap=NAME[,mac=MAC][,ip=ADDRESS/BITS][,gw=ADDRESS]",
        help_heading = "Machine"
    )]
    pub net: Option<NetArg>,
    /// Let host and guest connect by vsock: to the guest's port through the unix socket PATH, from the guest's to PATH_port
    #[arg(long, value_name = "PATH", help_heading = "Machine")]
    pub vsock: Option<PathBuf>,
    /// Description of the machine in JSON; flags override it
    #[arg(long, value_name = "FILE.json", help_heading = "Machine")]
    pub config: Option<PathBuf>,
    /// Where the guest's serial console goes: a file, or - for standard error (with --init: output) [default: nowhere, with
    /// --init -]
    #[arg(long, value_name = "FILE|-", help_heading = "Machine")]
    pub console: Option<PathBuf>,
    /// Boot the image's own init as an ordinary VM, with its console on this terminal (Ctrl-A x ends it)
    #[arg(long, conflicts_with_all = ["interactive", "tty", "command", "env", "workdir", "user", "hostname"],
          help_heading = "Machine")]
    pub init: bool,
    /// Serve the control API of this machine on the unix socket PATH: see `vmm ctl`
    #[arg(long, value_name = "PATH", help_heading = "Machine")]
    pub api_socket: Option<PathBuf>,
    /// Build the machine, and let it begin when the API says so
    #[arg(long, requires = "api_socket", help_heading = "Machine")]
    pub paused: bool,

    /// Pass standard input to the container
    #[arg(short, long, help_heading = "Container")]
    pub interactive: bool,
    /// Give the container a terminal
    #[arg(short, long, help_heading = "Container")]
    pub tty: bool,
    /// Set an environment variable; without a value, take it from here
    #[arg(short, long, value_name = "NAME[=VALUE]", help_heading = "Container")]
    pub env: Vec<OsString>,
    /// Directory to start in
    #[arg(short, long, value_name = "DIR", help_heading = "Container")]
    pub workdir: Option<OsString>,
    /// User to run as: names or numbers
    #[arg(short, long, value_name = "USER[:GROUP]", help_heading = "Container")]
    pub user: Option<String>,
    /// Host name of the container
    #[arg(long, value_name = "NAME", help_heading = "Container")]
    pub hostname: Option<String>,

    /// Boot the guest, also where a template would spare that
    #[arg(long, help_heading = "Machine")]
    pub no_template: bool,
    /// Record which memory changes, for `vmm snapshot save --diff`; boots the guest
    #[arg(long, help_heading = "Machine")]
    pub track_dirty: bool,

    /// Print when each stage was reached, and what guest kernel work it took, to standard error
    #[arg(long, value_name = "FORMAT", num_args = 0..=1, require_equals = true, default_missing_value = "text")]
    pub timing: Option<TimingFormat>,
    /// Command to run in the container [default: the image's own]
    #[arg(last = true, value_name = "CMD")]
    pub command: Vec<OsString>,
}

/// How `--timing` prints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum TimingFormat {
    /// A table.
    Text,
    /// One line of JSON.
    Json,
}

/// `FILE[,ro]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskArg {
    /// The file.
    pub path: PathBuf,
    /// Whether the guest may only read.
    pub read_only: bool,
}

impl FromStr for DiskArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (path, read_only) = match text.strip_suffix(",ro") {
            Some(path) => (path, true),
            None => (text, false),
        };
        if path.is_empty() {
            return Err("the file is missing: --disk FILE[,ro]".into());
        }
        Ok(DiskArg { path: path.into(), read_only })
    }
}

/// `none` or `tap=NAME[,…]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetArg(pub Option<NetConfig>);

impl FromStr for NetArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "none" {
            return Ok(NetArg(None));
        }
        let mut config = NetConfig { tap: None, mac: None, address: None, gateway: None };
        for part in text.split(',') {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            let wrong = |what: &dyn std::fmt::Display| format!("{key}={value}: {what}");
            match key {
                "tap" => config.tap = Some(value.into()),
                "mac" => config.mac = Some(value.parse::<MacAddress>().map_err(|e| wrong(&e))?),
                "ip" => config.address = Some(value.parse::<Ipv4Cidr>().map_err(|e| wrong(&e))?),
                "gw" => config.gateway = Some(value.parse().map_err(|e| wrong(&e))?),
                _ => return Err(format!("unknown key {key:?}: use none, or tap=NAME[,mac=…][,ip=…][,gw=…]")),
            }
        }
        if config.tap.as_ref().is_none_or(String::is_empty) {
            return Err("the TAP interface is missing: tap=NAME".into());
        }
        Ok(NetArg(Some(config)))
    }
}

/// A number of vCPUs: whether the host can have them is for the plan to say.
fn cpus(text: &str) -> Result<u8, String> {
    let number = text.parse::<u8>().ok().filter(|count| (1..=MAX_VCPUS).contains(count));
    number.ok_or_else(|| format!("choose 1 to {MAX_VCPUS} CPUs"))
}

impl RunArgs {
    /// The machine that was asked for: `--config`, then flags, then what every container needs.
    ///
    /// # Errors
    /// When `--config` cannot be read, or nothing says what to run.
    pub fn machine(&self) -> anyhow::Result<MachineConfig> {
        let mut config = match &self.config {
            Some(path) => MachineConfig::load(path)?,
            None => MachineConfig::default(),
        };
        if let Some(kernel) = &self.kernel {
            config.boot.kernel.clone_from(kernel);
        }
        if config.boot.kernel.as_os_str().is_empty() {
            anyhow::bail!("no kernel: give --kernel FILE (./scripts/run builds one), or --help for more");
        }
        if let Some(cpus) = self.cpus {
            config.vcpus = cpus;
        }
        if let Some(memory) = self.memory {
            config.memory.size = memory;
        }
        config.memory.track_dirty |= self.track_dirty;
        if let Some(initrd) = &self.initrd {
            config.boot.initramfs = Initramfs::File(initrd.clone());
        } else if self.init && config.boot.initramfs == Initramfs::BuiltIn {
            config.boot.initramfs = Initramfs::None;
        }
        if let Some(words) = &self.cmdline {
            config.boot.cmdline.clone_from(words);
        }
        match self.console.as_deref() {
            Some(path) if path == Path::new("-") => {
                config.console = if self.init { ConsoleConfig::Stdio } else { ConsoleConfig::Stderr };
            }
            Some(path) => config.console = ConsoleConfig::File(path.into()),
            None if self.init && config.console == ConsoleConfig::None => {
                config.console = ConsoleConfig::Stdio
            }
            None => {}
        }
        self.add_devices(&mut config);
        Ok(config)
    }

    fn add_devices(&self, config: &mut MachineConfig) {
        let disks = self.disks.iter().map(|disk| {
            DeviceConfig::Block(BlockConfig { path: Some(disk.path.clone()), read_only: disk.read_only })
        });
        config.devices.extend(disks);
        if let Some(net) = &self.net {
            config.devices.retain(|d| !matches!(d, DeviceConfig::Net(_)));
            config.devices.extend(net.0.clone().map(DeviceConfig::Net));
        }
        let has = |wanted: fn(&DeviceConfig) -> bool| config.devices.iter().any(wanted);
        let needs_rng = !has(|d| matches!(d, DeviceConfig::Rng(_)));
        let needs_vsock = !has(|d| matches!(d, DeviceConfig::Vsock(_)));
        if let Some(path) = &self.vsock {
            config.devices.retain(|d| !matches!(d, DeviceConfig::Vsock(_)));
            config.devices.push(DeviceConfig::Vsock(VsockConfig {
                uds_path: Some(path.clone()),
                cid: VsockConfig::default_cid(),
            }));
        } else if needs_vsock && !self.init {
            config
                .devices
                .push(DeviceConfig::Vsock(VsockConfig { uds_path: None, cid: VsockConfig::default_cid() }));
        }
        if needs_rng {
            config.devices.push(DeviceConfig::Rng(RngConfig {}));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> RunArgs {
        Cli::try_parse_from([&["vmm"], words].concat()).unwrap().run
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn disks_and_networks() {
        let disk = |text: &str| text.parse::<DiskArg>();
        assert_eq!(disk("a,b.img,ro"), Ok(DiskArg { path: "a,b.img".into(), read_only: true }));
        assert_eq!(disk("a.img"), Ok(DiskArg { path: "a.img".into(), read_only: false }));
        assert!(disk(",ro").is_err());
        assert_eq!("none".parse(), Ok(NetArg(None)));
        let NetArg(net) = "tap=tap0,mac=02:00:00:00:00:01,ip=10.0.0.2/24,gw=10.0.0.1".parse().unwrap();
        let net = net.unwrap();
        assert_eq!((net.tap.as_deref().unwrap(), net.gateway), ("tap0", Some([10, 0, 0, 1].into())));
        for wrong in ["", "tap=", "bridge=br0", "tap=t,mac=1", "tap=t,ip=10.0.0.2", "tap=t,gw=x"] {
            assert!(wrong.parse::<NetArg>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_container_gets_what_it_needs() {
        let config = parse(&["--kernel", "k", "--disk", "d", "--net", "tap=t"]).machine().unwrap();
        let names: Vec<_> = config
            .devices
            .iter()
            .map(|d| match d {
                DeviceConfig::Block(_) => "block",
                DeviceConfig::Net(_) => "net",
                DeviceConfig::Vsock(_) => "vsock",
                DeviceConfig::Rng(_) => "rng",
            })
            .collect();
        assert_eq!(names, ["block", "net", "vsock", "rng"]);
        assert_eq!(config.console, ConsoleConfig::None);
    }

    #[test]
    fn an_ordinary_vm_has_its_console_here_and_no_agent() {
        let config = parse(&["--kernel", "k", "--init"]).machine().unwrap();
        assert_eq!(config.boot.initramfs, Initramfs::None);
        assert_eq!(config.console, ConsoleConfig::Stdio);
        assert!(!config.devices.iter().any(|d| matches!(d, DeviceConfig::Vsock(_))));
    }

    #[test]
    fn what_cannot_be_run_is_said() {
        assert!(parse(&[]).machine().unwrap_err().to_string().contains("--kernel"));
        assert!(Cli::try_parse_from(["vmm", "--init", "-i"]).is_err());
        assert!(Cli::try_parse_from(["vmm", "--kernel", "k", "sh"]).is_err(), "a command comes after --");
        for cpus in ["0", "65", "10000", "-1", "two"] {
            let error = Cli::try_parse_from(["vmm", &format!("--cpus={cpus}")]).unwrap_err();
            assert!(error.to_string().contains("1 to 64"), "{cpus}");
        }
    }
}
