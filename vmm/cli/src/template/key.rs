//! What a template depends on, written out as text: two templates are the same when their texts are.

use std::fmt::Write;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use machine::config::MachineConfig;
use machine::host::Host;
use machine::snapshot::manifest::HostKind;

/// The key of a template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    /// Everything that it depends on, a line each.
    pub text: String,
    /// Its name in the store: a hash of the text, which is compared too.
    pub name: String,
}

impl Key {
    /// The key of the template for machines of the shape `template`, on this host, with this program and `agent`.
    ///
    /// # Errors
    /// When the kernel's file or our own cannot be looked at.
    pub fn new(template: &MachineConfig, host: &Host, agent: &[u8]) -> io::Result<Self> {
        let kind = HostKind::here(host);
        let facts = &host.facts;
        let mut text = String::from("format 1\n");
        let _ = writeln!(
            text,
            "program {} {}",
            env!("CARGO_PKG_VERSION"),
            identity(Path::new("/proc/self/exe"))?
        );
        let _ = writeln!(text, "kernel {}", identity(&template.boot.kernel)?);
        let _ = writeln!(text, "agent {} bytes {:016x}", agent.len(), hash(agent));
        let _ = writeln!(text, "host {} {:?} boot {}", kind.arch, kind.kernel_mode, kind.boot_id);
        let _ = writeln!(text, "cpu {:?}", (facts.system.virtualization, facts.kvm.max_vcpus));
        let machine = MachineConfig {
            boot: machine::config::BootConfig { kernel: "".into(), ..template.boot.clone() },
            ..template.clone()
        };
        // Plain data with text keys: cannot fail.
        let _ = writeln!(text, "machine {}", serde_json::to_string(&machine).unwrap_or_default());
        let name = format!("{:016x}", hash(text.as_bytes()));
        Ok(Key { text, name })
    }

    /// Whether a template with the key `text` can be of use again: not after the host has booted, or to another vmm.
    pub fn is_alive(&self, text: &str) -> bool {
        let line =
            |text: &str, word: &str| text.lines().find(|line| line.starts_with(word)).map(str::to_owned);
        ["program ", "host "].iter().all(|word| line(text, word) == line(&self.text, word))
    }
}

/// A file's identity: reading a kernel to know it would take longer than to restore one.
fn identity(path: &Path) -> io::Result<String> {
    let found = fs::metadata(path)?;
    Ok(format!(
        "device {} inode {} size {} modified {}.{:09} changed {}.{:09}",
        found.dev(),
        found.ino(),
        found.size(),
        found.mtime(),
        found.mtime_nsec(),
        found.ctime(),
        found.ctime_nsec()
    ))
}

fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}
