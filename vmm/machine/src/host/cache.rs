//! Remembers the kernel mode that the trial machine found, until the host boots again or its KVM modules change.
//!
//! One small file in a directory that only we can write. Whatever is odd about either (owner, mode, content) means "not
//! known": then the trial runs again, and nothing fails for want of a cache.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, fstat, mkdir, open, openat, renameat, unlinkat};
use rustix::io::Errno;
use rustix::process::geteuid;

use super::{KernelMode, Module};

const NAME: &str = "kernel-mode";

/// Where the answer lies, and for which host it holds.
#[derive(Debug)]
pub struct Cache {
    directory: PathBuf,
    key: String,
}

impl Cache {
    /// The cache for the host as it is now; `None` where there is no private place for one.
    pub fn of_host(modules: &[Module]) -> Option<Self> {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        let parent = if geteuid().is_root() {
            PathBuf::from("/run")
        } else {
            PathBuf::from(std::env::var_os("XDG_RUNTIME_DIR")?)
        };
        Some(Self { directory: parent.join("vmm"), key: key(&boot, modules) })
    }

    /// What was found before on this boot with these modules.
    pub fn get(&self) -> Option<KernelMode> {
        let directory = private(&self.directory).ok()?;
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = openat(&directory, NAME, flags, Mode::empty()).ok()?;
        let stat = fstat(&file).ok()?;
        let ours = stat.st_uid == geteuid().as_raw()
            && Mode::from_raw_mode(stat.st_mode) & OTHERS_WRITE == Mode::empty();
        if !ours || FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return None;
        }
        let mut text = String::new();
        File::from(file).take(4096).read_to_string(&mut text).ok()?;
        [KernelMode::Hardware, KernelMode::Emulated].into_iter().find(|mode| text == self.text(*mode))
    }

    /// Remembers `mode`. Another process that does the same at the same time does no harm: the file is replaced whole.
    pub fn put(&self, mode: KernelMode) -> std::io::Result<()> {
        match mkdir(&self.directory, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(e.into()),
        }
        let directory = private(&self.directory)?;
        let temporary = format!(".{NAME}.{}", std::process::id());
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(&directory, &temporary, flags, Mode::RUSR | Mode::WUSR)?;
        let written = File::from(file).write_all(self.text(mode).as_bytes());
        let result = written.and_then(|()| Ok(renameat(&directory, &temporary, &directory, NAME)?));
        if result.is_err() {
            let _ = unlinkat(&directory, &temporary, AtFlags::empty());
        }
        result
    }

    /// The whole file. Reading compares it as a whole, so there is nothing to parse.
    fn text(&self, mode: KernelMode) -> String {
        format!("vmm 1\n{}\n{mode}\n", self.key)
    }
}

const OTHERS_WRITE: Mode = Mode::WGRP.union(Mode::WOTH);

fn private(path: &Path) -> std::io::Result<rustix::fd::OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = open(path, flags, Mode::empty())?;
    let stat = fstat(&directory)?;
    if stat.st_uid != geteuid().as_raw() || Mode::from_raw_mode(stat.st_mode).intersects(OTHERS_WRITE) {
        return Err(std::io::ErrorKind::PermissionDenied.into());
    }
    Ok(directory)
}

fn key(boot_id: &str, modules: &[Module]) -> String {
    let modules = modules.iter().map(|m| format!(" {}:{}", m.name, m.srcversion.as_deref().unwrap_or("-")));
    format!("{}{}", boot_id.trim(), modules.collect::<String>())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn module(name: &str, srcversion: Option<&str>) -> Module {
        Module { name: name.into(), srcversion: srcversion.map(Into::into) }
    }

    #[test]
    fn the_key_holds_the_boot_and_the_modules() {
        let modules = [module("kvm", Some("A1")), module("kvm_amd", None)];
        assert_eq!(key("1-2\n", &modules), "1-2 kvm:A1 kvm_amd:-");
        assert_eq!(key("1-2\n", &[]), "1-2");
    }

    #[test]
    fn an_answer_holds_for_its_key_only() {
        let dir = tempfile::tempdir().unwrap();
        let cache = |key: &str| Cache { directory: dir.path().join("vmm"), key: key.into() };
        assert_eq!(cache("a").get(), None);
        for mode in [KernelMode::Emulated, KernelMode::Hardware] {
            cache("a").put(mode).unwrap();
            assert_eq!((cache("a").get(), cache("b").get()), (Some(mode), None));
        }
        let files: Vec<_> =
            std::fs::read_dir(dir.path().join("vmm")).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(files, [NAME]);
        assert_eq!(std::fs::metadata(dir.path().join("vmm")).unwrap().permissions().mode() & 0o777, 0o700);
    }

    #[test]
    fn what_others_could_have_written_is_ignored() {
        let dir = tempfile::tempdir().unwrap();
        let directory = dir.path().join("vmm");
        let cache = Cache { directory: directory.clone(), key: "a".into() };
        let mode =
            |path: &Path, mode| std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
        cache.put(KernelMode::Hardware).unwrap();
        let file = directory.join(NAME);

        mode(&file, 0o666);
        assert_eq!(cache.get(), None);
        mode(&file, 0o600);
        assert_eq!(cache.get(), Some(KernelMode::Hardware));
        mode(&directory, 0o777);
        assert_eq!(cache.get(), None);
        assert!(cache.put(KernelMode::Hardware).is_err());
        mode(&directory, 0o700);

        for text in ["", "vmm 1\na\nHardware\n", "vmm 1\na\nhardware\nmore", "\0"] {
            std::fs::write(&file, text).unwrap();
            assert_eq!(cache.get(), None, "{text:?}");
        }
        std::fs::rename(&file, dir.path().join("elsewhere")).unwrap();
        std::fs::write(dir.path().join("elsewhere"), cache.text(KernelMode::Hardware)).unwrap();
        symlink(dir.path().join("elsewhere"), &file).unwrap();
        assert_eq!(cache.get(), None);
        cache.put(KernelMode::Emulated).unwrap();
        assert_eq!(cache.get(), Some(KernelMode::Emulated));
    }
}
