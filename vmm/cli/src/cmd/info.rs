//! `vmm info`: what this host offers for machines, what it lacks, and how to get that. For people as a table, for programs
//! as JSON with keys that stay.
//!
//! It never fails for what the host lacks: that is what it is asked for.

use std::fmt::Write as _;
use std::io::Write as _;

use machine::host::{Host, KernelMode, KvmFacts, Missing, SystemFacts, Virtualization};
use serde::Serialize;

/// Prints what this host offers to standard output.
pub fn run(json: bool) -> anyhow::Result<()> {
    let host = Host::detect();
    let system = match &host {
        Ok(host) => host.facts.system.clone(),
        Err(_) => SystemFacts::read(),
    };
    let report = Report::new(&system, host.as_ref().map(|h| &h.facts.kvm).map_err(ToString::to_string));
    let text = if json { serde_json::to_string_pretty(&report)? + "\n" } else { report.table(&system) };
    Ok(std::io::stdout().lock().write_all(text.as_bytes())?)
}

/// The JSON object. Keys are only ever added; what KVM alone could tell is null without it.
#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    available: bool,
    kvm_api_version: Option<i32>,
    kvm_modules: Vec<String>,
    virtualization: String,
    nested: bool,
    paging: Option<String>,
    kernel_mode: Option<String>,
    avx_in_guests: Option<bool>,
    max_vcpus: Option<u32>,
    cpus: u32,
    /// In bytes, like all sizes here.
    memory_total: u64,
    memory_available: u64,
    huge_page_size: u64,
    huge_pages_total: u64,
    huge_pages_free: u64,
    networks: bool,
    missing: Vec<Lack>,
}

#[derive(Debug, Serialize)]
struct Lack {
    what: String,
    remedy: String,
}

impl From<Missing> for Lack {
    fn from(missing: Missing) -> Self {
        Self { what: missing.what, remedy: missing.remedy }
    }
}

impl Report {
    fn new(system: &SystemFacts, kvm: Result<&KvmFacts, String>) -> Self {
        let facts = kvm.as_ref().ok();
        let emulated = facts.is_some_and(|kvm| kvm.kernel_mode == KernelMode::Emulated);
        let mut missing = Vec::new();
        if let Err(reason) = &kvm {
            missing.push(Lack { what: "KVM, without which no machine runs".into(), remedy: reason.clone() });
        }
        if emulated {
            missing.push(Lack {
                what: "VT-x or AMD-V, to run guest kernels on the CPU".into(),
                remedy: system.kvm_remedy().into(),
            });
        }
        missing.extend(system.missing().into_iter().map(Lack::from));
        Self {
            version: env!("CARGO_PKG_VERSION"),
            available: kvm.is_ok(),
            kvm_api_version: facts.map(|kvm| kvm.api_version),
            kvm_modules: system.modules.iter().map(|m| m.name.clone()).collect(),
            virtualization: system.virtualization.to_string(),
            nested: system.nested,
            paging: facts.map(|_| system.paging.to_string()),
            kernel_mode: facts.map(|kvm| kvm.kernel_mode.to_string()),
            avx_in_guests: facts.map(|_| system.avx && !emulated),
            max_vcpus: facts.map(|kvm| kvm.max_vcpus),
            cpus: system.cpus,
            memory_total: system.memory_total.bytes(),
            memory_available: system.memory_available.bytes(),
            huge_page_size: system.huge_pages.size.bytes(),
            huge_pages_total: system.huge_pages.total,
            huge_pages_free: system.huge_pages.free,
            networks: system.tun,
            missing,
        }
    }

    fn rows(&self, system: &SystemFacts) -> Vec<(&'static str, String)> {
        let mut rows =
            vec![("Machines", if self.available { "can run here" } else { "not available" }.to_string())];
        if let (Some(version), Some(vcpus)) = (self.kvm_api_version, self.max_vcpus) {
            rows.push(("KVM", format!("API version {version}, up to {vcpus} vCPUs a machine")));
        }
        let modules = if self.kvm_modules.is_empty() { "none".into() } else { self.kvm_modules.join(", ") };
        rows.push(("KVM modules", modules));
        let itself = if self.nested { " (this host is a virtual machine itself)" } else { "" };
        let support = match system.virtualization {
            Virtualization::None => "no VT-x or AMD-V".into(),
            kind => kind.to_string(),
        };
        rows.push(("Virtualization", format!("{support}{itself}")));
        if let (Some(paging), Some(mode), Some(avx)) = (&self.paging, &self.kernel_mode, self.avx_in_guests) {
            rows.push((
                "Guest paging",
                if paging == "shadow" { "shadow page tables".into() } else { paging.clone() },
            ));
            let mode = if mode == "emulated" { "emulated, instruction by instruction" } else { "on the CPU" };
            rows.push(("Guest kernels", mode.into()));
            rows.push((
                "Guest programs",
                format!("on the CPU, {}", if avx { "with AVX" } else { "without AVX" }),
            ));
        }
        rows.push(("CPUs", self.cpus.to_string()));
        rows.push((
            "Memory",
            format!("{}, {} available", gib(self.memory_total), gib(self.memory_available)),
        ));
        let huge = match self.huge_pages_total {
            0 => "none reserved".into(),
            total => format!(
                "{total} of {} MiB, {} free",
                system.huge_pages.size.whole_mib(),
                self.huge_pages_free
            ),
        };
        rows.push(("Huge pages", huge));
        rows.push(("Networks", if self.networks { "TAPs can be used" } else { "not available" }.into()));
        rows
    }

