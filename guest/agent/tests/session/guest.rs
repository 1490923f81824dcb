//! A guest for the tests: a process in a mount and network namespace of its own, whose root is a directory that looks like the
//! initramfs. It runs the agent's session in earnest; only vsock is a pair of unix sockets, and the image a directory.

use std::io::Read;
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use std::{env, fs};

use agent::error::Error;
use agent::session::Machine;
use protocol::{
    Begin, ByteString, Dialogue, Disk, FromAgent, Root, Seed, Start, StreamHeader, StreamKind, ToAgent, Token,
};
use protocol::{read_message, write_message};
use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags};
use rustix::mount::{
    MountPropagationFlags, UnmountFlags, mount_bind, mount_bind_recursive, mount_change, unmount,
};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::process::{Pid, Signal, WaitOptions, set_parent_process_death_signal, waitpid};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Names the directory to the process that becomes the guest.
const DIRECTORY: &str = "AGENT_TEST_DIRECTORY";

/// Applets that the tests use.
const APPLETS: &str = "awk cat chmod cut dd env false grep head hostname id ifconfig kill ls md5sum mkdir mount nproc ps pwd readlink route sed \
                       seq setsid sh sleep stat stty tail touch tr true tty wc yes";

/// What the containers' `/etc/machine-id` becomes.
pub const MACHINE_ID: [u8; 16] = [0xab; 16];

/// What is not to be done to the machine that runs the tests, is written down here.
const CLOCK_FILE: &str = "clock";

pub const TOKEN: Token = Token(*b"a token of tests");

/// Says why the tests cannot run here, if they cannot. Where they must, that is a failure.
pub fn unavailable() -> bool {
    let why = if !rustix::process::geteuid().is_root() {
        "needs root"
    } else if !Path::new("/bin/busybox").exists() {
        "needs /bin/busybox (package busybox-static)"
    } else {
        return false;
    };
    assert!(env::var("CI").is_err(), "{why}");
    eprintln!("skipped: {why}");
    true
}

/// A guest that waits for, or runs, a container.
pub struct Guest {
    process: Child,
    dialogue: Dialogue,
    pub control: UnixStream,
    streams: UnixListener,
    directory: tempfile::TempDir,
}

impl Guest {
    /// Starts a guest and has its image mounted.
    pub fn boot() -> Self {
        let mut guest = Self::greeted();
        assert!(guest.begin().as_deref() == Some(b"{}"));
        guest
    }

    /// Says Begin, and hears what the image says.
    pub fn begin(&mut self) -> Option<ByteString> {
        self.say(&ToAgent::Begin(Box::new(Begin {
            clock: 5_000_000_007,
            seed: Seed([9; 32]),
            machine_id: MACHINE_ID,
            root: Root { device: "vda".into(), file_system: String::new() },
        })));
        match self.hear() {
            FromAgent::Image { config } => config,
            other => panic!("{other:?}"),
        }
    }

