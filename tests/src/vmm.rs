//! A command line of `vmm` under construction.

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::machine::Api;
use crate::{Ended, Running, Terminal, artefacts, templates};

/// How long a run may take. Nothing should come near it: hosts that emulate kernel mode boot in seconds, other work on
/// the machine makes that a minute.
const LIMIT: Duration = Duration::from_secs(300);

/// Where its guest comes from.
#[derive(Clone)]
enum Start {
    /// From a template of [`templates::store`], which is there when it starts: so nothing is said of it.
    Prepared,
    /// As a person starts it, from this store: who comes first builds the template.
    From(PathBuf),
    /// It boots.
    Cold,
}

/// A command line of `vmm`.
#[derive(Clone)]
pub struct Vmm {
    start: Start,
    before: Vec<OsString>,
    args: Vec<OsString>,
    command: Vec<OsString>,
    stdin: Vec<u8>,
    limit: Duration,
}

impl Vmm {
    /// `vmm`, and no flags.
    #[allow(clippy::new_without_default, reason = "there is nothing default about it")]
    pub fn new() -> Self {
        Vmm {
            start: Start::Prepared,
            before: Vec::new(),
            args: Vec::new(),
            command: Vec::new(),
            stdin: Vec::new(),
            limit: LIMIT,
        }
    }

    /// With a kernel, and no root file system.
    pub fn kernel(kernel: impl AsRef<OsStr>) -> Self {
        Self::new().arg("--kernel").arg(kernel)
    }

    /// The sample container on this host's kernel.
    pub fn container() -> Self {
        Self::kernel(artefacts::vmlinux()).arg("--rootfs").arg(artefacts::sample())
    }

    /// A container of the tests' own image, which has their guest programs.
    pub fn prober() -> Self {
        Self::kernel(artefacts::vmlinux()).arg("--rootfs").arg(artefacts::guest_programs())
    }

    /// An ordinary VM that starts the init of `image`.
    pub fn init(image: &Path) -> Self {
        Self::kernel(artefacts::vmlinux()).arg("--rootfs").arg(image).arg("--init")
    }

    /// Has it boot, where a template would spare that.
    pub fn cold(mut self) -> Self {
        self.start = Start::Cold;
        self
    }

    /// Has it use the templates of `store`, and build them there.
    pub fn templates(mut self, store: impl Into<PathBuf>) -> Self {
        self.start = Start::From(store.into());
        self
    }

    /// Has it build the template that it needs where there is none, as a person's `vmm` does. Says so on standard error then.
    pub fn unprepared(self) -> Self {
        self.templates(templates::store())
    }

    /// With a control API.
    pub fn api(self, api: &Api) -> Self {
        self.arg("--api-socket").arg(api.socket())
    }

    /// With the disk, which the guest may write.
    pub fn disk(self, disk: &Path) -> Self {
        self.arg("--disk").arg(disk)
    }

    /// Another flag or value.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Several of them.
    pub fn args<T: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = T>) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// What to run in the container.
    pub fn command(mut self, words: &[&str]) -> Self {
        self.command = words.iter().map(OsString::from).collect();
        self
    }

    /// A shell script to run in the container.
    pub fn shell(self, script: &str) -> Self {
        self.command(&["sh", "-c", script])
    }

    /// Puts the words of another command before `vmm`: `ip netns exec`, `unshare` and their like, which execute it in their place.
    pub fn within(mut self, words: &[&str]) -> Self {
        self.before = words.iter().map(OsString::from).collect();
        self
    }

    /// What it finds on its standard input.
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// How long it may take, where [`LIMIT`] does not fit.
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    fn build(&self) -> Command {
        let mut words = self.before.clone();
        words.push(artefacts::vmm().into());
        words.extend(self.args.iter().cloned());
        let store = match &self.start {
            Start::Prepared => {
                self.prepare();
                templates::store()
            }
            Start::From(store) => store.clone(),
            Start::Cold => {
                words.push("--no-template".into());
                templates::store()
            }
        };
        if !self.command.is_empty() {
            words.push("--".into());
            words.extend(self.command.iter().cloned());
        }
        let (program, args) = words.split_first().expect("vmm at least");
        let mut command = Command::new(program);
        command.args(args).env("VMM_TEMPLATES", store);
        command
    }

    /// Builds the template that it will start from, where it is not there yet; of a machine that has none, this says so, to nobody.
    fn prepare(&self) {
        if self.args.iter().any(|arg| arg == "--rootfs") && !self.args.iter().any(|arg| arg == "--init") {
            let mut command = Command::new(artefacts::vmm());
            command.args(["template", "build"]).args(&self.args).env("VMM_TEMPLATES", templates::store());
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            let _ = command.status();
        }
    }

    /// Starts it. Its standard input stays open.
    pub fn start(self) -> Running {
        Running::start(self.build(), self.limit, None)
    }

    /// Runs it to its end.
    #[track_caller]
    pub fn run(self) -> Ended {
        let input = self.stdin.clone();
        let mut running = self.start();
        let mut stdin = running.take_stdin().expect("a pipe");
        // Its end may come before that of its input.
        let feeder = std::thread::spawn(move || stdin.write_all(&input));
        let ended = running.wait();
        let _ = feeder.join();
        ended
    }

    /// Starts it on a terminal, as its controlling one.
    pub fn start_on(self, terminal: &Terminal) -> Running {
        let mut vmm = self;
        // Executes vmm in its place.
        vmm.before.splice(0..0, ["setsid", "--ctty"].map(OsString::from));
        let mut command = vmm.build();
        terminal.attach(&mut command);
        Running::start(command, vmm.limit, Some(terminal.output()))
    }
}
