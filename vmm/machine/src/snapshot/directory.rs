//! A snapshot's directory: written beside its place and moved there whole, and opened again with suspicion.
//!
//! Somebody may pull the plug at any moment: until the last step the directory has another name, and an older snapshot of the
//! same name stays as it was. What a killed vmm left behind is removed by the next that writes there.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};
use rustix::io::Errno;

use super::manifest::{Fault, HostKind, MAX_BYTES, Manifest, Parent};
pub use super::place::remove;
use super::place::{occupied, open, remove_abandoned, remove_replaced};
use super::{MachineState, SnapshotError, memory, trust};

/// File names.
pub const MANIFEST: &str = "manifest";
pub(super) const STATE: &str = "state";
pub(super) const MEMORY: &str = "memory";
pub(super) const LOCK: &str = "lock";
/// Longest `state`: vsock may have 64 MiB of a guest's bytes in its buffers.
const MAX_STATE: u64 = 256 << 20;
/// Most snapshots on top of each other: a whole one, and diffs.
pub(super) const MAX_CHAIN: usize = 32;

/// A snapshot that is being written. Dropping it removes what there is.
#[derive(Debug)]
pub struct Draft {
    target: PathBuf,
    partial: PathBuf,
    /// Locked for as long as this lives: a partial directory whose lock is free is nobody's.
    _lock: File,
    done: bool,
}

fn failed(path: &Path, what: &'static str) -> impl FnOnce(io::Error) -> SnapshotError {
    move |source| SnapshotError::Io { path: path.into(), what, source }
}

impl Draft {
    /// Begins a snapshot that will be at `target`: a path where nothing is, an empty directory, or an older snapshot, which it then
    /// takes the place of.
    ///
    /// # Errors
    /// When something else is there, or the file system refuses.
    pub fn create(target: &Path) -> Result<Self, SnapshotError> {
        let target = std::path::absolute(target).map_err(failed(target, "cannot be placed"))?;
        if occupied(&target).map_err(failed(&target, "cannot be looked at"))? {
            return Err(SnapshotError::Occupied { path: target });
        }
        let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else {
            return Err(SnapshotError::Occupied { path: target });
        };
        let name = name.to_string_lossy();
        fs::create_dir_all(parent).map_err(failed(&target, "cannot make the directory above"))?;
        let prefix = format!(".{name}.partial-");
        remove_abandoned(parent, &prefix);
        let partial = parent.join(format!("{prefix}{}-{}", std::process::id(), unique()));
        let made = fs::DirBuilder::new().mode(0o700).create(&partial);
        made.map_err(failed(&target, "cannot make its directory"))?;
        let lock = create(&partial.join(LOCK)).and_then(|lock| {
            flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
            Ok(lock)
        });
        match lock {
            Ok(lock) => Ok(Draft { target, partial, _lock: lock, done: false }),
            Err(error) => {
                let _ = fs::remove_dir_all(&partial);
                Err(failed(&target, "cannot lock its directory")(error))
            }
        }
    }

    /// Where it will be.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Where it is now.
    pub fn path(&self) -> &Path {
        &self.partial
    }

