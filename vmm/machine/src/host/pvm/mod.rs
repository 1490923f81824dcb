//! The measures that let an unmodified Linux boot where KVM emulates kernel mode (`kvm_pvm` without a paravirtual guest).
//!
//! There guest user code runs on the CPU, but guest kernel code runs instruction by instruction in KVM's emulator, and four
//! things that Linux needs are missing or different. This module, and nothing else, makes up for them; it is switched on by
//! detection ([`crate::host::KernelMode::Emulated`]) and by nothing else, and on other hosts none of it runs:
//!
//! 1. CPUID cannot hide what the CPU has, and the kernel then uses instructions that the emulator lacks: the command line turns
//!    those features off ([`cmdline`]).
//! 2. `int3` at CPL 0, and 3. `fwait`, end in an emulation failure: we do what they would have done ([`instruction`]).
//! 4. `SYSCALL` sets RIP, RCX and R11 but leaves CPL at 3, so that the fetch at LSTAR faults. The kernel's page-fault handler
//!    begins with a port write that we put there ([`hook`]); at that exit we see whether the fault was a `SYSCALL`, and
//!    complete it ([`syscall`]).
//!
//! (A fifth, `EAGAIN` from an application processor, is harmless on any host and handled in [`crate::kvm::run`].)
//!
//! **What is trusted.** Nothing that user mode in the guest can bring about. A process can jump to LSTAR with any RCX and R11,
//! but is then only let in where a `SYSCALL` would have brought it; it can write to our port, but is then refused, since the
//! hook is accepted from CPL 0 at the hook's own address only, with the fault's frame on a page that user mode cannot reach.
//! Ports are refused to user mode unless the guest's TSS gives them away ([`ports`]): the host does not always check. An
//! instruction that cannot be emulated at CPL 3 is #UD for that process, never the end of the VM.
//! What remains weaker than on hardware is said in README and by `vmm info`.
//!
//! Everything that decides is a pure function; [`PvmVcpu`] carries it out on the vCPU's thread.

pub mod cmdline;
pub mod hook;
pub mod instruction;
pub mod ports;
pub mod syscall;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use devices::GuestMemory;
use kvm_bindings::{
    KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_FILTER, Msrs,
    kvm_enable_cap, kvm_msr_entry, kvm_regs,
};
use kvm_ioctls::{MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, SyncReg, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use crate::kvm::run::{self, Exit, MAX_INSTRUCTION};
use crate::vcpu::exit::{Flow, hex};
use crate::vcpu::paging::{self, Access};
use hook::Hook;
use instruction::Action;

const MSR_STAR: u32 = 0xc000_0081;
const MSR_LSTAR: u32 = 0xc000_0082;
const MSR_SFMASK: u32 = 0xc000_0084;

/// How often in a row an instruction that changed under us is tried again.
const MOST_RETRIES: u32 = 1000;

/// Exceptions that we inject (Intel SDM vol. 3, table 6-1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Exception {
    Breakpoint = 3,
    InvalidOpcode = 6,
    GeneralProtection = 13,
}

/// What a snapshot carries of the measures, beside each vCPU's [`syscall::Entry`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PvmState {
    hook: Option<hook::Place>,
    confirmed: bool,
}

/// What all vCPUs of one VM share.
pub struct Pvm {
    memory: Arc<GuestMemory>,
    hook: Hook,
    /// A `SYSCALL` came through the hook: the kernel will not overwrite it any more.
    confirmed: AtomicBool,
}

impl Pvm {
    /// Switches the measures on for `vm`, before it has vCPUs. With `state`, its memory is that of a snapshot.
    ///
    /// # Errors
    /// Those of `KVM_ENABLE_CAP` and `KVM_X86_SET_MSR_FILTER`.
    pub fn enable(
        vm: &VmFd,
        memory: Arc<GuestMemory>,
        state: Option<PvmState>,
    ) -> Result<Arc<Self>, kvm_ioctls::Error> {
        let capability =
            |cap, arg: u32| kvm_enable_cap { cap, args: [arg.into(), 0, 0, 0], ..Default::default() };
        vm.enable_cap(&capability(KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1))?;
        vm.enable_cap(&capability(KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_FILTER))?;
        // One bit a register from 0xc0000080 on; a clear bit sends writes to us.
        let bitmap = [!(1u8 << 1 | 1 << 2 | 1 << 4)];
        let writes = MsrFilterRange {
            flags: MsrFilterRangeFlags::WRITE,
            base: 0xc000_0080,
            msr_count: 8,
            bitmap: &bitmap,
        };
        vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &[writes])?;
        let state = state.unwrap_or(PvmState { hook: None, confirmed: false });
        let confirmed = AtomicBool::new(state.confirmed);
        Ok(Arc::new(Pvm { memory, hook: Hook::restored(state.hook), confirmed }))
    }

    /// What a snapshot must carry.
    pub fn save(&self) -> PvmState {
        PvmState { hook: self.hook.place(), confirmed: self.confirmed.load(Ordering::Relaxed) }
    }
}

