//! Where templates are kept: `/var/cache/vmm/templates` for root, `~/.cache/vmm/templates` for others, or `$VMM_TEMPLATES`.
//!
//! ```text
//! NAME/       a snapshot, its files read-only
//! NAME.key    what it depends on
//! NAME.lock   held by the process that builds it
//! ```

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use rustix::fs::{FlockOperation, flock};

use super::key::Key;

/// The store.
#[derive(Debug, Clone)]
pub struct Store(PathBuf);

/// A template in the store.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Its key's text.
    pub key: String,
    /// Its snapshot.
    pub directory: PathBuf,
    /// Bytes on disk.
    pub bytes: u64,
    /// When it was built.
    pub modified: std::time::SystemTime,
}

/// The right to build one template.
#[derive(Debug)]
pub struct Lock(#[allow(dead_code, reason = "held, not used")] File);

impl Store {
    /// The store of this user. Made if it is not there.
    ///
    /// # Errors
    /// When there is no place for it, or others could write to it: what is restored from it runs as us.
    pub fn open() -> anyhow::Result<Self> {
        let path = match std::env::var_os("VMM_TEMPLATES") {
            Some(path) => PathBuf::from(path),
            None if rustix::process::geteuid().is_root() => "/var/cache/vmm/templates".into(),
            None => match std::env::var_os("XDG_CACHE_HOME").filter(|p| !p.is_empty()) {
                Some(cache) => PathBuf::from(cache).join("vmm/templates"),
                None => PathBuf::from(std::env::var_os("HOME").context("there is no $HOME")?)
                    .join(".cache/vmm/templates"),
            },
        };
        let shown = path.display();
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&path)
            .with_context(|| format!("cannot make the directory for templates, {shown}"))?;
        let found = fs::metadata(&path).with_context(|| format!("templates, {shown}"))?;
        if found.uid() != rustix::process::geteuid().as_raw() || found.mode() & 0o022 != 0 {
            bail!(
                "the directory for templates, {shown}, is not only ours to write: chmod 700 it, or set VMM_TEMPLATES"
            );
        }
        Ok(Store(path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The snapshot of the template with this key, if it is there.
    pub fn find(&self, key: &Key) -> Option<PathBuf> {
        let text = fs::read_to_string(self.key_file(&key.name)).ok()?;
        let directory = self.0.join(&key.name);
        (text == key.text && directory.is_dir()).then_some(directory)
    }

    /// Waits until nobody else builds the template. Look for it once more then.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn lock(&self, key: &Key) -> io::Result<Lock> {
        let path = self.0.join(format!("{}.lock", key.name));
        loop {
            let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path)?;
            flock(&file, FlockOperation::LockExclusive)?;
            // Somebody may have removed the name while we waited: then the lock is nobody's.
            let same = fs::metadata(&path).is_ok_and(|named| {
                file.metadata().is_ok_and(|open| (open.dev(), open.ino()) == (named.dev(), named.ino()))
            });
            if same {
                return Ok(Lock(file));
            }
        }
    }

    /// Where a template with this key is to be built. To be called with its [`lock`](Self::lock).
    pub fn place(&self, key: &Key) -> PathBuf {
        self.0.join(&key.name)
    }

    /// Says that the template is there: what [`place`](Self::place) names is whole, and nobody writes to it from now on.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn publish(&self, key: &Key) -> io::Result<()> {
        for entry in fs::read_dir(self.place(key))? {
            fs::set_permissions(entry?.path(), Permissions::from_mode(0o400))?;
        }
        let partial = self.0.join(format!("{}.key.{}", key.name, std::process::id()));
        fs::write(&partial, &key.text)?;
        fs::rename(&partial, self.key_file(&key.name))
    }

    /// All templates, by name.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn list(&self) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for file in fs::read_dir(&self.0)?.flatten() {
            let name = file.file_name().to_string_lossy().into_owned();
            let Some(name) = name.strip_suffix(".key") else { continue };
            let directory = self.0.join(name);
            let Ok(key) = fs::read_to_string(file.path()) else { continue };
            let Ok(modified) = fs::metadata(&directory).and_then(|found| found.modified()) else { continue };
            let bytes = fs::read_dir(&directory)?.flatten().filter_map(|f| f.metadata().ok());
            let bytes = bytes.map(|found| found.blocks() * 512).sum();
            entries.push(Entry { name: name.into(), key, directory, bytes, modified });
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    /// Removes a template. Machines that run from it keep what they have.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn remove(&self, name: &str) -> anyhow::Result<()> {
        // The key goes first: without it nobody finds what is left.
        fs::remove_file(self.key_file(name)).with_context(|| format!("no template is called {name}"))?;
        let _ = fs::remove_file(self.0.join(format!("{name}.lock")));
        Ok(machine::snapshot::directory::remove(&self.0.join(name))?)
    }

    /// Removes the templates that nobody can use any more, as seen by the builder of `key`.
    pub fn sweep(&self, key: &Key) {
        for entry in self.list().unwrap_or_default() {
            if !key.is_alive(&entry.key)
                && let Err(error) = self.remove(&entry.name)
            {
                log::debug!("template {}: {error}", entry.name);
            }
        }
    }

    fn key_file(&self, name: &str) -> PathBuf {
        self.0.join(format!("{name}.key"))
    }
}
