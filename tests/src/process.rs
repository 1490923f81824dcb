//! A `vmm` process: its input, its output as it comes, its end. Whatever happens to the test, the process is gone afterwards.

use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// What came of a run.
#[derive(Debug)]
pub struct Ended {
    /// The command line, for messages.
    pub command: String,
    /// How it ended.
    pub status: ExitStatus,
    /// Everything on standard output.
    pub stdout: Vec<u8>,
    /// Everything on standard error.
    pub stderr: Vec<u8>,
    /// How long it took.
    pub took: Duration,
}

impl Ended {
    /// The exit code; as a shell counts when a signal ended it.
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }

    /// Standard output as text.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Checks the exit code.
    #[track_caller]
    pub fn expect(self, code: i32) -> Self {
        assert_eq!(self.code(), code, "exit code of {}\n{}", self.command, self.transcript());
        self
    }

    /// The rest of the line `LABEL: …` of standard output. Tests print such lines in the guest and look at each here.
    #[track_caller]
    pub fn field(&self, label: &str) -> String {
        let out = self.out();
        let line = out.lines().find_map(|line| line.trim_end().strip_prefix(label)?.strip_prefix(':'));
        match line {
            Some(rest) => rest.trim_start().to_owned(),
            None => panic!("no line {label:?} from {}\n{}", self.command, self.transcript()),
        }
    }

    /// Checks that a run was refused as it should be: soon, with an exit code of `vmm`'s own, nothing on standard output, and one
    /// line on standard error in which all of `words` are. Returns that line.
    #[track_caller]
    pub fn refused(&self, words: &[&str]) -> String {
        let err = self.err();
        assert!(self.code() >= 125, "exit code {} of {}\n{}", self.code(), self.command, self.transcript());
        assert!(self.status.signal().is_none(), "a signal ended {}", self.command);
        assert_eq!(err.lines().count(), 1, "one line from {}\n{}", self.command, self.transcript());
        assert!(err.starts_with("vmm: ") && err.ends_with('\n'), "{err:?}");
        for word in words {
            assert!(err.contains(word), "{word:?} is not in {err:?} of {}", self.command);
        }
        assert!(self.stdout.is_empty(), "{}", self.transcript());
        err.trim_end().to_owned()
    }

    /// The end of both outputs, for a person.
    pub fn transcript(&self) -> String {
        let tail = |bytes: &[u8]| {
            let start = bytes.len().saturating_sub(4000);
            String::from_utf8_lossy(bytes.get(start..).unwrap_or_default()).into_owned()
        };
        format!(
            "after {:.1} s, {}\n--- stdout ---\n{}\n--- stderr ---\n{}\n---",
            self.took.as_secs_f64(),
            self.status,
            tail(&self.stdout),
            tail(&self.stderr)
        )
    }
}

/// What a stream has brought so far.
#[derive(Default)]
struct Collected {
    state: Mutex<(Vec<u8>, bool)>,
    changed: Condvar,
}

impl Collected {
    fn gather(self: Arc<Self>, mut from: impl Read + Send + 'static) -> JoinHandle<()> {
        std::thread::spawn(move || {
            let mut buffer = vec![0; 64 << 10];
            loop {
                let count = match from.read(&mut buffer) {
                    Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                    // The master of a terminal that nobody has open any more fails with EIO: that is its end.
                    Err(_) => 0,
                    Ok(count) => count,
                };
                let mut state = self.state.lock().expect("no reader panics");
                state.0.extend(buffer.get(..count).unwrap_or_default());
                state.1 = count == 0;
                self.changed.notify_all();
                if count == 0 {
                    return;
                }
            }
        })
    }

    fn bytes(&self) -> Vec<u8> {
        self.state.lock().expect("no reader panics").0.clone()
    }

    /// Waits until `found` says so of what has come; `false` when the stream ended or time was up before.
    fn wait(&self, until: Instant, found: impl Fn(&[u8]) -> bool) -> bool {
        let mut state = self.state.lock().expect("no reader panics");
        loop {
            if found(&state.0) {
                return true;
            }
            let left = until.saturating_duration_since(Instant::now());
            if state.1 || left.is_zero() {
                return false;
            }
            state = self.changed.wait_timeout(state, left).expect("no reader panics").0;
        }
    }
}

