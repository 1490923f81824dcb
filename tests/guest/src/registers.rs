//! Whether processes that take turns on a processor keep their registers: general, SSE, AVX, and the base of FS.

use std::arch::asm;
use std::arch::x86_64::__cpuid;
use std::io::Error;

use crate::Outcome;

/// Turns of each process.
const ROUNDS: u64 = 200;

/// Fills XMM0 to XMM15 and some general registers with values of `seed`, spins or yields, and compares.
fn round(seed: u64, spin: u64) -> bool {
    let values: [u64; 16] =
        std::array::from_fn(|i| seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(4 * i as u32));
    let mut found = [0u64; 16];
    let mut general = [0u64; 4];
    // SAFETY: reads 16 words, writes 16 words, and names every register that it changes.
    unsafe {
        asm!(
            "movq xmm0, [rsi]", "movq xmm1, [rsi+8]", "movq xmm2, [rsi+16]", "movq xmm3, [rsi+24]",
            "movq xmm4, [rsi+32]", "movq xmm5, [rsi+40]", "movq xmm6, [rsi+48]", "movq xmm7, [rsi+56]",
            "movq xmm8, [rsi+64]", "movq xmm9, [rsi+72]", "movq xmm10, [rsi+80]", "movq xmm11, [rsi+88]",
            "movq xmm12, [rsi+96]", "movq xmm13, [rsi+104]", "movq xmm14, [rsi+112]", "movq xmm15, [rsi+120]",
            "mov r8, [rsi]", "mov r9, [rsi+8]", "mov r12, [rsi+16]", "mov r13, [rsi+24]",
            "test rcx, rcx", "jnz 2f",
            "mov eax, 24", "syscall", "jmp 3f", // sched_yield
            "2: dec rcx", "jnz 2b",
            "3:",
            "movq [rdi], xmm0", "movq [rdi+8], xmm1", "movq [rdi+16], xmm2", "movq [rdi+24], xmm3",
            "movq [rdi+32], xmm4", "movq [rdi+40], xmm5", "movq [rdi+48], xmm6", "movq [rdi+56], xmm7",
            "movq [rdi+64], xmm8", "movq [rdi+72], xmm9", "movq [rdi+80], xmm10", "movq [rdi+88], xmm11",
            "movq [rdi+96], xmm12", "movq [rdi+104], xmm13", "movq [rdi+112], xmm14", "movq [rdi+120], xmm15",
            "mov [rdx], r8", "mov [rdx+8], r9", "mov [rdx+16], r12", "mov [rdx+24], r13",
            in("rsi") values.as_ptr(), in("rdi") found.as_mut_ptr(), in("rdx") general.as_mut_ptr(),
            inout("rcx") spin => _, out("rax") _, out("r8") _, out("r9") _, out("r11") _, out("r12") _, out("r13") _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
            out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
        );
    }
    let fs: u64;
    // SAFETY: the first word of the thread's control block is its own address.
    unsafe { asm!("mov {0}, fs:[0]", out(reg) fs) };
    let expected_fs = base_of_fs();
    if found != values {
        eprintln!("bad: sse {found:x?}, not {values:x?} (spin {spin})");
    }
    if general[..] != values[..4] {
        eprintln!("bad: general {general:x?}, not {:x?} (spin {spin})", &values[..4]);
    }
    if fs != expected_fs {
        eprintln!("bad: fs {fs:#x}, not {expected_fs:#x}");
    }
    found == values && general[..] == values[..4] && fs == expected_fs
}

fn base_of_fs() -> u64 {
    let mut base = 0u64;
    // SAFETY: ARCH_GET_FS (0x1003) writes one word.
    unsafe { libc::syscall(libc::SYS_arch_prctl, 0x1003, &raw mut base) };
    base
}

/// Two processes take turns; says how many rounds went wrong.
pub fn run() -> Outcome {
    let (one, seven) = (__cpuid(1), __cpuid(7));
    println!(
        "cpuid: 1 ecx {:08x} edx {:08x}, 7 ebx {:08x}, xsave {} osxsave {} avx {}",
        one.ecx,
        one.edx,
        seven.ebx,
        one.ecx >> 26 & 1,
        one.ecx >> 27 & 1,
        one.ecx >> 28 & 1
    );
    if one.ecx >> 27 & 1 == 1 {
        println!("xcr0: {:#x}", xcr0());
    }
    // SAFETY: this process has one thread.
    let child = unsafe { libc::fork() };
    if child < 0 {
        return Err(Error::last_os_error().into());
    }
    let id = u64::from(std::process::id());
    let bad =
        (0..ROUNDS).filter(|i| !round(id << 32 | (i + 1), if i % 2 == 0 { 0 } else { 20_000_000 })).count();
    let avx = one.ecx >> 28 & 1 == 1 && one.ecx >> 27 & 1 == 1 && xcr0() & 6 == 6;
    // SAFETY: the CPU has AVX, and says that it may be used.
    let bad_avx = (0..ROUNDS).filter(|i| avx && !unsafe { round_avx(id << 32 | (i + 1)) }).count();
    println!("bad rounds: {bad}, with avx: {bad_avx}");
    if child == 0 {
        std::process::exit(i32::from(bad > 0) + 2 * i32::from(bad_avx > 0));
    }
    let mut status = 0;
    // SAFETY: `status` lives.
    unsafe { libc::waitpid(child, &raw mut status, 0) };
    let theirs = libc::WEXITSTATUS(status);
    let word = |lost| if lost || !libc::WIFEXITED(status) { "lost" } else { "kept" };
    println!("registers: {}", word(bad > 0 || theirs & 1 != 0));
    println!("wide registers: {}", word(bad_avx > 0 || theirs & 2 != 0));
    Ok(())
}

/// Fills the upper half of YMM0 with `seed`, yields to other processes, and says whether it is still there.
#[target_feature(enable = "avx")]
fn round_avx(seed: u64) -> bool {
    let values = [seed, !seed, seed.rotate_left(20), seed.rotate_left(40)];
    let mut found = [0u64; 4];
    // SAFETY: reads and writes 32 bytes each, and the CPU has AVX.
    unsafe {
        asm!(
            "vmovdqu ymm0, [rsi]",
            "mov eax, 24",
            "syscall",
            "vmovdqu [rdi], ymm0",
            "vzeroupper",
            in("rsi") values.as_ptr(), in("rdi") found.as_mut_ptr(),
            out("rax") _, out("rcx") _, out("r11") _, out("ymm0") _,
        );
    }
    if found != values {
        eprintln!("bad: avx {found:x?}, not {values:x?}");
    }
    found == values
}

/// XCR0: which registers a process may use.
fn xcr0() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: only called where CPUID shows OSXSAVE.
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high) };
    u64::from(high) << 32 | u64::from(low)
}
