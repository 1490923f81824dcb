//! Reads [`SystemFacts`] from `/proc` and `/sys`. A file that cannot be read counts as empty: these are facts to show and to
//! compare with, and what is really needed fails where it is used, with its own message.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use rustix::fs::{Access, access};

use super::facts::{HugePages, Missing, Module, Paging, SystemFacts, Virtualization};
use crate::config::ByteSize;

impl SystemFacts {
    /// Looks at the host as it is now.
    pub fn read() -> Self {
        let flags = first_cpu_flags();
        let has = |flag: &str| flags.split_ascii_whitespace().any(|f| f == flag);
        let meminfo = text("/proc/meminfo");
        let memory = |key: &str| meminfo_bytes(&meminfo, key).unwrap_or_default();
        let count = |key: &str| meminfo_value(&meminfo, key).unwrap_or_default();
        Self {
            cpus: cpu_list_len(&text("/sys/devices/system/cpu/online")).unwrap_or(1),
            virtualization: match () {
                () if has("vmx") => Virtualization::VtX,
                () if has("svm") => Virtualization::AmdV,
                () => Virtualization::None,
            },
            nested: has("hypervisor"),
            avx: has("avx"),
            memory_total: memory("MemTotal"),
            memory_available: memory("MemAvailable"),
            huge_pages: HugePages {
                total: count("HugePages_Total"),
                free: count("HugePages_Free"),
                size: memory("Hugepagesize"),
            },
            modules: modules(Path::new("/sys/module")),
            paging: paging(
                &text("/sys/module/kvm_intel/parameters/ept"),
                &text("/sys/module/kvm_amd/parameters/npt"),
            ),
            tun: access("/dev/net/tun", Access::READ_OK | Access::WRITE_OK).is_ok(),
        }
    }

    /// What stands between this host and `/dev/kvm`, and the way there.
    pub fn kvm_remedy(&self) -> &'static str {
        match (self.virtualization, self.nested) {
            (Virtualization::VtX, _) => "load its module: modprobe kvm_intel",
            (Virtualization::AmdV, _) => "load its module: modprobe kvm_amd",
            (Virtualization::None, true) => {
                "this host is a virtual machine itself: switch nested virtualisation on for it, or choose a type of \
                 machine that has it, then modprobe kvm_intel or kvm_amd"
            }
            (Virtualization::None, false) => {
                "enable VT-x or AMD-V (SVM) in the firmware's settings, then modprobe kvm_intel or kvm_amd"
            }
        }
    }

    /// Why `/dev/kvm` may be missing, and the way there.
    pub(super) fn device_remedy(&self) -> &'static str {
        // Built into the kernel, the modules of the CPU's own kinds are listed even where they found nothing to do.
        let works = |name: &str| match name {
            "kvm" => false,
            "kvm_intel" => self.virtualization == Virtualization::VtX,
            "kvm_amd" => self.virtualization == Virtualization::AmdV,
            _ => true,
        };
        if self.modules.iter().any(|module| works(&module.name)) {
            return "KVM is loaded, so give this container the device (--device /dev/kvm), or mknod /dev/kvm c 10 232";
        }
        self.kvm_remedy()
    }

    /// What vmm could use and this host lacks, beside KVM itself.
    pub fn missing(&self) -> Vec<Missing> {
        let mut missing = Vec::new();
        if !self.tun {
            missing.push(Missing {
                what: "/dev/net/tun, for --net tap=NAME".into(),
                remedy: "modprobe tun, and run as a user who may open it".into(),
            });
        }
        missing
    }
}

fn text(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// The first CPU's flags. The rest of the file is not asked for: it costs the kernel an interrupt per CPU.
fn first_cpu_flags() -> String {
    let Ok(file) = File::open("/proc/cpuinfo") else { return String::new() };
    let lines = BufReader::with_capacity(4096, file).lines().map_while(Result::ok);
    flags_of(lines.take_while(|line| !line.is_empty()))
}

fn flags_of(mut lines: impl Iterator<Item = String>) -> String {
    let flags = |line: String| {
        line.split_once(':').filter(|(key, _)| key.trim() == "flags").map(|(_, v)| v.to_string())
    };
    lines.find_map(flags).unwrap_or_default()
}

/// The value behind `key:`, without its unit.
fn meminfo_value(text: &str, key: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    value.split_ascii_whitespace().next()?.parse().ok()
}

/// The value behind `key:`, which is in kibibytes.
fn meminfo_bytes(text: &str, key: &str) -> Option<ByteSize> {
    meminfo_value(text, key)?.checked_mul(1024).map(ByteSize::new)
}

/// How many CPUs a list such as `0-3,8` has.
fn cpu_list_len(list: &str) -> Option<u32> {
    list.trim().split(',').try_fold(0_u32, |count, range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        count.checked_add(last.checked_sub(first)?.checked_add(1)?)
    })
}

