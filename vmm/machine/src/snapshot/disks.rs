//! The disks of a snapshot: what they hold gets into its directory, and a restored machine gets disks of its own from there.
//!
//! Called by whoever saves or restores a machine, on that thread, while the devices are quiesced. No KVM, no guest memory.
//!
//! Saving: the machine keeps a [`LiveDisk`] of each disk beside the device. [`save`] puts its bytes into a new file: a
//! reflink where the file system has them, else a sparse copy. That file is a raw image that stands for itself; a disk that is an
//! overlay is made whole on the way, unless the snapshot may lean on the overlay's base ([`Lean`]). A [`Draft`] is what
//! [`save`] returns: nothing was waited for yet, so the machine can go on; [`Draft::finish`] makes the bytes last, and a draft
//! that is dropped takes its file with it. The directory itself is the caller's to sync and to move to its name. A read-only disk
//! is not copied: the snapshot notes which file it was and that it was not changed since.
//!
//! Restoring: [`open_for_restore`] never writes to a snapshot's file. The machine gets a reflink of it, else an overlay
//! over it, else a sparse copy, in a file without a name: it is gone when the machine is. [`How`] says which it was.

mod copy;
mod identity;
mod new_file;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use devices::virtio::block::{Medium, Overlay, OverlayError};
use rustix::fs::{FlockOperation, Mode, OFlags, SeekFrom, flock, seek};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::plan;
pub use identity::{FileName, Identity, NotAName, is_disk_file};
use new_file::NewFile;

/// A disk of a machine, apart from its device: a handle with which its bytes can be read while the device is quiesced.
#[derive(Debug)]
pub struct LiveDisk {
    /// The slot of its device.
    pub slot: usize,
    /// Where the user said it was, if anywhere; of a restored disk, where it was in the machine that was saved.
    pub path: Option<PathBuf>,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// Its bytes; the device has [a clone](Medium::try_clone).
    pub medium: Medium,
    /// Of an overlay, where its base is.
    pub base: Option<PathBuf>,
}

impl LiveDisk {
    /// What messages call it.
    fn name(&self) -> PathBuf {
        self.path.clone().unwrap_or_else(|| format!("in slot {}", self.slot).into())
    }
}

/// What a snapshot knows of a disk. It may come from a file that somebody tampered with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedDisk {
    /// The slot of its device.
    pub slot: usize,
    /// Whether the guest could only read.
    pub read_only: bool,
    /// Bytes of the disk.
    pub size: u64,
    /// Where it was, if it had a name.
    pub path: Option<PathBuf>,
    /// Where its bytes are now.
    pub content: Content,
}

/// Where a saved disk's bytes are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Content {
    /// All of them are in a raw image in the snapshot's directory.
    Whole {
        /// Its name there.
        file: FileName,
        /// How they got there.
        how: How,
    },
    /// What was written is in the snapshot's directory, with a map; the rest is in another file.
    Changes {
        /// Its name there.
        file: FileName,
        /// The other file.
        base: PathBuf,
        /// Which file that was.
        identity: Identity,
    },
    /// They are where they were: a read-only disk.
    Shared {
        /// Where that is.
        path: PathBuf,
        /// Which file that was.
        identity: Identity,
    },
}

/// How a disk was saved, or comes to a restored machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum How {
    /// A file of its own which shares its blocks with the other until one of them is written.
    Reflink,
    /// Changes over a file that is only read.
    Overlay,
    /// A file of its own with all bytes but the zeros.
    SparseCopy,
    /// The same file.
    Shared,
}

impl std::fmt::Display for How {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            How::Reflink => "reflink",
            How::Overlay => "overlay",
            How::SparseCopy => "sparse copy",
            How::Shared => "shared, read-only",
        })
    }
}

/// Whether a snapshot may need files outside its directory besides read-only disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lean {
    /// It has all that it needs: overlays are made whole.
    OnNothing,
    /// Where there are no reflinks, of an overlay only the changes are copied. The snapshot is worthless without the base.
    OnBases,
}

