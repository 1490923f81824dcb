//! One `KVM_RUN`: from the mapped `kvm_run` to an [`Exit`] that safe code can match on.
//!
//! Called on the vCPU's own thread. kvm-ioctls has an enum of exits too; it leaves out the width of port accesses and the
//! bytes of an instruction that KVM could not emulate, both of which we need.

use std::io;

use kvm_bindings::{
    KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_IO_IN,
    KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN, KVM_EXIT_X86_WRMSR, KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, kvm_run,
};
use kvm_ioctls::VcpuFd;

/// Longest instruction of the architecture, in bytes.
pub const MAX_INSTRUCTION: usize = 15;

/// Why the vCPU came back.
#[derive(Debug)]
pub enum Exit<'a> {
    /// `in` or `ins` from a port: fill `data`, which is a number of accesses of `width` bytes each.
    PortRead {
        /// The port.
        port: u16,
        /// Bytes of one access: 1, 2 or 4.
        width: usize,
        /// Where the answer goes.
        data: &'a mut [u8],
    },
    /// `out` or `outs` to a port.
    PortWrite {
        /// The port.
        port: u16,
        /// Bytes of one access: 1, 2 or 4.
        width: usize,
        /// What was written.
        data: &'a [u8],
    },
    /// A read of guest-physical memory where no RAM is.
    MmioRead {
        /// Guest-physical address.
        address: u64,
        /// Where the answer goes.
        data: &'a mut [u8],
    },
    /// A write to guest-physical memory where no RAM is.
    MmioWrite {
        /// Guest-physical address.
        address: u64,
        /// What was written.
        data: &'a [u8],
    },
    /// `wrmsr` to a register that an MSR filter sends to us. `error` set to 1 makes it raise #GP.
    WriteMsr {
        /// Number of the register.
        index: u32,
        /// The value.
        value: u64,
        /// The verdict.
        error: &'a mut u8,
    },
    /// `hlt` with nobody in the kernel to wait for an interrupt.
    Halt,
    /// A triple fault, which is also how a guest asks for a reset.
    Shutdown,
    /// The host could not emulate an instruction; these are its bytes, where the host says so.
    EmulationFailure {
        /// The bytes, of which `len` count.
        bytes: [u8; MAX_INSTRUCTION],
        /// How many bytes there are; 0 when the host does not say.
        len: usize,
    },
    /// A signal, or nothing at all: run again.
    Interrupted,
    /// The vCPU cannot go on; text for a person.
    Fatal(String),
}

/// Runs the vCPU until it exits.
pub fn run(fd: &mut VcpuFd) -> Exit<'_> {
    if let Err(error) = fd.run().map(drop) {
        return match error.errno() {
            // EAGAIN: an application processor that still waits for its start-up interrupt.
            libc::EINTR | libc::EAGAIN => Exit::Interrupted,
            code => Exit::Fatal(format!("KVM_RUN: {}", io::Error::from_raw_os_error(code))),
        };
    }
    decode(fd.get_kvm_run())
}

/// Looks at the exit that `fd` is at once more. Meaningful only after [`run`] gave something else than [`Exit::Interrupted`]
/// and [`Exit::Fatal`].
pub fn last_exit(fd: &mut VcpuFd) -> Exit<'_> {
    decode(fd.get_kvm_run())
}

fn decode(run: &mut kvm_run) -> Exit<'_> {
    match run.exit_reason {
        KVM_EXIT_IO => {
            // SAFETY: the exit reason says that `io` is the live member.
            let io = unsafe { run.__bindgen_anon_1.io };
            let width = usize::from(io.size);
            let len = width * usize::try_from(io.count).unwrap_or(0);
            let offset = usize::try_from(io.data_offset).unwrap_or(0);
            let base = (run as *mut kvm_run).cast::<u8>();
            // SAFETY: KVM puts the data `data_offset` bytes into the mapping of which `kvm_run` is the start, and never more
            // than the page that it keeps for it. The slice borrows `run`, and with it the vCPU, until the next KVM_RUN.
            let data = unsafe { std::slice::from_raw_parts_mut(base.add(offset), len) };
            match u32::from(io.direction) == KVM_EXIT_IO_IN {
                true => Exit::PortRead { port: io.port, width, data },
                false => Exit::PortWrite { port: io.port, width, data },
            }
        }
        KVM_EXIT_MMIO => {
            // SAFETY: the exit reason says that `mmio` is the live member.
            let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
            let len = usize::try_from(mmio.len).unwrap_or(0).min(mmio.data.len());
            let (data, _) = mmio.data.split_at_mut(len);
            match mmio.is_write {
                0 => Exit::MmioRead { address: mmio.phys_addr, data },
                _ => Exit::MmioWrite { address: mmio.phys_addr, data },
            }
        }
        KVM_EXIT_X86_WRMSR => {
            // SAFETY: the exit reason says that `msr` is the live member.
            let msr = unsafe { &mut run.__bindgen_anon_1.msr };
            Exit::WriteMsr { index: msr.index, value: msr.data, error: &mut msr.error }
        }
        KVM_EXIT_HLT => Exit::Halt,
        KVM_EXIT_SHUTDOWN => Exit::Shutdown,
        KVM_EXIT_INTR => Exit::Interrupted,
        KVM_EXIT_FAIL_ENTRY => {
            // SAFETY: the exit reason says that `fail_entry` is the live member.
            let entry = unsafe { run.__bindgen_anon_1.fail_entry };
            Exit::Fatal(format!(
                "the processor refused the guest's state (reason {:#x}, cpu {})",
                entry.hardware_entry_failure_reason, entry.cpu
            ))
        }
        KVM_EXIT_INTERNAL_ERROR => {
            // SAFETY: the exit reason says that this is an internal error, whose first words `emulation_failure` shares.
            let failure = unsafe { run.__bindgen_anon_1.emulation_failure };
            if failure.suberror != KVM_INTERNAL_ERROR_EMULATION {
                return Exit::Fatal(format!("KVM internal error {}", failure.suberror));
            }
            let told = failure.ndata > 0
                && failure.flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0;
            // SAFETY: the union has one member.
            let instruction = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
            let len = if told { usize::from(instruction.insn_size).min(MAX_INSTRUCTION) } else { 0 };
            Exit::EmulationFailure { bytes: instruction.insn_bytes, len }
        }
        other => Exit::Fatal(format!("unexpected exit reason {other} of KVM_RUN")),
    }
}
