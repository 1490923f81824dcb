//! A machine with a control API, its snapshots, and the machines restored from them.

use std::path::{Path, PathBuf};

use crate::{Ended, Running, Vmm, artefacts};

/// A directory with a machine's socket, and whatever else a test keeps there: disks, snapshots.
pub struct Place(tempfile::TempDir);

impl Place {
    /// A new one, below `target/`: `/tmp` may be memory, and snapshots are large.
    #[allow(clippy::new_without_default, reason = "making one changes the host")]
    pub fn new() -> Self {
        let above = artefacts::target().join("tests");
        std::fs::create_dir_all(&above).expect("a directory for tests");
        let prefix = "place-";
        Place(tempfile::Builder::new().prefix(prefix).tempdir_in(above).expect("a directory"))
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A file of `mib` MiB of zeros.
    pub fn disk(&self, name: &str, mib: u64) -> PathBuf {
        let path = self.path(name);
        let file = std::fs::File::create(&path).expect("a file");
        file.set_len(mib << 20).expect("a sparse file");
        path
    }

    /// The machine whose `--api-socket` is the file `name` here.
    pub fn api(&self, name: &str) -> Api {
        Api { socket: self.path(name) }
    }
}

/// A machine's control API, asked as a person would ask it.
pub struct Api {
    socket: PathBuf,
}

impl Api {
    /// Its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// `vmm ctl SOCKET …`
    #[track_caller]
    pub fn ask(&self, words: &[&str]) -> Ended {
        Vmm::new().arg("ctl").arg(&self.socket).args(words).run()
    }

    /// Asks, and checks that it is done.
    #[track_caller]
    pub fn done(&self, words: &[&str]) -> String {
        self.ask(words).expect(0).out()
    }

    /// Asks, and checks that the machine refuses: exit code 1, and one line that has all of `words` in it.
    #[track_caller]
    pub fn refuses(&self, question: &[&str], words: &[&str]) {
        let ended = self.ask(question).expect(1);
        let err = ended.err();
        assert!(err.starts_with("vmm: ") && err.lines().count() == 1, "{}", ended.transcript());
        assert!(words.iter().all(|word| err.contains(word)), "{words:?} are not in {err:?}");
        assert!(ended.stdout.is_empty(), "{}", ended.transcript());
    }

    /// Saves the machine.
    #[track_caller]
    pub fn save(&self, directory: &Path, diff: bool) -> Ended {
        let save = Vmm::new().args(["snapshot", "save"]).arg(&self.socket).arg(directory);
        if diff { save.arg("--diff").run() } else { save.run() }.expect(0)
    }
}

/// Kills a machine, with no time to say anything.
pub fn kill(running: Running) {
    drop(running);
}

/// `vmm restore DIR --api-socket SOCKET`
pub fn restore(directory: &Path, api: &Api) -> Vmm {
    Vmm::new().arg("restore").arg(directory).arg("--api-socket").arg(api.socket())
}
