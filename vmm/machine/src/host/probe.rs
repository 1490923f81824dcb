//! Does this KVM run guest kernel mode on the CPU, or emulate it? Found out by asking: a throwaway VM whose one vCPU counts
//! down a register in 64-bit mode at CPL 0. Called by [`Host::detect`](super::Host::detect) once per boot of the host.

use std::time::{Duration, Instant};

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::KernelMode;
use crate::kvm::stats::VcpuStats;

/// `mov ecx, 2048; 1: dec ecx; jnz 1b; hlt`
const CODE: [u8; 10] = [0xb9, 0x00, 0x08, 0x00, 0x00, 0xff, 0xc9, 0x75, 0xfc, 0xf4];
/// Instructions of the loop alone.
const LOOP: u32 = 2 * 2048;
/// An emulated instruction takes 300 ns or more. Without a counter, this much per instruction is taken for emulation: the
/// loop has 400 µs then, where a CPU needs 2 µs and a nested exit some tens.
const SLOW: Duration = Duration::from_nanos(100);

const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const MEMORY: usize = 0x4000;

/// Why the trial failed: KVM is there but cannot run five instructions.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the message says it")]
pub enum ProbeError {
    #[error("cannot {step} for a trial machine: {source}")]
    Kvm { step: &'static str, source: std::io::Error },
    #[error("the trial machine stopped with {0} instead of halting")]
    Exit(String),
}

fn failed<E: Into<std::io::Error>>(step: &'static str) -> impl FnOnce(E) -> ProbeError {
    move |source| ProbeError::Kvm { step, source: source.into() }
}

/// Runs the trial: a few milliseconds where kernel mode is emulated, less elsewhere.
pub fn kernel_mode(kvm: &Kvm) -> Result<KernelMode, ProbeError> {
    let memory = memory().map_err(|e| ProbeError::Kvm { step: "map memory", source: e })?;
    let vm = kvm.create_vm().map_err(failed("create a VM"))?;
    map(&vm, &memory)?;
    // Without an in-kernel interrupt controller HLT comes back to us.
    let mut vcpu = vm.create_vcpu(0).map_err(failed("create a vCPU"))?;
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("read the CPUID"))?;
    vcpu.set_cpuid2(&cpuid).map_err(failed("set the CPUID"))?;
    enter_long_mode(&vcpu)?;

    let stats = VcpuStats::open(&vcpu).ok();
    let mut best = run(&mut vcpu)?;
    if let Some(count) = stats.and_then(|stats| stats.insn_emulation()) {
        return Ok(by_count(count));
    }
    // The first run also faulted the memory in; another process may disturb any of them.
    for _ in 0..3 {
        best = best.min(run(&mut vcpu)?);
    }
    Ok(by_time(best))
}

/// Hardware may have a few instructions emulated (a page-table access, an odd mode), never a whole loop.
fn by_count(emulated: u64) -> KernelMode {
    if emulated >= LOOP.into() { KernelMode::Emulated } else { KernelMode::Hardware }
}

fn by_time(taken: Duration) -> KernelMode {
    if taken >= SLOW * LOOP { KernelMode::Emulated } else { KernelMode::Hardware }
}

/// The code at 0, and page tables that map the first 2 MiB to themselves.
fn memory() -> std::io::Result<GuestMemoryMmap<()>> {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).map_err(std::io::Error::other)?;
    let write = |at, bytes: &[u8]| memory.write_slice(bytes, GuestAddress(at)).map_err(std::io::Error::other);
    // Present and writable; in the last also "this is a 2 MiB page".
    write(PML4, &(PDPT | 0x03).to_le_bytes())?;
    write(PDPT, &(PD | 0x03).to_le_bytes())?;
    write(PD, &0x83_u64.to_le_bytes())?;
    write(0, &CODE)?;
    Ok(memory)
}

fn map(vm: &VmFd, memory: &GuestMemoryMmap<()>) -> Result<(), ProbeError> {
    let address = memory
        .get_host_address(GuestAddress(0))
        .map_err(|e| ProbeError::Kvm { step: "map memory", source: std::io::Error::other(e) })?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: address as u64,
    };
    // SAFETY: the region is exactly `memory`'s one mapping, which the caller keeps until after the VM is gone: it declares
    // the memory before the VM and the vCPU, so they are dropped first.
    unsafe { vm.set_user_memory_region(region) }.map_err(failed("set memory"))
}

fn enter_long_mode(vcpu: &VcpuFd) -> Result<(), ProbeError> {
    let mut sregs = vcpu.get_sregs().map_err(failed("read registers"))?;
    let data = kvm_segment {
        limit: u32::MAX,
        selector: 0x10,
        type_: 3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..kvm_segment::default()
    };
    sregs.cs = kvm_segment { selector: 0x08, type_: 11, db: 0, l: 1, ..data };
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    sregs.cr3 = PML4;
    sregs.cr4 = 1 << 5; // PAE
    sregs.cr0 = 1 << 31 | 1 << 5 | 1 << 4 | 1; // PG, NE, ET, PE
    sregs.efer = 1 << 10 | 1 << 8; // LMA, LME
    vcpu.set_sregs(&sregs).map_err(failed("set registers"))
}

/// Runs the code from its first instruction to its HLT.
fn run(vcpu: &mut VcpuFd) -> Result<Duration, ProbeError> {
    let mut regs = vcpu.get_regs().map_err(failed("read registers"))?;
    regs.rip = 0;
    regs.rflags = 2; // The bit that is always set.
    vcpu.set_regs(&regs).map_err(failed("set registers"))?;
    let start = Instant::now();
    loop {
        match vcpu.run() {
            Ok(VcpuExit::Hlt) => return Ok(start.elapsed()),
            Ok(exit) => return Err(ProbeError::Exit(format!("{exit:?}"))),
            // A signal, or KVM asking to be called again.
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(e) => return Err(failed("run")(e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn evidence_is_weighed() {
        assert_eq!(by_count(0), KernelMode::Hardware);
        assert_eq!(by_count(17), KernelMode::Hardware);
        assert_eq!(by_count(4096), KernelMode::Emulated);
        assert_eq!(by_time(Duration::from_micros(60)), KernelMode::Hardware);
        assert_eq!(by_time(Duration::from_micros(1300)), KernelMode::Emulated);
    }
}