/// What of an exit concerns this module, without a borrow of the vCPU.
#[derive(Debug, Clone, Copy)]
pub enum Trap {
    /// A port was read or written.
    Port {
        /// The port.
        port: u16,
        /// Bytes of one access.
        width: usize,
        /// Whether it was written.
        write: bool,
    },
    /// A register that the filter sends to us.
    Msr {
        /// Its number.
        index: u32,
        /// Its value.
        value: u64,
    },
    /// A device's memory was read or written.
    Mmio,
    /// An instruction that the host could not emulate.
    Failure {
        /// Its bytes.
        bytes: [u8; MAX_INSTRUCTION],
        /// How many of them count.
        len: usize,
    },
}

impl Trap {
    /// The trap that `exit` is, if any.
    pub fn of(exit: &Exit<'_>) -> Option<Trap> {
        match *exit {
            Exit::PortRead { port, width, .. } => Some(Trap::Port { port, width, write: false }),
            Exit::PortWrite { port, width, .. } => Some(Trap::Port { port, width, write: true }),
            Exit::WriteMsr { index, value, .. } => Some(Trap::Msr { index, value }),
            Exit::EmulationFailure { bytes, len } => Some(Trap::Failure { bytes, len }),
            Exit::MmioRead { .. } | Exit::MmioWrite { .. } => Some(Trap::Mmio),
            _ => None,
        }
    }
}

/// What became of a trap.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is dealt with.
    Served,
    /// It is dealt with, and the vCPU is to look at its orders before it runs on.
    Look,
    /// It is a device's business.
    Pass,
    /// The guest cannot go on; text for a person.
    Fatal(String),
}

/// The measures on one vCPU.
pub struct PvmVcpu {
    vm: Arc<Pvm>,
    entry: syscall::Entry,
    retries: u32,
}

impl PvmVcpu {
    /// Prepares `vcpu`, whose system calls go to `entry` if it was saved with one.
    pub fn new(vm: Arc<Pvm>, vcpu: &mut VcpuFd, entry: Option<syscall::Entry>) -> Self {
        // Registers come with every exit, instead of by two more system calls.
        vcpu.set_sync_valid_reg(SyncReg::Register);
        vcpu.set_sync_valid_reg(SyncReg::SystemRegister);
        PvmVcpu { vm, entry: entry.unwrap_or_default(), retries: 0 }
    }

    /// Where the vCPU's system calls go: a restore by `KVM_SET_MSRS` passes the filter by, so that nobody else would know.
    pub fn entry(&self) -> syscall::Entry {
        self.entry
    }

    /// Deals with `trap`, or leaves it to the devices.
    pub fn serve(&mut self, vcpu: &mut VcpuFd, trap: Trap) -> Outcome {
        let retries = std::mem::take(&mut self.retries);
        let done = match trap {
            Trap::Mmio => {
                self.mind_hook(vcpu);
                Ok(Outcome::Pass)
            }
            Trap::Port { port, width, write } => self.port(vcpu, port, width, write),
            Trap::Msr { index, value } => self.msr(vcpu, index, value),
            Trap::Failure { bytes, len } => self.failure(vcpu, bytes.get(..len).unwrap_or_default(), retries),
        };
        done.unwrap_or_else(|error| Outcome::Fatal(format!("KVM refused a vCPU's state: {error}")))
    }

    fn port(
        &mut self,
        vcpu: &mut VcpuFd,
        port: u16,
        width: usize,
        write: bool,
    ) -> Result<Outcome, kvm_ioctls::Error> {
        let state = vcpu.sync_regs();
        let (regs, sregs) = (state.regs, state.sregs);
        if syscall::cpl(&sregs) == 3 && !ports::allowed(&self.vm.memory, &regs, &sregs, port, width) {
            return self.refuse_port(vcpu, regs, write);
        }
        if write && port == hook::PORT && self.vm.hook.hit(&regs, &sregs) {
            if let Some(frame) = syscall::Frame::read(&self.vm.memory, &regs, &sregs)
                && syscall::is_syscall(&self.vm.memory, &self.entry, &frame, &regs, &sregs)
            {
                let sync = vcpu.sync_regs_mut();
                syscall::complete(&self.entry, &frame, &mut sync.regs, &mut sync.sregs);
                vcpu.set_sync_dirty_reg(SyncReg::Register);
                vcpu.set_sync_dirty_reg(SyncReg::SystemRegister);
                self.vm.confirmed.store(true, Ordering::Relaxed);
            }
            // Any other fault goes on into the handler.
            return Ok(Outcome::Served);
        }
        self.mind_hook(vcpu);
        Ok(Outcome::Pass)
    }