/// A disk that cannot be saved or restored.
#[derive(Debug, Error)]
pub enum DiskError {
    /// The host says no.
    #[error("disk {}: cannot {what}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// Of which file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The copy does not fit.
    #[error("disk {}: no room for it there: free some, or choose another directory ({source})", path.display())]
    NoRoom {
        /// The file that was to be written.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// A file of the snapshot is not what it should be.
    #[error("snapshot's disk {}: {what}: the snapshot is damaged", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
    /// Somebody else could have written a file of the snapshot.
    #[error("snapshot's disk {}: {fault}", path.display())]
    Untrusted {
        /// The file.
        path: PathBuf,
        /// Who.
        fault: super::trust::Untrusted,
    },
    /// The snapshot contradicts itself.
    #[error("snapshot's disk {slot}: {what}: the snapshot is damaged")]
    Inconsistent {
        /// Which disk.
        slot: usize,
        /// What is wrong.
        what: &'static str,
    },
    /// Somebody writes to a file of the snapshot.
    #[error("snapshot's disk {}: another machine writes it, so the snapshot is spoilt: save it again", path.display())]
    Written {
        /// The file.
        path: PathBuf,
    },
    /// The file that the snapshot needs cannot be opened.
    #[error("the snapshot needs a file outside it: {0}")]
    Missing(#[from] plan::DiskError),
    /// The file that the snapshot needs is not the one that it was.
    #[error("disk {}: {what} since the snapshot was saved: put the old file back, or save a new snapshot", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
        /// What happened to it.
        what: &'static str,
    },
    /// An overlay cannot be made.
    #[error("snapshot's disk {}: {source}", path.display())]
    Overlay {
        /// The base, or the saved changes.
        path: PathBuf,
        /// Why.
        source: OverlayError,
    },
}

impl DiskError {
    fn io(what: &'static str, path: &Path) -> impl Fn(Errno) -> Self {
        move |errno| DiskError::Io { what, path: path.into(), source: errno.into() }
    }
}

impl SavedDisk {
    /// The file outside the snapshot's directory that is opened for the restored machine, which can read it. Ask before you let a
    /// snapshot that another user wrote name one: it could be any that the restoring user may read.
    pub fn outside(&self) -> Option<&Path> {
        match &self.content {
            Content::Whole { .. } => None,
            Content::Changes { base, .. } => Some(base),
            Content::Shared { path, .. } => Some(path),
        }
    }

