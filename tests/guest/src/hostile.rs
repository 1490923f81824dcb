//! What a hostile process may try against the kernel below it and the VMM below that. Each attempt runs in a process of its own, and how
//! that ended is printed; the tests on the host know what a processor would have done.

use std::arch::asm;
use std::io::{Error, Write};

use crate::Outcome;

/// What an attempt needs to know: addresses in the kernel.
#[derive(Clone, Copy)]
struct Kernel {
    /// The system call's entry.
    lstar: u64,
    /// The page fault's.
    page_fault: u64,
}

/// Flags as a `SYSCALL` saves them: interrupts on, and the bit that is always one.
const SANE: u64 = 0x202;

/// Gives up where an attempt did nothing: it is reported as `exit 9`.
fn survived() -> ! {
    // SAFETY: takes no pointers; nothing of this process is needed any more.
    unsafe { libc::_exit(9) }
}

macro_rules! instruction {
    ($($line:literal),+ $(,)? $(; $($operands:tt)*)?) => {
        // SAFETY: what it does to this process is its purpose; nothing is used afterwards but `survived`.
        unsafe { asm!($($line),+, $($($operands)*,)? options(nostack)) }
    };
}

/// Jumps to `target` with registers as after a `SYSCALL` whose return address is behind a real one. Let in, it asks for `getpid`,
/// comes back there and ends with `exit 0`.
fn enter(target: u64, flags: u64) -> ! {
    // SAFETY: never returns to Rust.
    unsafe {
        asm!(
            "lea rcx, [rip + 3f]",
            "mov eax, 39",
            "jmp {target}",
            "2: syscall",
            "3: xor edi, edi",
            "mov eax, 60",
            "syscall",
            target = in(reg) target,
            in("r11") flags,
            options(noreturn)
        )
    }
}

/// The same with a chosen return address, where there is no `SYSCALL` before it.
fn enter_from(target: u64, back: u64, flags: u64) -> ! {
    // SAFETY: never returns to Rust.
    unsafe {
        asm!(
            "mov eax, 39",
            "jmp {target}",
            target = in(reg) target,
            in("rcx") back,
            in("r11") flags,
            options(noreturn)
        )
    }
}

/// Jumps to `target` with the stack at a frame as the kernel would find it after a system call's page fault.
fn with_frame(target: u64, kernel: Kernel) -> ! {
    let frame: [u64; 8] = [0x15, kernel.lstar, 0x33, SANE, 0, 0x2b, 0, 0];
    // SAFETY: never returns to Rust.
    unsafe {
        asm!(
            "lea rcx, [rip + 3f]",
            "mov rsp, {frame}",
            "mov eax, 39",
            "jmp {target}",
            "2: syscall",
            "3: ud2",
            target = in(reg) target,
            frame = in(reg) frame.as_ptr(),
            in("r11") SANE,
            options(noreturn)
        )
    }
}

type Attempt = fn(Kernel);

/// Ports. A process has none.
const PORTS: &[(&str, Attempt)] = &[
    ("out serial", |_| instruction!("out dx, al"; in("dx") 0x3f8u16, in("al") b'!')),
    ("out serial word", |_| instruction!("out dx, ax"; in("dx") 0x3f8u16, in("ax") 0x2121u16)),
    ("out pic", |_| instruction!("out 0x21, al"; in("al") 0xffu8)),
    ("out hook", |_| instruction!("out 0x7e, al"; in("al") 0u8)),
    ("out reset", |_| instruction!("out 0x64, al"; in("al") 0xfeu8)),
    ("out reset control", |_| instruction!("out dx, al"; in("dx") 0xcf9u16, in("al") 6u8)),
    (
        "outs",
        |_| instruction!("rep outsb"; in("dx") 0x3f8u16, in("rsi") "!!!!".as_ptr(), inout("rcx") 4u64 => _),
    ),
    ("in serial", |_| instruction!("in al, dx"; in("dx") 0x3f8u16, out("al") _)),
    ("in serial dword", |_| instruction!("in eax, dx"; in("dx") 0x3f8u16, out("eax") _)),
    ("in pic", |_| instruction!("in al, 0x21"; out("al") _)),
    ("in hook", |_| instruction!("in al, 0x7e"; out("al") _)),
    ("in keyboard", |_| instruction!("in al, 0x64"; out("al") _)),
    ("in pci", |_| instruction!("in eax, dx"; in("dx") 0xcfcu16, out("eax") _)),
    ("ins", |_| {
        let mut room = [0u8; 4];
        instruction!("rep insb"; in("dx") 0x3f8u16, in("rdi") room.as_mut_ptr(), inout("rcx") 4u64 => _);
    }),
];