    /// The file for guest memory.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn memory(&self) -> Result<File, SnapshotError> {
        create(&self.partial.join(MEMORY)).map_err(failed(&self.target, "cannot make the file for memory"))
    }

    /// Writes the state, and says how it is to be known again.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn state(&self, state: &MachineState) -> Result<super::manifest::StateFile, SnapshotError> {
        let encode =
            |e: postcard::Error| SnapshotError::Device(format!("the state cannot be written down: {e}"));
        let bytes = postcard::to_stdvec(state).map_err(encode)?;
        if bytes.len() as u64 > MAX_STATE {
            let what = format!("the state has {} MiB, more than can be read again", bytes.len() >> 20);
            return Err(SnapshotError::Device(what));
        }
        self.write(STATE, &bytes).map_err(failed(&self.target, "cannot write the state"))?;
        Ok(super::manifest::StateFile { bytes: bytes.len() as u64, crc: crc32fast::hash(&bytes) })
    }

    /// Writes the manifest and moves everything to its place. What is on disk then is whole, whatever happens.
    ///
    /// # Errors
    /// Those of the file system; nothing is left of the snapshot then, and an older one is as it was.
    pub fn commit(mut self, manifest: &Manifest) -> Result<(), SnapshotError> {
        self.place(manifest).map_err(failed(&self.target, "cannot be put in its place"))?;
        self.done = true;
        Ok(())
    }

    fn place(&self, manifest: &Manifest) -> io::Result<()> {
        self.write(MANIFEST, &manifest.encode())?;
        for entry in fs::read_dir(&self.partial)? {
            File::open(entry?.path())?.sync_all()?;
        }
        File::open(&self.partial)?.sync_all()?;
        match renameat_with(CWD, &self.partial, CWD, &self.target, RenameFlags::NOREPLACE) {
            Ok(()) => {}
            Err(Errno::EXIST) => {
                if occupied(&self.target)? {
                    return Err(Errno::EXIST.into());
                }
                renameat_with(CWD, &self.partial, CWD, &self.target, RenameFlags::EXCHANGE)?;
                // The older one, under our name. If it stays, the next who saves here removes it.
                remove_replaced(&self.partial);
            }
            Err(error) => return Err(error.into()),
        }
        let _ = fs::remove_file(self.target.join(LOCK));
        self.target.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all())
    }

    fn write(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        io::Write::write_all(&mut create(&self.partial.join(name))?, bytes)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.done {
            let _ = fs::remove_dir_all(&self.partial);
        }
    }
}

fn create(path: &Path) -> io::Result<File> {
    fs::OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)
}

fn unique() -> u32 {
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}

/// A snapshot that was opened: it is what it says, and can be restored on this host as far as can be told.
pub struct Loaded {
    /// Where it is.
    pub directory: PathBuf,
    /// What it is.
    pub manifest: Manifest,
    /// Its state.
    pub state: MachineState,
    /// Its memory and that of its parents, the oldest first. Only the first has all pages.
    pub memory: Vec<Layer>,
}

/// One memory file.
pub struct Layer {
    /// The file.
    pub file: File,
    /// Which of its pages count; `None` for all.
    pub pages: Option<Vec<memory::Run>>,
}

/// Reads what the snapshot in `directory` says of itself.
///
/// # Errors
/// When there is none, or its manifest is not one that this vmm reads.
pub fn manifest(directory: &Path) -> Result<Manifest, SnapshotError> {
    read_manifest(directory, false)
}

/// As [`manifest`]; with `trust`, only if nobody else could have written it.
fn read_manifest(directory: &Path, trust: bool) -> Result<Manifest, SnapshotError> {
    let what = "cannot read its manifest";
    let file = open(&directory.join(MANIFEST)).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => SnapshotError::None { path: directory.into() },
        _ => failed(directory, what)(error),
    })?;
    if trust {
        let above = File::open(directory).map_err(failed(directory, what))?;
        trusted(directory, &above, "the directory", what)?;
        trusted(directory, &file, MANIFEST, what)?;
    }
    let bytes = read(file, MAX_BYTES).map_err(failed(directory, what))?;
    Manifest::decode(&bytes).map_err(|fault| match fault {
        Fault::Version(found) => SnapshotError::Version { path: directory.into(), found },
        Fault::Damaged(fault) => SnapshotError::Damaged { path: directory.into(), file: MANIFEST, fault },
    })
}

