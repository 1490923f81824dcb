use super::*;
use crate::boot::kernel::testing::{ADDRESS, bzimage};

fn put<const N: usize>(image: &mut [u8], at: usize, bytes: [u8; N]) {
    image[at..at + N].copy_from_slice(&bytes);
}

fn parse(image: &[u8]) -> Result<BzImage, KernelFault> {
    BzImage::parse(&image[..HEAD_SIZE.min(image.len())], image.len() as u64)
}

#[test]
fn payload_and_entry_are_where_the_header_says() {
    let bytes = bzimage(b"payload");
    assert!(is_bzimage(&bytes));
    let image = parse(&bytes).unwrap();
    let (offset, length) = image.payload().unwrap();
    let source = Source::Bytes(bytes.clone());
    assert_eq!(source.read(offset, length, "the payload").unwrap(), b"payload");
    let (segment, entry) = image.in_guest(&source).unwrap();
    assert_eq!((segment.offset, segment.file_size), (0x400, bytes.len() as u64 - 0x400));
    assert_eq!((segment.address, segment.memory_size, entry), (ADDRESS, 0x10_0000, ADDRESS + 0x200));
}

#[test]
fn no_setup_sectors_means_four() {
    let mut bytes = bzimage(&[0; 64]);
    bytes[0x1f1] = 0;
    bytes.splice(0x400..0x400, [0; 3 * 512]);
    assert_eq!(parse(&bytes).unwrap().payload().unwrap().0, 5 * 512 + 0x400);
}

#[test]
fn fields_after_the_headers_end_are_not_there() {
    let mut bytes = bzimage(b"payload");
    // A header that ends before init_size.
    bytes[0x201] = 0x5e;
    assert_eq!({ parse(&bytes).unwrap().header.init_size }, 0);
    bytes[0x201] = 0xff;
    assert_eq!({ parse(&bytes).unwrap().header.init_size }, 0x10_0000);
    bytes[0x201] = 0;
    assert!(matches!(parse(&bytes), Err(KernelFault::TooOld { version: 0 })));
}

#[test]
fn bad_headers_are_named() {
    let good = bzimage(b"payload");
    let fault = |change: fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        change(&mut bytes);
        match parse(&bytes) {
            Err(fault) => fault.to_string(),
            Ok(image) => image.payload().unwrap_err().to_string(),
        }
    };
    assert!(fault(|b| put(b, 0x206, [0x07, 0x02])).contains("boot protocol 2.07 is too old"));
    assert!(fault(|b| b[0x211] = 0).contains("zImage"));
    assert!(fault(|b| b[0x236] = 0).contains("32-bit x86"));
    assert!(fault(|b| b.truncate(b.len() - 1)).contains("truncated"));
    assert!(fault(|b| b.truncate(0x250)).contains("truncated"));
    assert!(fault(|b| put(b, 0x1f4, [0xff; 4])).contains("truncated"));
    assert!(fault(|b| put(b, 0x248, [0xff; 4])).contains("outside the kernel"));
    assert!(fault(|b| put(b, 0x24c, [0xff; 4])).contains("outside the kernel"));
    assert!(fault(|b| put(b, 0x24c, [0; 4])).contains("outside the kernel"));
}

#[test]
fn an_old_kernel_cannot_unpack_itself_for_us() {
    let mut bytes = bzimage(b"payload");
    put(&mut bytes, 0x206, [0x0b, 0x02]);
    let image = parse(&bytes).unwrap();
    assert!(matches!(image.in_guest(&Source::Bytes(bytes)), Err(KernelFault::TooOld { version: 0x20b })));
}