/// Ways into the kernel.
const ENTRIES: &[(&str, Attempt)] = &[
    ("lstar, as a syscall would", |k| enter(k.lstar, SANE)),
    ("lstar, iopl 3", |k| enter(k.lstar, SANE | 3 << 12)),
    ("lstar, interrupts off", |k| enter(k.lstar, 0x2)),
    ("lstar, vm86", |k| enter(k.lstar, SANE | 1 << 17)),
    ("lstar, reserved flag", |k| enter(k.lstar, SANE | 1 << 3)),
    ("lstar, high flag", |k| enter(k.lstar, SANE | 1 << 40)),
    ("lstar, flag 1 clear", |k| enter(k.lstar, 0x200)),
    ("lstar, back to nowhere", |k| enter_from(k.lstar, 0, SANE)),
    ("lstar, back to the kernel", |k| enter_from(k.lstar, k.lstar, SANE)),
    ("lstar, back to a hole", |k| enter_from(k.lstar, 0x7000_0000_0000, SANE)),
    ("lstar, back to a non-canonical place", |k| enter_from(k.lstar, 1 << 63, SANE)),
    ("lstar, back to other code", |k| enter_from(k.lstar, survived as *const () as u64, SANE)),
    ("behind lstar", |k| enter(k.lstar + 4, SANE)),
    ("page fault's entry", |k| enter(k.page_fault, SANE)),
    ("page fault's entry, behind the hook", |k| enter(k.page_fault + 2, SANE)),
    ("page fault's entry, forged frame", |k| with_frame(k.page_fault, k)),
    ("behind the hook, forged frame", |k| with_frame(k.page_fault + 2, k)),
    ("hook, forged frame", |k| {
        let frame: [u64; 6] = [0x15, k.lstar, 0x33, SANE, 0, 0x2b];
        instruction!("mov rsp, {0}", "out 0x7e, al"; in(reg) frame.as_ptr());
    }),
    ("non-canonical jump", |_| instruction!("jmp {0}"; in(reg) 1u64 << 63)),
    ("non-canonical stack", |_| instruction!("mov rsp, {0}", "push rax"; in(reg) 1u64 << 63)),
    ("kernel's memory", |k| instruction!("mov al, [{0}]"; in(reg) k.lstar, out("al") _)),
    ("int 14", |_| instruction!("int 14")),
    ("int 0x20", |_| instruction!("int 0x20")),
    ("far return to ring 0", |_| {
        instruction!("push 0x10", "lea rax, [rip + 2f]", "push rax", "retfq", "2: nop")
    }),
    ("iret to ring 0", |_| {
        instruction!(
            "mov rax, rsp",
            "push 0x18",
            "push rax",
            "pushfq",
            "push 0x10",
            "lea rax, [rip + 2f]",
            "push rax",
            "iretq",
            "2: nop"
        );
    }),
    ("sysret", |_| instruction!("sysretq")),
];