/// `kvm` and the modules for kinds of CPUs, loaded or built in.
fn modules(directory: &Path) -> Vec<Module> {
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut modules: Vec<_> = names
        .filter(|name| name == "kvm" || name.starts_with("kvm_"))
        .map(|name| {
            let version = std::fs::read_to_string(directory.join(&name).join("srcversion"));
            Module { srcversion: version.ok().map(|v| v.trim().to_string()), name }
        })
        .collect();
    modules.sort_by(|a, b| a.name.cmp(&b.name));
    modules
}

fn paging(ept: &str, npt: &str) -> Paging {
    let on = |parameter: &str| matches!(parameter.trim(), "Y" | "1");
    match (on(ept), on(npt)) {
        (true, _) => Paging::Ept,
        (_, true) => Paging::Npt,
        _ => Paging::Shadow,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_and_sys_are_read() {
        let meminfo = "MemTotal:       24684096 kB\nMemAvailable:   100 kB\nHugePages_Total:       4\nHugepagesize:       2048 kB\n";
        assert_eq!(meminfo_bytes(meminfo, "MemTotal"), Some(ByteSize::new(24_684_096 << 10)));
        assert_eq!(meminfo_value(meminfo, "HugePages_Total"), Some(4));
        assert_eq!(meminfo_bytes(meminfo, "Hugepagesize"), Some(ByteSize::mib(2)));
        assert_eq!(meminfo_value(meminfo, "Mem"), None);
        assert_eq!(meminfo_bytes("MemTotal: 18446744073709551615 kB", "MemTotal"), None);

        for (list, len) in
            [("0\n", Some(1)), ("0-3,8,10-11", Some(7)), ("", None), ("3-1", None), ("0-4294967295", None)]
        {
            assert_eq!(cpu_list_len(list), len, "{list}");
        }
        let lines = |text: &str| flags_of(text.lines().map(str::to_string).collect::<Vec<_>>().into_iter());
        assert_eq!(lines("processor : 0\nvmx flags : ept\nflags\t\t: fpu vmx"), " fpu vmx");
        assert_eq!(lines("nothing"), "");
        for (ept, npt, expected) in [
            ("Y\n", "", Paging::Ept),
            ("", "1\n", Paging::Npt),
            ("N", "", Paging::Shadow),
            ("", "", Paging::Shadow),
        ] {
            assert_eq!(paging(ept, npt), expected);
        }
    }

    #[test]
    fn modules_are_found_with_their_versions() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["kvm_intel", "kvm", "kvmgt", "ext4"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        std::fs::write(dir.path().join("kvm/srcversion"), "ABC\n").unwrap();
        let expected = [
            Module { name: "kvm".into(), srcversion: Some("ABC".into()) },
            Module { name: "kvm_intel".into(), srcversion: None },
        ];
        assert_eq!(modules(dir.path()), expected);
        assert!(modules(Path::new("/nowhere")).is_empty());
    }

    #[test]
    fn this_host_is_read() {
        let facts = SystemFacts::read();
        assert!(facts.cpus >= 1 && facts.memory_total > ByteSize::mib(64));
        assert!(facts.memory_available <= facts.memory_total);
    }

    #[test]
    fn the_way_to_kvm_depends_on_the_host() {
        let mut facts = SystemFacts::read();
        for (virtualization, nested, remedy) in [
            (Virtualization::VtX, true, "modprobe kvm_intel"),
            (Virtualization::AmdV, false, "modprobe kvm_amd"),
            (Virtualization::None, true, "nested virtualisation"),
            (Virtualization::None, false, "firmware"),
        ] {
            (facts.virtualization, facts.nested) = (virtualization, nested);
            assert!(facts.kvm_remedy().contains(remedy));
        }
        facts.modules = vec![Module { name: "kvm_amd".into(), srcversion: None }];
        assert!(facts.device_remedy().contains("firmware"));
        facts.virtualization = Virtualization::AmdV;
        assert!(facts.device_remedy().contains("mknod"));
        facts.tun = false;
        assert_eq!(facts.missing().len(), 1);
    }
}
