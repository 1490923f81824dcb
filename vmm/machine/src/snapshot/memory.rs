//! Guest memory in a file: written while the machine stands still, mapped again copy-on-write and lazily.
//!
//! The file holds the regions one after the other, each byte at the place that its region gives it, so that a page of the file is a
//! page of the guest. Pages of zeros are holes. A page behind the last region says to which snapshot the file belongs: files of
//! different snapshots cannot be mixed up.
//!
//! A *diff* holds only the pages that changed since its parent; which those are is in the snapshot's state.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use devices::GuestMemory;
use devices::memory::{Backing, MemoryError, of};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::SnapshotId;

/// Bytes of a page.
pub const PAGE: u64 = 4096;
const PAGE_BYTES: usize = 4096;
/// Most bytes of one write: what is read for it is still in a processor's cache then.
const PIECE: usize = 256 << 10;
/// Most threads that write.
const MOST_WRITERS: usize = 4;
const MAGIC: [u8; 8] = *b"VMM-RAM\n";
/// A page's bits in `/proc/PID/pagemap` (Documentation/admin-guide/mm/pagemap.rst): present, or swapped out.
const PRESENT_OR_SWAPPED: u64 = 0b11 << 62;

/// Consecutive pages, counted from the file's start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// The first page.
    pub start: u64,
    /// How many.
    pub count: u64,
}

/// What was written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// Bytes that are no holes.
    pub bytes: u64,
    /// CRC-32 over every page that is not zero, each with its number in front.
    pub crc: u32,
}

/// Writes all of `memory` to the empty file `file`. Nobody may write to the memory meanwhile.
///
/// # Errors
/// Those of the file system.
pub fn save(memory: &GuestMemory, file: &File, id: SnapshotId) -> io::Result<Saved> {
    let runs = candidates(memory)?;
    save_runs(memory, file, id, &runs, true)
}

/// Writes the pages of `runs`, zeros or not, to the empty file `file`.
///
/// # Errors
/// Those of the file system.
pub fn save_diff(memory: &GuestMemory, file: &File, id: SnapshotId, runs: &[Run]) -> io::Result<Saved> {
    save_runs(memory, file, id, runs, false)
}

fn save_runs(
    memory: &GuestMemory,
    file: &File,
    id: SnapshotId,
    runs: &[Run],
    skip_zeros: bool,
) -> io::Result<Saved> {
    let size = size(memory);
    file.set_len(size + PAGE)?;
    file.write_all_at(&trailer(id, size), size)?;
    // The guest stands still meanwhile, and its CPUs have nothing else to do.
    let writers = std::thread::available_parallelism().map_or(1, |count| count.get().min(MOST_WRITERS));
    let parts = split(runs, writers);
    let written = std::thread::scope(|scope| {
        let writers: Vec<_> =
            parts.iter().map(|part| scope.spawn(|| write_part(memory, file, part, skip_zeros))).collect();
        let ended =
            writers.into_iter().map(|writer| writer.join().unwrap_or(Err(io::ErrorKind::Other.into())));
        ended.collect::<io::Result<Vec<_>>>()
    })?;
    let (mut bytes, mut crc) = (0, crc32fast::Hasher::new());
    for (part_bytes, part_crc) in &written {
        bytes += part_bytes;
        crc.combine(part_crc);
    }
    Ok(Saved { bytes, crc: crc.finalize() })
}

/// Cuts `runs` into at most `parts` lists with about as many pages each.
fn split(runs: &[Run], parts: usize) -> Vec<Vec<Run>> {
    let pages: u64 = runs.iter().map(|run| run.count).sum();
    let share = pages.div_ceil(parts.max(1) as u64).max(1);
    let mut cut: Vec<Vec<Run>> = vec![Vec::new()];
    let mut room = share;
    for run in runs {
        let mut rest = *run;
        while rest.count > 0 {
            if room == 0 {
                cut.push(Vec::new());
                room = share;
            }
            let count = rest.count.min(room);
            if let Some(part) = cut.last_mut() {
                part.push(Run { start: rest.start, count });
            }
            rest = Run { start: rest.start + count, count: rest.count - count };
            room -= count;
        }
    }
    cut
}