    /// Starts a guest and hears its Hello.
    pub fn greeted() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        make_image(&root.join("image"));
        fs::write(root.join("init"), "the agent").unwrap();
        let listen = |name| UnixListener::bind(root.join(name)).unwrap();
        let (control, streams) = (listen("control"), listen("stream"));
        let process = Command::new(env::current_exe().unwrap())
            .args(["--ignored", "--exact", "guest_process", "--test-threads=1"])
            .env(DIRECTORY, root)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let (control, _) = control.accept().unwrap();
        control.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let dialogue = Dialogue::default();
        let mut guest = Self { process, dialogue, control, streams, directory };
        assert!(matches!(guest.hear(), FromAgent::Hello { .. }));
        guest
    }

    /// What the agent has set the clock to, in the order in which it did.
    pub fn clocks(&self) -> Vec<u64> {
        let file = fs::read_to_string(self.directory.path().join(CLOCK_FILE)).unwrap();
        file.lines().map(|line| line.parse().unwrap()).collect()
    }

    pub fn say(&mut self, message: &ToAgent) {
        assert!(self.dialogue.say(message), "{message:?}");
        write_message(&mut self.control, message).unwrap();
    }

    pub fn hear(&mut self) -> FromAgent {
        let message = read_message(&mut self.control).unwrap().expect("a message");
        self.dialogue.heard(&message).unwrap();
        message
    }

    pub fn start(&mut self, start: Start) {
        self.say(&ToAgent::Start(Box::new(start)));
    }

    /// The next stream that the agent connects.
    pub fn accept(&self) -> (StreamKind, UnixStream) {
        let (mut stream, _) = self.streams.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut header = [0; StreamHeader::SIZE];
        stream.read_exact(&mut header).unwrap();
        let header = StreamHeader::decode(&header).unwrap();
        assert_eq!(header.token, TOKEN);
        (header.kind, stream)
    }

    /// The streams of a start without a terminal, in the order of the kinds.
    pub fn accept_pipes(&self, stdin: bool) -> Vec<UnixStream> {
        let expected = if stdin { 0u8..3 } else { 1..3 };
        expected
            .map(|kind| {
                let (found, stream) = self.accept();
                assert_eq!(found as u8, kind);
                stream
            })
            .collect()
    }

    /// Starts, collects what comes, and ends the guest.
    pub fn run(mut self, start: Start) -> Ran {
        self.start(start);
        let mut ran = Ran { last: self.hear(), stdout: String::new(), stderr: String::new() };
        // What failed has no streams, or some that end without a header.
        if matches!(ran.last, FromAgent::Started { .. }) {
            let streams = self.accept_pipes(false);
            let [stdout, stderr] = streams.try_into().map(|s: [UnixStream; 2]| s.map(collect)).unwrap();
            ran = Ran { last: self.hear(), stdout: text(stdout), stderr: text(stderr) };
        }
        self.say(&ToAgent::Shutdown);
        self.wait();
        ran
    }

    /// Waits until the VM would end.
    pub fn wait(&mut self) {
        assert!(self.process.wait().unwrap().success());
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if let Some(cgroup) = cgroup_of(self.process.id()) {
            // What was killed with the guest takes a moment to be gone.
            let _ = fs::write(cgroup.join("cgroup.kill"), "1");
            for _ in 0..500 {
                let _ = fs::remove_dir(cgroup.join("container"));
                if !cgroup.exists() || fs::remove_dir(&cgroup).is_ok() {
                    break;
                }
                thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

/// The cgroup that stands for the whole hierarchy of the guest whose process has this number; `None` where there is no cgroup v2.
fn cgroup_of(process: u32) -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let mount = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2"))?;
    Some(Path::new(mount.split(' ').nth(1)?).join(format!("agent-test-{process}")))
}

/// Takes this process to a cgroup of its own.
fn enter_cgroup() {
    let Some(cgroup) = cgroup_of(std::process::id()) else { return };
    if fs::create_dir(&cgroup).is_ok() {
        fs::write(cgroup.join("cgroup.procs"), "0").unwrap();
    }
}

pub struct Ran {
    pub last: FromAgent,
    pub stdout: String,
    pub stderr: String,
}

/// Reads a stream to its end, aside.
pub fn collect(mut stream: UnixStream) -> JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        bytes
    })
}

pub fn text(bytes: JoinHandle<Vec<u8>>) -> String {
    String::from_utf8(bytes.join().unwrap()).unwrap()
}

/// `sh -c script`.
pub fn shell(script: &str) -> Start {
    command(&["sh", "-c", script])
}

pub fn disk(name: &str, device: &str) -> Disk {
    Disk { name: name.into(), device: device.into(), spare: false }
}

pub fn command(args: &[&str]) -> Start {
    Start {
        token: TOKEN,
        args: args.iter().map(|&arg| arg.into()).collect(),
        hostname: "box".into(),
        ..Start::default()
    }
}

