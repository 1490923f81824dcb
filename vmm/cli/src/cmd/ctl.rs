//! `vmm ctl SOCKET …`: asks a running machine, and says what it answered: for people as lines and tables, with `--json` as it came.
//!
//! What the machine refuses is one line and exit code 1; where there is no machine to answer, [`exit_code::VMM`].

pub mod text;

use std::io::Write as _;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use machine::api::client::{Answer, Question};
use machine::host::tap::Tap;
use machine::plan::Disk;
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::args::ctl::{CtlArgs, CtlCommand};
use crate::exit_code;
use crate::log_line::say;

/// How long a guest may take to shut down when nobody says, and how much later the answer may come.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(10);
const ANSWER_PATIENCE: Duration = Duration::from_secs(30);
/// How long saving a machine may take.
const SNAPSHOT_PATIENCE: Duration = Duration::from_secs(3600);

/// Asks, prints the answer and returns the exit code.
///
/// # Errors
/// When there is no machine at the socket, or no file to give it.
pub fn run(args: &CtlArgs) -> anyhow::Result<u8> {
    let answer = match ask(args)?.content() {
        Ok(answer) => answer,
        Err(refusal) => {
            say(&format!("vmm: {refusal}"));
            return Ok(exit_code::REFUSED);
        }
    };
    let text = if args.json { raw(answer) } else { words(args.command.as_ref(), answer)?.into_bytes() };
    std::io::stdout().lock().write_all(&text)?;
    Ok(0)
}

fn ask(args: &CtlArgs) -> anyhow::Result<Answer> {
    let question = |method, path| Question { patience: ANSWER_PATIENCE, ..Question::new(method, path) };
    let put = |path| question("PUT", path).ask(&args.socket);
    Ok(match args.command.as_ref().unwrap_or(&CtlCommand::Describe) {
        CtlCommand::Describe => question("GET", "/v1/vm").ask(&args.socket)?,
        CtlCommand::Start => put("/v1/vm/start")?,
        CtlCommand::Pause => put("/v1/vm/pause")?,
        CtlCommand::Resume => put("/v1/vm/resume")?,
        CtlCommand::Shutdown { force, timeout } => {
            let timeout = timeout.unwrap_or(SHUTDOWN_PATIENCE);
            let milliseconds = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
            let body = json!({ "force": force, "timeout_ms": milliseconds });
            let patience = timeout + ANSWER_PATIENCE;
            Question { body: Some(&body), patience, ..question("PUT", "/v1/vm/shutdown") }
                .ask(&args.socket)?
        }
        CtlCommand::Snapshot { directory, diff } => snapshot(&args.socket, directory, *diff)?,
        CtlCommand::Attach { slot, disk, tap } => {
            let path = format!("/v1/devices/{slot}/backend");
            let question = question("PUT", &path);
            match (disk, tap) {
                (Some(disk), _) => {
                    // The lock belongs to the open file, and goes with it.
                    let file = Disk::open(&disk.path, disk.read_only)?.file;
                    let body = json!({ "kind": "disk", "read_only": disk.read_only });
                    Question { body: Some(&body), files: &[file.as_fd()], ..question }.ask(&args.socket)?
                }
                (None, Some(tap)) => {
                    let tap = Tap::open(tap)?;
                    let body = json!({ "kind": "tap" });
                    Question { body: Some(&body), files: &[tap.as_fd()], ..question }.ask(&args.socket)?
                }
                (None, None) => anyhow::bail!("nothing to attach: give --disk FILE or --tap NAME"),
            }
        }
        CtlCommand::Metrics { prometheus } => {
            let accept = if *prometheus { "text/plain" } else { "application/json" };
            Question { accept, ..question("GET", "/v1/metrics") }.ask(&args.socket)?
        }
    })
}

/// Asks the machine at `socket` to save itself.
///
/// # Errors
/// When there is no machine to answer.
pub fn snapshot(socket: &Path, directory: &Path, diff: bool) -> anyhow::Result<Answer> {
    let body = json!({ "directory": absolute(directory)?, "diff": diff });
    let patience = SNAPSHOT_PATIENCE;
    Ok(Question { body: Some(&body), patience, ..Question::new("PUT", "/v1/vm/snapshot") }.ask(socket)?)
}

/// The machine lives in a directory of its own.
fn absolute(directory: &Path) -> anyhow::Result<String> {
    let absolute = std::path::absolute(directory).with_context(|| format!("{}", directory.display()))?;
    let text = absolute.to_str().map(Into::into);
    text.with_context(|| format!("{}: the path is not UTF-8: choose another", directory.display()))
}

fn raw(mut answer: Vec<u8>) -> Vec<u8> {
    if !answer.is_empty() && !answer.ends_with(b"\n") {
        answer.push(b'\n');
    }
    answer
}

