//! `prober`: what the tests run inside guests, one subcommand each. Statically linked; `tests/guest/build` makes an image of it.

mod hostile;
mod registers;
mod stream;
mod vsock;
mod witness;

use std::io::{Read, Write, stdin, stdout};
use std::process::ExitCode;

use prober::{Checksum, Pattern};

const USAGE: &str = "prober pattern BYTES | checksum | hog BYTES | fill BYTES | registers | hostile LSTAR PAGE_FAULT [ONLY] | tcp-serve PORT | tcp-send ADDRESS BYTES | vsock-open | vsock-serve PORT | \
                     vsock-send PORT BYTES | witness DISK PORT | changed";

type Outcome = Result<(), Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let outcome = match *words {
        ["pattern", bytes] => number(bytes).and_then(|bytes| pattern(bytes, &mut stdout().lock())),
        ["checksum"] => checksum(),
        ["hostile", lstar, page_fault] => {
            number(lstar).and_then(|lstar| hostile::run(lstar, number(page_fault)?, ""))
        }
        // To look closer at one of them.
        ["hostile", lstar, page_fault, only] => {
            number(lstar).and_then(|lstar| hostile::run(lstar, number(page_fault)?, only))
        }
        ["hog", bytes] => number(bytes).and_then(hog),
        ["fill", bytes] => number(bytes).and_then(fill),
        ["registers"] => registers::run(),
        ["vsock-open"] => {
            println!("{}", vsock::open());
            Ok(())
        }
        ["tcp-serve", port] => number(port).and_then(stream::serve_tcp),
        ["tcp-send", address, bytes] => number(bytes).and_then(|bytes| stream::send_tcp(address, bytes)),
        ["vsock-serve", port] => number(port).and_then(vsock::serve),
        ["vsock-send", port, bytes] => number(port).and_then(|port| vsock::send(port, number(bytes)?)),
        ["witness", disk, port] => number(port).and_then(|port| witness::run(disk, port)),
        ["changed"] => witness::changed(),
        _ => Err(USAGE.into()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("prober: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A decimal number, or a hexadecimal one after `0x`.
fn number(text: &str) -> Result<u64, Box<dyn std::error::Error>> {
    Ok(match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16)?,
        None => text.parse()?,
    })
}

/// Writes the first `bytes` of the pattern.
fn pattern(bytes: u64, to: &mut impl Write) -> Outcome {
    let mut buffer = vec![0; 64 << 10];
    let mut pattern = Pattern::default();
    let mut left = usize::try_from(bytes)?;
    while left > 0 {
        let count = left.min(buffer.len());
        let piece = buffer.get_mut(..count).unwrap_or_default();
        pattern.fill(piece);
        to.write_all(piece)?;
        left -= count;
    }
    Ok(to.flush()?)
}

/// Says how many bytes are on standard input, and their checksum.
fn checksum() -> Outcome {
    let mut buffer = vec![0; 64 << 10];
    let (mut checksum, mut total) = (Checksum::default(), 0);
    loop {
        let count = stdin().lock().read(&mut buffer)?;
        if count == 0 {
            println!("input: {total} {:016x}", checksum.value());
            return Ok(());
        }
        checksum.update(buffer.get(..count).unwrap_or_default());
        total += count;
    }
}

/// Takes that much memory at once, whether there is as much or not.
fn hog(bytes: u64) -> Outcome {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_POPULATE;
    let rights = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping, wherever the kernel likes.
    let memory = unsafe { libc::mmap(std::ptr::null_mut(), usize::try_from(bytes)?, rights, flags, -1, 0) };
    if memory == libc::MAP_FAILED { Err(std::io::Error::last_os_error().into()) } else { Ok(()) }
}

/// Fills that much memory with the pattern, says so, and waits for its end. In huge pages: a fault each, where faults are slow.
fn fill(bytes: u64) -> Outcome {
    let bytes = usize::try_from(bytes)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping, wherever the kernel likes; it is ours until the end, and memory while it is written to.
    let memory = unsafe {
        let memory =
            libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
        if memory == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error().into());
        }
        // A kernel without huge pages takes longer.
        libc::madvise(memory, bytes, libc::MADV_HUGEPAGE);
        std::slice::from_raw_parts_mut(memory.cast::<u8>(), bytes)
    };
    Pattern::default().fill(memory);
    println!("filled");
    loop {
        std::thread::park();
    }
}