fn make_image(image: &Path) {
    for directory in ["bin", "etc", "tmp", ".vmm", "proc"] {
        fs::create_dir_all(image.join(directory)).unwrap();
    }
    fs::copy("/bin/busybox", image.join("bin/busybox")).unwrap();
    for applet in APPLETS.split_whitespace() {
        symlink("busybox", image.join("bin").join(applet)).unwrap();
    }
    fs::write(image.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nweb:x:33:34::/srv:/bin/sh\n").unwrap();
    fs::write(image.join("etc/group"), "root:x:0:\nwww:x:34:\naudio:x:29:web\n").unwrap();
    fs::write(image.join("bin/data"), "not executable").unwrap();
    fs::write(image.join("etc/machine-id"), "uninitialized\n").unwrap();
    fs::write(image.join(".vmm/image.json"), "{}").unwrap();
    add_this_program(image);
}

/// Puts this program and the libraries that it has loaded into an image.
fn add_this_program(image: &Path) {
    let copy = |from: &Path, to: &Path| {
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(from, to).unwrap();
    };
    copy(&env::current_exe().unwrap(), &image.join("bin/tests"));
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    for path in maps.lines().filter_map(|line| line.split_whitespace().nth(5)).filter(|p| p.contains(".so")) {
        // The loader is looked for by another path than it is mapped from.
        for directory in ["lib64", path.trim_start_matches('/').rsplit_once('/').unwrap().0] {
            copy(Path::new(path), &image.join(directory).join(Path::new(path).file_name().unwrap()));
        }
    }
}

/// The guest's side: a process with one thread, PID 1 of a namespace, runs a session to its end.
pub fn process() {
    let Some(directory) = env::var_os(DIRECTORY) else { return };
    enter_cgroup();
    // SAFETY: the flags concern no descriptor. The child has the only thread of its process, and the C library readies its heap for that.
    let child = unsafe {
        let spaces = UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWPID;
        unshare_unsafe(spaces | UnshareFlags::NEWCGROUP).unwrap();
        libc::fork()
    };
    let Some(child) = Pid::from_raw(child) else {
        // Ends with this test, and so do the processes of its namespace.
        set_parent_process_death_signal(Some(Signal::KILL)).unwrap();
        // What the tests were started with is not the agent's to keep from its container.
        // SAFETY: changes only what an execve will do.
        let closed =
            unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
        assert_eq!(closed, 0);
        let done = std::panic::catch_unwind(|| serve(Path::new(&directory)));
        // SAFETY: ends the process without the test harness's leave, which is its parent's.
        unsafe { libc::_exit(i32::from(done.is_err())) }
    };
    let (_, status) = waitpid(Some(child), WaitOptions::empty()).unwrap().unwrap();
    assert_eq!(status.exit_status(), Some(0));
}

fn serve(directory: &Path) {
    // A card. Where there is no way to make one, no test looks for it.
    let _ = Command::new("ip").args("link add eth0 type veth peer name eth1".split(' ')).status();
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
    mount_bind_recursive(directory, directory).unwrap();
    rustix::process::chdir(directory).unwrap();
    // Nothing of the tests' machine is below it, as nothing is below an initramfs.
    rustix::process::pivot_root(".", ".").unwrap();
    unmount(".", UnmountFlags::DETACH).unwrap();
    // The directory is what the initramfs is in a VM. What is in it is reached by this descriptor from now on.
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let outside = rustix::fs::open("/", flags, Mode::empty()).unwrap();
    let machine = Namespaces { outside };
    let control = machine.dial("control", SocketFlags::CLOEXEC).unwrap();
    agent::session::serve(control, &machine);
}

/// What stands in for the machine: the directory is the disk, and the devices are the kernel's own.
struct Namespaces {
    outside: OwnedFd,
}

impl Namespaces {
    fn dial(&self, path: &str, flags: SocketFlags) -> rustix::io::Result<OwnedFd> {
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::process::fchdir(&self.outside)?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        rustix::process::chdir("/")?;
        Ok(socket)
    }
}

impl Machine for Namespaces {
    fn prepare(&self) -> Result<(), Error> {
        agent::mounts::cover_initramfs()?;
        agent::mounts::make_directories()
    }

    fn set_clock(&self, nanoseconds: u64) -> Result<(), Error> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::APPEND | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.outside, CLOCK_FILE, flags, Mode::RUSR).unwrap();
        rustix::io::write(&file, format!("{nanoseconds}\n").as_bytes()).unwrap();
        Ok(())
    }

    fn open_image(&self, _: &Root) -> Result<Option<ByteString>, Error> {
        rustix::process::fchdir(&self.outside).unwrap();
        mount_bind("image", "/image").unwrap();
        let config = agent::image::read_config(c"/image/.vmm/image.json")?;
        agent::mounts::make_overlay()?;
        Ok(config)
    }

    // The disks are the tests' machine's, and not to be opened.
    fn wait_for_disk(&self, _: &str) -> Result<(), Error> {
        Ok(())
    }

    fn connect_stream(&self) -> rustix::io::Result<OwnedFd> {
        self.dial("stream", SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)
    }
}