fn words(command: Option<&CtlCommand>, answer: Vec<u8>) -> anyhow::Result<String> {
    Ok(match command {
        None | Some(CtlCommand::Describe) => text::description(&read(&answer)?),
        Some(CtlCommand::Snapshot { .. }) => text::snapshot(&read(&answer)?),
        Some(CtlCommand::Metrics { prometheus: false }) => text::metrics(&read(&answer)?),
        Some(_) => String::from_utf8(answer).context("the machine's answer is not text")?,
    })
}

/// The machine's answer as what it says.
///
/// # Errors
/// When it is something else.
pub fn read<T: DeserializeOwned>(answer: &[u8]) -> anyhow::Result<T> {
    serde_json::from_slice(answer)
        .context("the machine is another version of vmm: see its answer with --json")
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::path::PathBuf;
    use std::sync::{Arc, Mutex};

    use clap::Parser;
    use machine::api::{Limits, Server};
    use machine::control::{Control, Metrics, Refusal, Reply, Request, State};
    use machine::plan::ListeningSocket;

    use super::*;
    use crate::args::{Cli, Command};

    /// Paused, and says what it was asked.
    #[derive(Default)]
    struct Paused(Mutex<Vec<String>>);

    impl Control for Paused {
        fn ask(&self, request: Request) -> Result<Reply, Refusal> {
            self.0.lock().unwrap().push(format!("{request:?}"));
            match request {
                Request::Pause => Err(Refusal::State { now: State::Paused, wanted: "running" }),
                Request::Metrics => Ok(Reply::Metrics(Metrics::default())),
                _ => Ok(Reply::Done),
            }
        }
    }

    fn ctl(socket: &Path, words: &[&str]) -> anyhow::Result<u8> {
        let socket = socket.to_str().unwrap();
        let cli = Cli::try_parse_from([&["vmm", "ctl", socket], words].concat()).unwrap();
        match cli.command {
            Some(Command::Ctl(args)) => run(&args),
            other => panic!("{other:?}"),
        }
    }

    /// A directory that goes when the test does.
    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("vmm-{name}-{}", std::process::id()));
            std::fs::create_dir(&path).unwrap();
            Dir(path)
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_machine_is_asked_what_the_flags_say() {
        let dir = Dir::new("ctl-asked");
        let path = dir.0.join("s");
        let machine = Arc::new(Paused::default());
        let socket = ListeningSocket::bind(&path).unwrap();
        let _server = Server::start(socket, machine.clone(), Limits::default()).unwrap();
        std::fs::write(dir.0.join("disk"), [0; 512]).unwrap();
        let disk = dir.0.join("disk,ro");
        let table: [(&[&str], u8, &str); 8] = [
            (&["start"], 0, "Start"),
            (&["pause"], 1, "Pause"),
            (&["resume", "--json"], 0, "Resume"),
            (&["shutdown"], 0, "Shutdown { force: false, timeout: 10s }"),
            (&["shutdown", "--force", "--timeout", "0.5"], 0, "Shutdown { force: true, timeout: 500ms }"),
            (&["metrics"], 0, "Metrics"),
            (&["metrics", "--prometheus"], 0, "Metrics"),
            (&["attach", "1", "--disk", disk.to_str().unwrap()], 0, "Attach { slot: 1, backend: Disk {"),
        ];
        for (words, code, asked) in table {
            assert_eq!(ctl(&path, words).unwrap(), code, "{words:?}");
            let last = machine.0.lock().unwrap().pop().unwrap();
            assert!(last.starts_with(asked), "{words:?}: {last}");
        }
        // What it does not answer as it should is not printed as if it had.
        assert!(ctl(&path, &["snapshot", "there"]).unwrap_err().to_string().contains("--json"));
        let last = machine.0.lock().unwrap().pop().unwrap();
        let there = std::env::current_dir().unwrap().join("there");
        assert!(last.contains(there.to_str().unwrap()), "{last}");
    }

    #[test]
    fn where_no_machine_is_that_is_said() {
        let dir = Dir::new("ctl-absent");
        let path = dir.0.join("s");
        let message = |words: &[&str]| format!("{:#}", ctl(&path, words).unwrap_err());
        assert!(message(&[]).starts_with(&format!("no machine listens at {}", path.display())));
        drop(UnixListener::bind(&path).unwrap());
        assert!(message(&["pause"]).starts_with("no machine listens"));
        std::fs::remove_file(&path).unwrap();
        let other = UnixListener::bind(&path).unwrap();
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = other.accept().unwrap();
            // Who asks is done asking: closing on unread words would be an error of its own there.
            let _ = std::io::Read::read(&mut stream, &mut [0; 4096]);
            let _ = std::io::Write::write_all(&mut stream, b"220 mail\r\n");
        });
        assert!(message(&["pause"]).contains("is no vmm"));
        thread.join().unwrap();
        assert!(
            message(&["attach", "1", "--disk", "/absent"]).starts_with("disk /absent: it does not exist")
        );
    }
}