/// Writes the pages of `runs`; returns how many bytes those were, and the sum over them.
fn write_part(
    memory: &GuestMemory,
    file: &File,
    runs: &[Run],
    skip_zeros: bool,
) -> io::Result<(u64, crc32fast::Hasher)> {
    let mut crc = crc32fast::Hasher::new();
    let mut bytes = 0;
    let mut piece = Vec::with_capacity(PIECE);
    let mut piece_at = 0;
    let mut page = [0; PAGE_BYTES];
    for run in runs {
        for number in run.start..run.start.saturating_add(run.count) {
            read_page(memory, number, &mut page)?;
            if skip_zeros && is_zero(&page) {
                continue;
            }
            crc.update(&number.to_le_bytes());
            crc.update(&page);
            let at = number * PAGE;
            if piece_at + piece.len() as u64 != at || piece.len() >= PIECE {
                file.write_all_at(&piece, piece_at)?;
                bytes += piece.len() as u64;
                piece.clear();
                piece_at = at;
            }
            piece.extend_from_slice(&page);
        }
    }
    file.write_all_at(&piece, piece_at)?;
    bytes += piece.len() as u64;
    Ok((bytes, crc))
}

/// The CRC that [`save`] gave, from a file.
///
/// # Errors
/// Those of the file system.
pub fn checksum(file: &File, size: u64) -> io::Result<u32> {
    let mut crc = crc32fast::Hasher::new();
    let mut at = 0;
    let mut page = [0; PAGE_BYTES];
    while at < size {
        at = match seek(file, SeekFrom::Data(at)) {
            Ok(data) => data & !(PAGE - 1),
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        if at >= size {
            break;
        }
        file.read_exact_at(&mut page, at)?;
        if !is_zero(&page) {
            crc.update(&(at / PAGE).to_le_bytes());
            crc.update(&page);
        }
        at += PAGE;
    }
    Ok(crc.finalize())
}

/// Whether `file` is the memory of snapshot `id`, `size` bytes of it.
///
/// # Errors
/// Those of the file system.
pub fn belongs(file: &File, id: SnapshotId, size: u64) -> io::Result<bool> {
    let mut found = [0; PAGE_BYTES];
    if !size.is_multiple_of(PAGE) || Some(file.metadata()?.len()) != size.checked_add(PAGE) {
        return Ok(false);
    }
    file.read_exact_at(&mut found, size)?;
    Ok(found == trailer(id, size))
}

/// Memory at `ranges` that begins as `file` has it, mapped copy-on-write: a page costs something when it is touched, and the
/// file is never written to. With `track`, writes of ours are marked.
///
/// # Errors
/// [`MemoryError`] when the host does not map it, or the file is too short.
pub fn map(file: &File, ranges: &[(GuestAddress, usize)], track: bool) -> Result<GuestMemory, MemoryError> {
    let file = Arc::new(file.try_clone()?);
    let mut offset = 0;
    let regions = ranges.iter().map(|&(start, len)| {
        let backing = Backing::Private { file: file.clone(), offset };
        offset += len as u64;
        (start, len, backing)
    });
    of(regions, track)
}

/// Reads the pages of a diff over what its parents left in `memory`.
///
/// # Errors
/// Those of the file system; `InvalidData` for pages that the memory does not have.
pub fn apply_diff(memory: &GuestMemory, file: &File, runs: &[Run]) -> io::Result<()> {
    let mut page = [0; PAGE_BYTES];
    for run in runs {
        let end = run.start.checked_add(run.count).filter(|end| *end <= size(memory) / PAGE);
        for number in run.start..end.ok_or(io::ErrorKind::InvalidData)? {
            file.read_exact_at(&mut page, number * PAGE)?;
            let address = address(memory, number).ok_or(io::ErrorKind::InvalidData)?;
            memory.write_slice(&page, address).map_err(io::Error::other)?;
        }
    }
    Ok(())
}

/// Whether `runs` are pages of a memory of `size` bytes, each once and in order, as [`Pages`] lists them. What repeats itself could take
/// any time to read.
pub fn are_pages_of(runs: &[Run], size: u64) -> bool {
    let mut last = 0;
    runs.iter().all(|run| {
        let begins = run.count > 0 && run.start >= last;
        let end = run.start.checked_add(run.count).filter(|end| *end <= size / PAGE);
        last = end.unwrap_or(u64::MAX);
        begins && end.is_some()
    })
}

/// Bytes of all regions.
pub fn size(memory: &GuestMemory) -> u64 {
    memory.iter().map(GuestMemoryRegion::len).sum()
}

fn trailer(id: SnapshotId, size: u64) -> [u8; PAGE_BYTES] {
    let mut page = [0; PAGE_BYTES];
    let words = MAGIC.iter().chain(&id.0).copied().chain(size.to_le_bytes());
    for (to, from) in page.iter_mut().zip(words) {
        *to = from;
    }
    page
}

fn is_zero(page: &[u8; PAGE_BYTES]) -> bool {
    // In words, which the compiler makes wide.
    page.as_chunks::<64>().0.iter().all(|chunk| *chunk == [0; 64])
}

/// Where page `number` of the file lies in the guest.
fn address(memory: &GuestMemory, number: u64) -> Option<GuestAddress> {
    let mut offset = number.checked_mul(PAGE)?;
    for region in memory.iter() {
        if offset < region.len() {
            return Some(GuestAddress(region.start_addr().0 + offset));
        }
        offset -= region.len();
    }
    None
}

fn read_page(memory: &GuestMemory, number: u64, page: &mut [u8; PAGE_BYTES]) -> io::Result<()> {
    let address = address(memory, number).ok_or(io::ErrorKind::InvalidData)?;
    memory.read_slice(page, address).map_err(io::Error::other)
}

/// The pages that may be other than zero: those that this process has touched, and those of the file that a region is mapped from.
fn candidates(memory: &GuestMemory) -> io::Result<Vec<Run>> {
    let pagemap = File::open("/proc/self/pagemap")?;
    let mut touched = Pages::default();
    let mut first = 0;
    for region in memory.iter() {
        let pages = region.len() / PAGE;
        let host = region.get_host_address(MemoryRegionAddress(0)).map_err(io::Error::other)?;
        let mut entries = vec![0; PIECE];
        let mut done = 0;
        while done < pages {
            let bytes = usize::try_from((pages - done) * 8).unwrap_or(PIECE).min(PIECE);
            let buffer = entries.get_mut(..bytes).unwrap_or_default();
            pagemap.read_exact_at(buffer, (host as u64 / PAGE + done) * 8)?;
            for (number, entry) in (first + done..).zip(buffer.as_chunks::<8>().0) {
                if u64::from_ne_bytes(*entry) & PRESENT_OR_SWAPPED != 0 {
                    touched.add(number);
                }
            }
            done += bytes as u64 / 8;
        }
        first += pages;
    }
    let mut runs = touched.0;
    if let Some(base) = memory.iter().next().and_then(|region| region.file_offset()) {
        runs = union(&runs, &data_runs(base.file(), size(memory))?);
    }
    Ok(runs)
}

/// Pages that come in ascending order, as runs.
#[derive(Debug, Default)]
pub struct Pages(pub Vec<Run>);

impl Pages {
    /// Another page.
    pub fn add(&mut self, number: u64) {
        match self.0.last_mut() {
            Some(run) if run.start + run.count == number => run.count += 1,
            _ => self.0.push(Run { start: number, count: 1 }),
        }
    }
}

/// The pages of the first `size` bytes of `file` that are no holes.
fn data_runs(file: &File, size: u64) -> io::Result<Vec<Run>> {
    let mut runs = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) if start < size => start,
            Ok(_) | Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = seek(file, SeekFrom::Hole(start))?.min(size);
        runs.push(Run { start: start / PAGE, count: end.div_ceil(PAGE) - start / PAGE });
        at = end;
    }
    Ok(runs)
}

/// Both lists' pages, each once, in order.
pub fn union(a: &[Run], b: &[Run]) -> Vec<Run> {
    let mut all: Vec<Run> = a.iter().chain(b).copied().collect();
    all.sort_by_key(|run| run.start);
    let mut merged: Vec<Run> = Vec::with_capacity(all.len());
    for run in all {
        match merged.last_mut() {
            Some(last) if run.start <= last.start + last.count => {
                last.count = last.count.max(run.start + run.count - last.start);
            }
            _ => merged.push(run),
        }
    }
    merged
}

#[cfg(test)]
#[path = "memory_tests.rs"]
mod tests;