/// Instructions.
const INSTRUCTIONS: &[(&str, Attempt)] = &[
    ("hlt", |_| instruction!("hlt")),
    ("cli", |_| instruction!("cli")),
    ("sti", |_| instruction!("sti")),
    ("wrmsr", |_| instruction!("wrmsr"; in("ecx") 0xc000_0082u32, in("eax") 0, in("edx") 0)),
    ("rdmsr", |_| instruction!("rdmsr"; in("ecx") 0xc000_0082u32, out("eax") _, out("edx") _)),
    ("mov cr0", |_| instruction!("mov cr0, {0}"; in(reg) 0u64)),
    ("mov cr3", |_| instruction!("mov {0}, cr3"; out(reg) _)),
    ("mov dr7", |_| instruction!("mov dr7, {0}"; in(reg) 0u64)),
    ("lidt", |_| instruction!("lidt [rsp]")),
    ("lgdt", |_| instruction!("lgdt [rsp]")),
    ("ltr", |_| instruction!("ltr ax")),
    ("invlpg", |_| instruction!("invlpg [rsp]")),
    ("wbinvd", |_| instruction!("wbinvd")),
    ("swapgs", |_| instruction!("swapgs")),
    ("clts", |_| instruction!("clts")),
    ("ud2", |_| instruction!("ud2")),
    ("clac", |_| instruction!("clac")),
    ("vmcall", |_| instruction!("vmcall")),
    ("vmmcall", |_| instruction!("vmmcall")),
    ("monitor", |_| instruction!("monitor"; in("rax") 0, in("ecx") 0, in("edx") 0)),
    ("xgetbv", |_| instruction!("xgetbv"; in("ecx") 0, out("eax") _, out("edx") _)),
    ("xrstor", |_| instruction!("xrstor [rsp - 4096]"; in("eax") 0, in("edx") 0)),
    ("cmpxchg16b", |_| {
        let mut place = Aligned([0; 2]);
        // rbx is the compiler's; nothing is stored, since the comparison is with what is there.
        instruction!("lock cmpxchg16b [rdi]"; in("rdi") &raw mut place, in("rax") 1, in("rdx") 1, in("rcx") 0);
    }),
    ("popcnt", |_| instruction!("popcnt {0}, {0}"; inout(reg) 3u64 => _)),
    ("fwait", |_| instruction!("fwait")),
    ("int3", |_| instruction!("int3")),
    ("int 3", |_| instruction!(".byte 0xcd, 3")),
    ("icebp", |_| instruction!(".byte 0xf1")),
    ("rsm", |_| instruction!("rsm")),
    ("fxsave", |_| {
        let mut area = Aligned([0u64; 64]);
        instruction!("fxsave64 [{0}]", "fxrstor64 [{0}]"; in(reg) &raw mut area);
    }),
    ("single step over a syscall", |_| {
        instruction!(
            "pushfq",
            "or qword ptr [rsp], 0x100",
            "popfq",
            "syscall";
            inout("rax") 39u64 => _, out("rcx") _, out("r11") _
        );
    }),
    ("syscall with the direction and alignment flags", |_| {
        instruction!(
            "pushfq",
            "or qword ptr [rsp], 0x40400",
            "popfq",
            "syscall",
            "cld",
            "pushfq",
            "and qword ptr [rsp], -0x40001",
            "popfq";
            inout("rax") 39u64 => _, out("rcx") _, out("r11") _
        );
    }),
    ("syscall across pages", |_| across_pages()),
];

#[repr(align(64))]
struct Aligned<T>(#[allow(dead_code, reason = "only its place matters")] T);

/// A `SYSCALL` whose two bytes lie on two pages.
fn across_pages() {
    // SAFETY: a new mapping, wherever the kernel likes.
    let pages = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            8192,
            libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    assert_ne!(pages, libc::MAP_FAILED);
    // syscall; ret
    let code = [0x0f, 0x05, 0xc3];
    // SAFETY: within the two pages.
    let start = unsafe { pages.cast::<u8>().add(4095) };
    // SAFETY: three bytes that begin with the last of the first page.
    unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), start, code.len()) };
    // SAFETY: calls the code above, which asks for getpid and returns.
    unsafe { asm!("call {0}", in(reg) start, inout("rax") 39u64 => _, out("rcx") _, out("r11") _) };
}

/// Makes every attempt whose name contains `only`, and prints a line for each: `NAME: signal N`, or `NAME: exit N`.
pub fn run(lstar: u64, page_fault: u64, only: &str) -> Outcome {
    let kernel = Kernel { lstar, page_fault };
    for (name, attempt) in [PORTS, ENTRIES, INSTRUCTIONS].concat() {
        if name.contains(only) {
            println!("{name}: {}", outcome(attempt, kernel)?);
        }
    }
    // SAFETY: takes no pointers.
    let (iopl, ioperm) = unsafe { (libc::iopl(3), libc::ioperm(0x3f8, 8, 1)) };
    println!("iopl: {iopl}\nioperm: {ioperm}");
    Ok(())
}

fn outcome(attempt: Attempt, kernel: Kernel) -> Result<String, Error> {
    std::io::stdout().flush()?;
    // SAFETY: this process has one thread; the child makes its attempt and ends.
    let child = unsafe { libc::fork() };
    match child {
        -1 => Err(Error::last_os_error()),
        0 => {
            attempt(kernel);
            survived()
        }
        _ => {
            let mut status = 0;
            // SAFETY: `status` lives.
            if unsafe { libc::waitpid(child, &raw mut status, 0) } != child {
                return Err(Error::last_os_error());
            }
            Ok(if libc::WIFSIGNALED(status) {
                format!("signal {}", libc::WTERMSIG(status))
            } else {
                format!("exit {}", libc::WEXITSTATUS(status))
            })
        }
    }
}
