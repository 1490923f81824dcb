//! Opens `/dev/kvm` and finds out what it can do, or says in one line why not and what to do about it.

use std::ffi::{CStr, CString};
use std::path::{Path, PathBuf};

use kvm_ioctls::{Cap, Kvm};
use rustix::io::Errno;
use thiserror::Error;

use super::cache::Cache;
use super::facts::{HostFacts, KernelMode, KvmFacts, SystemFacts};
use super::probe::{self, ProbeError};

/// The only version of KVM's API since Linux 2.6.22.
const API_VERSION: i32 = 12;
const KVM: &CStr = c"/dev/kvm";

/// What every machine uses. All of it is older than the oldest Linux that is still maintained; KVMs that are not Linux's
/// own may lack some.
const REQUIRED: [(Cap, &str); 13] = [
    (Cap::Irqchip, "IRQCHIP"),
    (Cap::UserMemory, "USER_MEMORY"),
    (Cap::SetTssAddr, "SET_TSS_ADDR"),
    (Cap::ExtCpuid, "EXT_CPUID"),
    (Cap::MpState, "MP_STATE"),
    (Cap::IrqRouting, "IRQ_ROUTING"),
    (Cap::Irqfd, "IRQFD"),
    (Cap::Ioeventfd, "IOEVENTFD"),
    (Cap::AdjustClock, "ADJUST_CLOCK"),
    (Cap::VcpuEvents, "VCPU_EVENTS"),
    (Cap::TscDeadlineTimer, "TSC_DEADLINE_TIMER"),
    (Cap::ImmediateExit, "IMMEDIATE_EXIT"),
    (Cap::GetMsrFeatures, "GET_MSR_FEATURES"),
];
/// What a machine uses besides where kernel mode is emulated; see [`super::pvm`].
const REQUIRED_EMULATED: [(Cap, &str); 2] =
    [(Cap::X86UserSpaceMsr, "X86_USER_SPACE_MSR"), (Cap::X86MsrFilter, "X86_MSR_FILTER")];
/// `KVM_CAP_EXIT_ON_EMULATION_FAILURE`, which kvm-ioctls has no name for.
const EXIT_ON_EMULATION_FAILURE: std::ffi::c_ulong = 204;