    /// How it was saved.
    pub fn how(&self) -> How {
        match self.content {
            Content::Whole { how, .. } => how,
            Content::Changes { .. } => How::Overlay,
            Content::Shared { .. } => How::Shared,
        }
    }
}

/// A disk whose bytes are in the snapshot's directory, but not yet on stable storage. Dropped, it takes its file with it.
#[derive(Debug)]
#[must_use = "a draft that is not finished is removed"]
pub struct Draft {
    saved: SavedDisk,
    file: Option<NewFile>,
}

impl Draft {
    /// Waits until the bytes are on stable storage and leaves the file where it is. The machine may run meanwhile.
    ///
    /// # Errors
    /// [`DiskError`] of `fsync(2)`; the file is gone then.
    pub fn finish(self) -> Result<SavedDisk, DiskError> {
        if let Some(file) = self.file {
            file.finish()?;
        }
        Ok(self.saved)
    }
}

/// Saves what `disk`, whose device is quiesced, holds at this moment in the snapshot's `directory`.
///
/// # Errors
/// [`DiskError`]; nothing of it is left in the directory then.
pub fn save(disk: &LiveDisk, directory: &Path, lean: Lean) -> Result<Draft, DiskError> {
    let called = disk.name();
    let draft = |size, content, file| {
        let (slot, read_only, path) = (disk.slot, disk.read_only, disk.path.clone());
        Draft { saved: SavedDisk { slot, read_only, size, path, content }, file }
    };
    let size = match (&disk.medium, &disk.path) {
        // One without a name could not be found again: it is copied.
        (Medium::Raw(file), Some(path)) if disk.read_only => {
            let identity = Identity::of(file).map_err(DiskError::io("look at", path))?;
            return Ok(draft(identity.size(), Content::Shared { path: path.clone(), identity }, None));
        }
        (Medium::Raw(file), _) => seek(file, SeekFrom::End(0)).map_err(DiskError::io("measure", &called))?,
        (Medium::Overlay(overlay), _) => overlay.size(),
    };
    let name = FileName::of_slot(disk.slot);
    let path = directory.join(name.as_str());
    let to = NewFile::create(&path)?;
    if let (Medium::Overlay(overlay), Lean::OnBases, Some(base)) = (&disk.medium, lean, &disk.base)
        && !copy::reflinked(overlay.base(), &to)?
    {
        let identity = Identity::of(overlay.base()).map_err(DiskError::io("look at", base))?;
        copy::whole(overlay.delta(), &called, &to)?;
        overlay.write_map(to.file()).map_err(|source| to.fault(source))?;
        return Ok(draft(size, Content::Changes { file: name, base: base.clone(), identity }, Some(to)));
    }
    let how = copy_for_snapshot(&disk.medium, &called, &to)?;
    Ok(draft(size, Content::Whole { file: name, how }, Some(to)))
}

/// Copies what a medium holds at this moment into a new, empty file.
fn copy_for_snapshot(medium: &Medium, path: &Path, to: &NewFile) -> Result<How, DiskError> {
    match medium {
        Medium::Raw(file) => copy::whole(file, path, to),
        Medium::Overlay(overlay) => copy::flattened(overlay, path, to),
    }
}

/// A disk for a machine that is restored from the snapshot in `directory`. What the machine writes goes to a file without a
/// name in the directory `scratch`, or to `keep`, a new file. That one is for use without the snapshot: so it is never an
/// overlay.
///
/// # Errors
/// [`DiskError`] when the snapshot or a file that it needs is not as it was, or the host fails; nothing is left behind then.
pub fn open_for_restore(
    saved: &SavedDisk,
    directory: &Path,
    scratch: &Path,
    keep: Option<&Path>,
) -> Result<(LiveDisk, How), DiskError> {
    let inconsistent = |what| DiskError::Inconsistent { slot: saved.slot, what };
    if saved.size == 0 || !saved.read_only && !saved.size.is_multiple_of(plan::SECTOR) {
        return Err(inconsistent("its size is not a number of sectors"));
    }
    let live = |medium, base| LiveDisk {
        slot: saved.slot,
        path: saved.path.clone(),
        read_only: saved.read_only,
        medium,
        base,
    };
    match &saved.content {
        Content::Shared { .. } if !saved.read_only => Err(inconsistent("writable, but not in the snapshot")),
        Content::Shared { path, identity } => {
            let file = open_outside(path, identity)?;
            if identity.size() != saved.size {
                return Err(inconsistent("it has two sizes"));
            }
            Ok((live(Medium::Raw(file), None), How::Shared))
        }
        Content::Whole { file, .. } => {
            let path = directory.join(file.as_str());
            let base = open_inside(&path)?;
            if seek(&base, SeekFrom::End(0)).map_err(DiskError::io("measure", &path))? != saved.size {
                return Err(DiskError::Damaged { path, what: "it has another size" });
            }
            if saved.read_only {
                return Ok((live(Medium::Raw(base), None), How::Shared));
            }
            let to = NewFile::private(scratch, keep)?;
            if copy::reflinked(&base, &to)? {
                return Ok((live(Medium::Raw(to.into_disk()?), None), How::Reflink));
            }
            if keep.is_none()
                && let Ok(below) = base.try_clone()
                && let Ok(overlay) = Overlay::new(below, to.file().try_clone().map_err(|e| to.fault(e))?)
            {
                return Ok((live(Medium::Overlay(Arc::new(overlay)), Some(path)), How::Overlay));
            }
            copy::sparsely(&base, &path, &to)?;
            Ok((live(Medium::Raw(to.into_disk()?), None), How::SparseCopy))
        }
        Content::Changes { file, base: base_path, identity } => {
            let path = directory.join(file.as_str());
            let base = open_outside(base_path, identity)?;
            let changes = open_inside(&path)?;
            let delta = NewFile::private(scratch, None)?;
            copy::whole(&changes, &path, &delta)?;
            let overlay = Overlay::open(base, delta.into_disk()?)
                .map_err(|source| DiskError::Overlay { path: path.clone(), source })?;
            if overlay.size() != saved.size {
                return Err(DiskError::Damaged { path, what: "it has another size" });
            }
            let Some(keep) = keep else {
                return Ok((live(Medium::Overlay(Arc::new(overlay)), Some(base_path.clone())), How::Overlay));
            };
            let to = NewFile::private(scratch, Some(keep))?;
            let how = copy::flattened(&overlay, &path, &to)?;
            Ok((live(Medium::Raw(to.into_disk()?), None), how))
        }
    }
}

/// Opens a file of the snapshot: one that is there itself, not somewhere else by a link, and that nobody writes.
fn open_inside(path: &Path) -> Result<File, DiskError> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW;
    let file = plan::open_no_wait(path, flags, Mode::empty()).map_err(|errno| match errno {
        Errno::NOENT => DiskError::Damaged { path: path.into(), what: "it is missing" },
        Errno::LOOP => DiskError::Damaged { path: path.into(), what: "it is a link" },
        errno => DiskError::io("open", path)(errno),
    })?;
    let metadata = rustix::fs::fstat(&file).map_err(DiskError::io("look at", path))?;
    if !rustix::fs::FileType::from_raw_mode(metadata.st_mode).is_file() {
        return Err(DiskError::Damaged { path: path.into(), what: "it is not a regular file" });
    }
    let trusted = super::trust::check(&file, "it").map_err(|source| DiskError::Io {
        what: "look at",
        path: path.into(),
        source,
    })?;
    trusted.map_err(|fault| DiskError::Untrusted { path: path.into(), fault })?;
    match flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(DiskError::Written { path: path.into() }),
        Err(errno) => Err(DiskError::io("lock", path)(errno)),
    }
}

/// Opens a file that the snapshot needs and does not have, if it is still the same.
fn open_outside(path: &Path, identity: &Identity) -> Result<File, DiskError> {
    let disk = plan::Disk::open(path, true)?;
    let now = Identity::of(&disk.file).map_err(DiskError::io("look at", path))?;
    match identity.changed(&now) {
        None => Ok(disk.file),
        Some(what) => Err(DiskError::Changed { path: path.into(), what }),
    }
}

#[cfg(test)]
mod tests;
