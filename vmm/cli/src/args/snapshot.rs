//! `vmm restore`, `vmm snapshot …` and `vmm template …`: what can be said.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{NetArg, RunArgs, TimingFormat};

/// `vmm restore DIR`
#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// The snapshot
    #[arg(value_name = "DIR")]
    pub directory: PathBuf,
    /// Host name of the copy [default: as it was]
    #[arg(long, value_name = "NAME")]
    pub hostname: Option<String>,
    /// Its network: none, or an existing TAP interface, with addresses if they change [default: the TAP that it had]
    #[arg(long, value_name = "none|tap=NAME[,mac=MAC][,ip=ADDRESS/BITS][,gw=ADDRESS]")]
    pub net: Option<NetArg>,
    /// Its vsock socket [default: none, since the original may still have its own]
    #[arg(long, value_name = "PATH")]
    pub vsock: Option<PathBuf>,
    /// Serve the control API on the unix socket PATH
    #[arg(long, value_name = "PATH")]
    pub api_socket: Option<PathBuf>,
    /// Restore the machine, and let it go on when the API says so
    #[arg(long, requires = "api_socket")]
    pub paused: bool,
    /// Pass standard input to the container, or to the serial port of an ordinary VM
    #[arg(short, long)]
    pub interactive: bool,
    /// Its container has a terminal: use this one for it
    #[arg(short, long)]
    pub tty: bool,
    /// Print when each stage was reached, to standard error
    #[arg(long, value_name = "FORMAT", num_args = 0..=1, require_equals = true, default_missing_value = "text")]
    pub timing: Option<TimingFormat>,
    /// Its machine id, 32 hexadecimal digits [default: random]
    #[arg(long, value_name = "ID", hide = true)]
    pub machine_id: Option<String>,
    /// Write a line to this descriptor when the copy has become a machine of its own
    #[arg(long, value_name = "FD", hide = true)]
    pub ready_fd: Option<i32>,
}

/// `vmm snapshot …`
#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Save a running machine to a directory; it goes on
    Save {
        /// Its control API
        #[arg(value_name = "SOCKET")]
        socket: PathBuf,
        /// Where to: a new directory, or an older snapshot, which is replaced
        #[arg(value_name = "DIR")]
        directory: PathBuf,
        /// Save only the memory that changed since the last snapshot, which must stay where it is (needs --track-dirty)
        #[arg(long)]
        diff: bool,
    },
    /// List the snapshots in a directory
    Ls {
        /// Where to look
        #[arg(value_name = "DIR", default_value = ".")]
        directory: PathBuf,
    },
    /// Say what a snapshot is, and whether it can be restored here
    Inspect {
        /// The snapshot
        #[arg(value_name = "DIR")]
        directory: PathBuf,
        /// Read all of its memory, and compare it with its checksum
        #[arg(long)]
        verify: bool,
        /// Print its manifest
        #[arg(long)]
        json: bool,
    },
    /// Remove snapshots
    Rm {
        /// The snapshots
        #[arg(value_name = "DIR", required = true)]
        directories: Vec<PathBuf>,
    },
    /// Make a running machine into many: each goes on from here, as a machine of its own
    Clone {
        /// Its control API
        #[arg(value_name = "SOCKET")]
        socket: PathBuf,
        /// How many
        #[arg(short = 'n', long = "count", value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1000))]
        count: u16,
        /// Where each clone's control API, output and log go [default: a new directory in /run or the temporary directory]
        #[arg(long, value_name = "DIR")]
        directory: Option<PathBuf>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

/// `vmm template …`
#[derive(Debug, Subcommand)]
pub enum TemplateCommand {
    /// List the templates
    Ls,
    /// Remove templates
    Rm {
        /// Their names, as `ls` prints them
        #[arg(value_name = "NAME", required_unless_present = "all")]
        names: Vec<String>,
        /// All of them
        #[arg(long)]
        all: bool,
    },
    /// Build the template for a machine, as running it would
    Build(Box<RunArgs>),
}