/// A `vmm` that runs. Dropping it kills it.
pub struct Running {
    child: Child,
    command: String,
    started: Instant,
    deadline: Instant,
    stdin: Option<ChildStdin>,
    stdout: Arc<Collected>,
    stderr: Arc<Collected>,
    readers: Vec<JoinHandle<()>>,
}

impl Running {
    /// Starts `command`, which may run for `limit`. Its standard streams are pipes to us, unless `terminal` reads its output.
    pub(crate) fn start(mut command: Command, limit: Duration, terminal: Option<std::fs::File>) -> Self {
        if terminal.is_none() {
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        }
        let name = format!("{command:?}");
        let mut child = command.spawn().unwrap_or_else(|e| panic!("cannot start {name}: {e}"));
        // It holds copies of the terminal that keep it from ending.
        drop(command);
        let (stdout, stderr) = (Arc::new(Collected::default()), Arc::new(Collected::default()));
        let mut readers = Vec::new();
        readers.extend(terminal.map(|master| stdout.clone().gather(master)));
        readers.extend(child.stdout.take().map(|from| stdout.clone().gather(from)));
        readers.extend(child.stderr.take().map(|from| stderr.clone().gather(from)));
        let started = Instant::now();
        Running {
            stdin: child.stdin.take(),
            child,
            command: name,
            started,
            deadline: started + limit,
            stdout,
            stderr,
            readers,
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Writes to its standard input, and leaves that open.
    pub fn write(&mut self, bytes: &[u8]) {
        let stdin = self.stdin.as_mut().expect("standard input is closed");
        stdin.write_all(bytes).and_then(|()| stdin.flush()).expect("vmm reads its standard input");
    }

    /// Its standard input, for a thread that feeds it.
    pub fn take_stdin(&mut self) -> Option<ChildStdin> {
        self.stdin.take()
    }

    /// Whether it runs still.
    pub fn is_running(&self) -> bool {
        // Field 3 of a process that has ended and was not waited for is Z; its name, in parentheses, comes before.
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap_or_default();
        stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).expect("a process id");
        kill_process(pid, signal).expect("vmm still runs");
    }

    /// Sends it a signal again and again until it ends, as a person would press Ctrl-C: not so often that two become one.
    #[track_caller]
    pub fn insist(mut self, signal: Signal) -> Ended {
        for _ in 0..20 {
            self.signal(signal);
            std::thread::sleep(Duration::from_millis(500));
            if self.child.try_wait().is_ok_and(|status| status.is_some()) {
                break;
            }
        }
        self.wait()
    }

    /// Waits until `text` is on its standard output (or terminal), and fails when that never comes.
    #[track_caller]
    pub fn wait_for(&self, text: &str) {
        self.wait_for_count(text, 1);
    }

    /// Waits until `text` is on its standard output `count` times.
    #[track_caller]
    pub fn wait_for_count(&self, text: &str, count: usize) {
        let found = self
            .stdout
            .wait(self.deadline, |bytes| String::from_utf8_lossy(bytes).matches(text).count() >= count);
        if !found {
            panic!(
                "{text:?} did not come {count} times from {}\n--- stdout ---\n{}\n--- stderr ---\n{}",
                self.command,
                String::from_utf8_lossy(&self.stdout.bytes()),
                String::from_utf8_lossy(&self.stderr.bytes())
            );
        }
    }

    /// What its standard output has brought so far.
    pub fn so_far(&self) -> String {
        String::from_utf8_lossy(&self.stdout.bytes()).into_owned()
    }

    /// Closes its standard input, and waits for its end.
    #[track_caller]
    pub fn wait(mut self) -> Ended {
        drop(self.stdin.take());
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                break status;
            }
            if Instant::now() > self.deadline {
                let _ = self.child.kill();
                let status = self.child.wait().expect("a killed child ends");
                let ended = self.collect(status);
                panic!("{} did not end\n{}", ended.command, ended.transcript());
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        self.collect(status)
    }

    fn collect(&mut self, status: ExitStatus) -> Ended {
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
        Ended {
            command: self.command.clone(),
            status,
            stdout: self.stdout.bytes(),
            stderr: self.stderr.bytes(),
            took: self.started.elapsed(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