/// Why this host cannot run machines. Each message is one line: what, where, and what to do.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the message says it")]
pub enum HostError {
    #[error("{} does not exist: {remedy}", path.display())]
    NoKvm { path: PathBuf, remedy: &'static str },
    #[error("{} exists but no KVM answers there: {remedy}", path.display())]
    NoDriver { path: PathBuf, remedy: &'static str },
    #[error(
        "no permission to open {}: add yourself to the group that owns it (sudo usermod -aG kvm $USER) and log in again",
        path.display()
    )]
    NoPermission { path: PathBuf },
    #[error("cannot open {}: {source}", path.display())]
    Open { path: PathBuf, source: std::io::Error },
    #[error("{} is not KVM: make it the character device 10:232 (mknod /dev/kvm c 10 232)", path.display())]
    NotKvm { path: PathBuf },
    #[error("{} speaks version {version} of KVM's API: vmm needs version 12, which Linux has had since 2007", path.display())]
    ApiVersion { path: PathBuf, version: i32 },
    #[error("this host's KVM lacks {}: vmm needs a newer kernel, Linux 5.10 or later", capabilities.join(", "))]
    Capabilities { capabilities: Vec<&'static str> },
    #[error("this host's KVM does not work: {0}")]
    Trial(#[from] ProbeError),
}

/// A host that can run machines.
#[derive(Debug)]
pub struct Host {
    /// The open `/dev/kvm`.
    pub kvm: Kvm,
    /// What there is.
    pub facts: HostFacts,
}

impl Host {
    /// Opens KVM and finds out what it can do. Whether kernel mode is emulated is found with a trial machine, once per boot
    /// of the host.
    pub fn detect() -> Result<Self, HostError> {
        Self::detect_at(KVM, SystemFacts::read())
    }

    /// How guest kernels run here.
    pub fn kernel_mode(&self) -> KernelMode {
        self.facts.kvm.kernel_mode
    }

    fn detect_at(path: &CStr, system: SystemFacts) -> Result<Self, HostError> {
        let kvm = Kvm::new_with_path(CString::from(path))
            .map_err(|e| open_error(to_path(path), Errno::from_raw_os_error(e.errno()), &system))?;
        let api_version = kvm.get_api_version();
        match api_version {
            API_VERSION => {}
            ..0 => return Err(HostError::NotKvm { path: to_path(path) }),
            version => return Err(HostError::ApiVersion { path: to_path(path), version }),
        }
        require(|cap| kvm.check_extension(cap), &REQUIRED)?;

        let kernel_mode = kernel_mode(&kvm, &system)?;
        if kernel_mode == KernelMode::Emulated {
            require(|cap| kvm.check_extension(cap), &REQUIRED_EMULATED)?;
            if kvm.check_extension_raw(EXIT_ON_EMULATION_FAILURE) <= 0 {
                return Err(HostError::Capabilities { capabilities: vec!["EXIT_ON_EMULATION_FAILURE"] });
            }
        }
        let max_vcpus = u32::try_from(kvm.get_max_vcpus()).unwrap_or(u32::MAX);
        let facts = HostFacts { system, kvm: KvmFacts { api_version, max_vcpus, kernel_mode } };
        Ok(Self { kvm, facts })
    }
}

fn kernel_mode(kvm: &Kvm, system: &SystemFacts) -> Result<KernelMode, HostError> {
    let cache = Cache::of_host(&system.modules);
    if let Some(known) = cache.as_ref().and_then(Cache::get) {
        return Ok(known);
    }
    let mode = probe::kernel_mode(kvm)?;
    if let Some(Err(e)) = cache.as_ref().map(|cache| cache.put(mode)) {
        log::debug!("kernel mode not remembered: {e}");
    }
    Ok(mode)
}

fn require(has: impl Fn(Cap) -> bool, list: &[(Cap, &'static str)]) -> Result<(), HostError> {
    let capabilities: Vec<_> = list.iter().filter(|(cap, _)| !has(*cap)).map(|(_, name)| *name).collect();
    if capabilities.is_empty() { Ok(()) } else { Err(HostError::Capabilities { capabilities }) }
}

fn open_error(path: PathBuf, errno: Errno, system: &SystemFacts) -> HostError {
    match errno {
        Errno::NOENT => HostError::NoKvm { path, remedy: system.device_remedy() },
        Errno::NODEV | Errno::NXIO => HostError::NoDriver { path, remedy: system.kvm_remedy() },
        Errno::ACCESS | Errno::PERM => HostError::NoPermission { path },
        other => HostError::Open { path, source: other.into() },
    }
}

fn to_path(path: &CStr) -> PathBuf {
    Path::new(std::ffi::OsStr::new(&*path.to_string_lossy())).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_tell_what_to_do() {
        let system = SystemFacts::read();
        for (errno, message) in [
            (Errno::NOENT, "/dev/kvm does not exist: "),
            (Errno::NODEV, "/dev/kvm exists but no KVM answers there: "),
            (Errno::ACCESS, "no permission to open /dev/kvm: add yourself to the group"),
            (Errno::PERM, "no permission to open /dev/kvm: add yourself to the group"),
            (Errno::MFILE, "cannot open /dev/kvm: "),
        ] {
            let error = open_error("/dev/kvm".into(), errno, &system).to_string();
            assert!(error.starts_with(message) && !error.contains('\n'), "{error}");
        }
        let error = require(|cap| cap != Cap::Irqfd && cap != Cap::Ioeventfd, &REQUIRED).unwrap_err();
        assert!(error.to_string().starts_with("this host's KVM lacks IRQFD, IOEVENTFD: "), "{error}");
    }

    #[test]
    fn other_files_are_not_kvm() {
        let at = |path| Host::detect_at(path, SystemFacts::read()).map(|_| ()).unwrap_err();
        assert!(matches!(at(c"/dev/null"), HostError::NotKvm { .. }));
        assert!(matches!(at(c"/nowhere/kvm"), HostError::NoKvm { .. }));
    }

    #[test]
    fn this_host_is_detected() {
        let host = match Host::detect() {
            Ok(host) => host,
            Err(e) if std::env::var_os("CI").is_none() => {
                return eprintln!("skipped: this_host_is_detected: {e}");
            }
            Err(e) => panic!("{e}"),
        };
        assert!(host.facts.kvm.max_vcpus >= 1);
        // Asked twice, with and without the cache, it is the same.
        let mode = probe::kernel_mode(&host.kvm).unwrap();
        assert_eq!(Host::detect().unwrap().kernel_mode(), mode);
        eprintln!("kernel mode: {mode}");
        if host.facts.system.modules.iter().any(|m| m.name == "kvm_pvm") {
            assert_eq!(mode, KernelMode::Emulated);
        }
    }
}