    fn table(&self, system: &SystemFacts) -> String {
        let rows = self.rows(system);
        let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
        let mut text = String::new();
        // Writing to a string does not fail.
        for (name, value) in &rows {
            let _ = writeln!(text, "{name:width$}   {value}");
        }
        if self.kernel_mode.as_deref() == Some("emulated") {
            text.push_str(EMULATED);
        }
        if !self.missing.is_empty() {
            text.push_str(if self.available { "\nmissing:\n" } else { "\nnot available:\n" });
            for lack in &self.missing {
                let _ = writeln!(text, "  - {}\n    {}", lack.what, lack.remedy);
            }
        }
        text
    }
}

/// What a person has to know before comparing this host with another.
const EMULATED: &str = "
This host's KVM emulates guest kernels. Containers run, and
  - programs run at the CPU's speed, but kernel code (starting up, system calls, page faults) about 1000 times slower;
  - programs that need AVX (images built for x86-64-v3) do not run;
  - processes inside one guest are isolated from each other less well than on hardware. Between guests and host it is
    KVM's isolation, as everywhere.
";

fn gib(bytes: u64) -> String {
    let tenths = bytes / (1 << 20) * 10 / 1024;
    format!("{}.{} GiB", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use machine::config::ByteSize;
    use machine::host::{HugePages, Paging};

    use super::*;

    fn system() -> SystemFacts {
        SystemFacts {
            cpus: 8,
            virtualization: Virtualization::AmdV,
            nested: false,
            avx: true,
            memory_total: ByteSize::mib(16384),
            memory_available: ByteSize::mib(12 << 10 | 512),
            huge_pages: HugePages { total: 4, free: 3, size: ByteSize::mib(2) },
            modules: Vec::new(),
            paging: Paging::Npt,
            tun: true,
        }
    }

    fn kvm(kernel_mode: KernelMode) -> KvmFacts {
        KvmFacts { api_version: 12, max_vcpus: 1024, kernel_mode }
    }

    #[test]
    fn hardware_has_nothing_to_explain() {
        let report = Report::new(&system(), Ok(&kvm(KernelMode::Hardware)));
        let expected = "\
Machines         can run here
KVM              API version 12, up to 1024 vCPUs a machine
KVM modules      none
Virtualization   AMD-V
Guest paging     NPT
Guest kernels    on the CPU
Guest programs   on the CPU, with AVX
CPUs             8
Memory           16.0 GiB, 12.5 GiB available
Huge pages       4 of 2 MiB, 3 free
Networks         TAPs can be used
";
        assert_eq!(report.table(&system()), expected);
    }

    #[test]
    fn emulation_is_told_plainly() {
        let mut system = system();
        (system.virtualization, system.nested, system.paging) = (Virtualization::None, true, Paging::Shadow);
        let report = Report::new(&system, Ok(&kvm(KernelMode::Emulated)));
        let text = report.table(&system);
        for part in [
            "1000 times slower",
            "without AVX",
            "less well than on hardware",
            "shadow page tables",
            "missing:\n",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert_eq!(report.avx_in_guests, Some(false));
    }

    #[test]
    fn a_host_without_kvm_is_told_the_way() {
        let mut system = system();
        system.tun = false;
        let report = Report::new(&system, Err("/dev/kvm does not exist: load its module".into()));
        let text = report.table(&system);
        assert!(text.contains("Machines         not available\n") && text.contains("\nnot available:\n"));
        assert!(text.contains("/dev/kvm does not exist: load its module") && text.contains("modprobe tun"));
    }

    #[test]
    fn keys_are_stable() {
        let json = serde_json::to_value(Report::new(&system(), Err("x".into()))).unwrap();
        let mut keys: Vec<_> = json.as_object().unwrap().keys().cloned().collect();
        keys.sort();
        let expected = "available avx_in_guests cpus huge_page_size huge_pages_free huge_pages_total kernel_mode \
                        kvm_api_version kvm_modules max_vcpus memory_available memory_total missing nested networks paging \
                        version virtualization";
        assert_eq!(keys.join(" "), expected);
        assert!(json["kernel_mode"].is_null() && json["virtualization"] == "AMD-V");
    }
}