    /// The kernel patches itself while it starts; until a system call came through, sees to it that the hook is there.
    fn mind_hook(&self, vcpu: &VcpuFd) {
        if self.entry.lstar != 0 && !self.vm.confirmed.load(Ordering::Relaxed) {
            self.vm.hook.install(&self.vm.memory, &vcpu.sync_regs().sregs);
        }
    }

    /// User mode touched a port that it must not reach: #GP at the instruction, as its processor would have raised.
    fn refuse_port(
        &self,
        vcpu: &mut VcpuFd,
        regs: kvm_regs,
        write: bool,
    ) -> Result<Outcome, kvm_ioctls::Error> {
        let mut regs = regs;
        if write {
            // A write is over when we hear of it, and RIP is past it.
            let sregs = vcpu.sync_regs().sregs;
            regs.rip = ports::start_of_output(&self.vm.memory, &sregs, regs.rip);
        } else {
            // A read is completed when the vCPU runs next: let it, without entering the guest, and take the result back.
            if let Exit::PortRead { data, .. } = run::last_exit(vcpu) {
                data.fill(0xff);
            }
            vcpu.set_kvm_immediate_exit(1);
            let _ = vcpu.run().map(drop);
        }
        vcpu.set_regs(&regs)?;
        inject(vcpu, Exception::GeneralProtection)?;
        // A kick may have hit that run, and nobody can tell it from ours: look what is wanted.
        Ok(Outcome::Look)
    }

    fn msr(&mut self, vcpu: &mut VcpuFd, index: u32, value: u64) -> Result<Outcome, kvm_ioctls::Error> {
        let field = match index {
            MSR_STAR => &mut self.entry.star,
            MSR_LSTAR => &mut self.entry.lstar,
            MSR_SFMASK => &mut self.entry.sfmask,
            _ => return Ok(Outcome::Pass),
        };
        let entry = kvm_msr_entry { index, data: value, ..Default::default() };
        let accepted = Msrs::from_entries(&[entry]).is_ok_and(|msrs| vcpu.set_msrs(&msrs) == Ok(1));
        if accepted {
            *field = value;
        }
        if let Exit::WriteMsr { error, .. } = run::last_exit(vcpu) {
            *error = u8::from(!accepted);
        }
        self.mind_hook(vcpu);
        Ok(Outcome::Served)
    }

    fn failure(
        &mut self,
        vcpu: &mut VcpuFd,
        bytes: &[u8],
        retries: u32,
    ) -> Result<Outcome, kvm_ioctls::Error> {
        let mut regs = vcpu.get_regs()?;
        let sregs = vcpu.get_sregs()?;
        match instruction::decide(bytes, syscall::cpl(&sregs)) {
            Action::Breakpoint => {
                regs.rip = regs.rip.wrapping_add(1);
                vcpu.set_regs(&regs)?;
                inject(vcpu, Exception::Breakpoint)?;
            }
            Action::Skip(len) => {
                regs.rip = regs.rip.wrapping_add(len);
                vcpu.set_regs(&regs)?;
            }
            Action::Undefined => inject(vcpu, Exception::InvalidOpcode)?,
            Action::Unknown => {
                // Another vCPU may have finished patching this place since KVM read it.
                let now = paging::read::<MAX_INSTRUCTION>(&self.vm.memory, &sregs, regs.rip, Access::Kernel);
                let changed = now.is_some_and(|now| !now.starts_with(bytes)) || bytes.is_empty();
                if !changed || retries >= MOST_RETRIES {
                    let what = "this host emulates kernel mode and cannot emulate the instruction";
                    return Ok(Outcome::Fatal(format!("{what}{}", hex(bytes))));
                }
                self.retries = retries + 1;
            }
        }
        Ok(Outcome::Served)
    }
}

impl From<Outcome> for Option<Flow> {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Served => Some(Flow::Continue),
            Outcome::Look => Some(Flow::Interrupted),
            Outcome::Pass => None,
            Outcome::Fatal(reason) => Some(Flow::Fatal(reason)),
        }
    }
}

fn inject(vcpu: &VcpuFd, exception: Exception) -> Result<(), kvm_ioctls::Error> {
    let mut events = vcpu.get_vcpu_events()?;
    events.exception.injected = 1;
    events.exception.pending = 0;
    events.exception.nr = exception as u8;
    events.exception.has_error_code = u8::from(exception == Exception::GeneralProtection);
    events.exception.error_code = 0;
    events.flags = 0;
    vcpu.set_vcpu_events(&events)
}