impl Loaded {
    /// Opens the snapshot in `directory` on a host of the kind `here`.
    ///
    /// # Errors
    /// [`SnapshotError`], with the reason.
    pub fn open(directory: &Path, here: &HostKind) -> Result<Self, SnapshotError> {
        let manifest = read_manifest(directory, true)?;
        if let Some(reason) = manifest.host.unfit(here) {
            return Err(SnapshotError::Unfit { path: directory.into(), reason });
        }
        let (state, layer) = open_layer(directory, &manifest)?;
        let mut memory = vec![layer];
        let mut parent = manifest.parent.clone();
        while let Some(Parent { id, directory: above }) = parent {
            if memory.len() == MAX_CHAIN {
                let reason = format!("it has more than {MAX_CHAIN} parents");
                return Err(SnapshotError::Unfit { path: directory.into(), reason });
            }
            let found = read_manifest(&above, true)?;
            if found.id != id || found.memory.size != manifest.memory.size {
                let reason = format!("its parent is no longer in {}", above.display());
                return Err(SnapshotError::Unfit { path: directory.into(), reason });
            }
            memory.push(open_layer(&above, &found)?.1);
            parent = found.parent;
        }
        memory.reverse();
        let whole = memory.first().is_some_and(|layer| layer.pages.is_none());
        let diffs = memory.iter().skip(1).all(|layer| layer.pages.is_some());
        if !whole || !diffs || manifest.config.memory.size.bytes() != manifest.memory.size {
            return Err(damaged(directory, MANIFEST, "its memory is not complete"));
        }
        if state.vcpus.len() != usize::from(manifest.config.vcpus)
            || state.devices.len() != manifest.config.devices.len()
        {
            return Err(damaged(directory, STATE, "it is of another machine"));
        }
        Ok(Loaded { directory: directory.into(), manifest, state, memory })
    }

    /// Reads all of the memory files, and compares them with their checksums. Takes a while.
    ///
    /// # Errors
    /// When one differs.
    pub fn verify(&self) -> Result<(), SnapshotError> {
        let size = self.manifest.memory.size;
        let Some(layer) = self.memory.last() else { return Ok(()) };
        // A diff may have pages of zeros, which count; they come up only where its list is walked.
        if layer.pages.is_some() {
            return Ok(());
        }
        let crc =
            memory::checksum(&layer.file, size).map_err(failed(&self.directory, "cannot read its memory"))?;
        if crc == self.manifest.memory.crc {
            return Ok(());
        }
        Err(damaged(&self.directory, MEMORY, "its checksum is wrong"))
    }
}

fn damaged(path: &Path, file: &'static str, fault: &str) -> SnapshotError {
    SnapshotError::Damaged { path: path.into(), file, fault: fault.into() }
}

fn open_layer(directory: &Path, manifest: &Manifest) -> Result<(MachineState, Layer), SnapshotError> {
    let what = "cannot read the file called state";
    let file = open_trusted(directory, STATE, what)?;
    let bytes = read(file, MAX_STATE).map_err(failed(directory, what))?;
    if bytes.len() as u64 != manifest.state.bytes || crc32fast::hash(&bytes) != manifest.state.crc {
        return Err(damaged(directory, STATE, "its length or checksum is not what the manifest says"));
    }
    let state: MachineState =
        postcard::from_bytes(&bytes).map_err(|e| damaged(directory, STATE, &e.to_string()))?;
    let file = open_trusted(directory, MEMORY, "cannot open its memory")?;
    let belongs = memory::belongs(&file, manifest.id, manifest.memory.size);
    if !belongs.map_err(failed(directory, "cannot read its memory"))? {
        return Err(damaged(directory, MEMORY, "it has another length, or is another snapshot's"));
    }
    if state.changed.is_some() != manifest.parent.is_some() {
        return Err(damaged(directory, STATE, "it does not say which pages it has"));
    }
    let pages = state.changed.clone();
    if pages.as_ref().is_some_and(|runs| !memory::are_pages_of(runs, manifest.memory.size)) {
        return Err(damaged(directory, STATE, "it lists pages that are none, or twice"));
    }
    Ok((state, Layer { file, pages }))
}

/// Opens a file of a snapshot that is to be restored, if nobody else could have written it.
fn open_trusted(directory: &Path, name: &str, what: &'static str) -> Result<File, SnapshotError> {
    let file = open(&directory.join(name)).map_err(failed(directory, what))?;
    trusted(directory, &file, name, what)?;
    Ok(file)
}

fn trusted(directory: &Path, file: &File, name: &str, what: &'static str) -> Result<(), SnapshotError> {
    let checked = trust::check(file, name).map_err(failed(directory, what))?;
    checked.map_err(|fault| SnapshotError::Untrusted { path: directory.into(), fault })
}

fn read(file: File, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(most + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > most {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "larger than any that was ever written"));
    }
    Ok(bytes)
}
