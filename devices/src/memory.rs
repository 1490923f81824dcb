//! The guest's memory: which of vm-memory's types stands for it, what it is made of, and which pages *we* wrote to.
//!
//! KVM keeps a log of the pages that the guest itself writes to; what devices and the machine write goes past KVM. So where a
//! snapshot may later be taken as a difference, each region carries a bitmap of its own, which vm-memory marks with every
//! write. System calls that write to guest memory are in one place ([`vectored`](crate::virtio::vectored)), which marks what
//! they have written. Any thread may write; [`take_dirty_pages`] is the controller's, while nobody does.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;

use thiserror::Error;
use vm_memory::bitmap::{AtomicBitmap, Bitmap, NewBitmap, RefSlice, WithBitmapSlice};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion, VolatileSlice,
};

/// All RAM of one guest: anonymous or file-backed mappings, one region on each side of the hole below 4 GiB.
pub type GuestMemory = GuestMemoryMmap<DirtyPages>;

/// A piece of guest memory that knows where to mark a write to it.
pub type Slice<'a> = VolatileSlice<'a, Option<RefSlice<'a, AtomicBitmap>>>;

/// Bytes of a page, as KVM's dirty log counts them.
pub const PAGE: NonZeroUsize = NonZeroUsize::MIN.saturating_add(4095);

/// Why there is no such memory.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The host does not map it.
    #[error("{len} bytes of guest memory at {start:#x}: {cause}")]
    Map {
        /// Guest-physical address.
        start: u64,
        /// Length.
        len: usize,
        /// What the host said.
        cause: String,
    },
    /// A file that ends before its mapping would kill whoever reads behind the end.
    #[error("the memory file has {have} bytes, {need} are needed")]
    Short {
        /// The file's length.
        have: u64,
        /// Where the mapping would end.
        need: u64,
    },
    /// The file does not say how long it is.
    #[error("the memory file: {0}")]
    File(#[from] io::Error),
    /// Regions overlap, or there is none.
    #[error("guest memory: {0}")]
    Layout(String),
}

/// What a region's bytes are before anybody writes to them. What is written never goes there.
#[derive(Debug, Clone)]
pub enum Backing {
    /// Zeros.
    Anonymous,
    /// A file's, from `offset` on, which must be a multiple of the page size. Pages are read when they are first touched, and
    /// copied when they are first written to.
    Private {
        /// The file. Whoever makes it shorter later kills the machine.
        file: Arc<File>,
        /// Where in it.
        offset: u64,
    },
}

/// Memory of zeros at `ranges`; with `track`, writes of ours are marked.
///
/// # Errors
/// [`MemoryError`] when the host has no room for it, or ranges overlap.
pub fn anonymous(ranges: &[(GuestAddress, usize)], track: bool) -> Result<GuestMemory, MemoryError> {
    of(ranges.iter().map(|&(start, len)| (start, len, Backing::Anonymous)), track)
}

/// Memory of regions (start, length, what is in them), in ascending order; with `track`, writes of ours are marked.
///
/// # Errors
/// [`MemoryError`] when the host does not map one, or they overlap.
pub fn of(
    regions: impl IntoIterator<Item = (GuestAddress, usize, Backing)>,
    track: bool,
) -> Result<GuestMemory, MemoryError> {
    let regions = regions.into_iter().map(|(start, len, backing)| region(start, len, backing, track));
    let regions = regions.collect::<Result<Vec<_>, _>>()?;
    GuestMemory::from_regions(regions).map_err(|error| MemoryError::Layout(error.to_string()))
}

fn region(
    start: GuestAddress,
    len: usize,
    backing: Backing,
    track: bool,
) -> Result<GuestRegionMmap<DirtyPages>, MemoryError> {
    let map = |cause: String| MemoryError::Map { start: start.0, len, cause };
    let pages = if track { DirtyPages(Some(AtomicBitmap::new(len, PAGE))) } else { DirtyPages::default() };
    let builder =
        MmapRegionBuilder::new_with_bitmap(len, pages).with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
    let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
    let builder = match backing {
        Backing::Anonymous => builder.with_mmap_flags(flags | libc::MAP_ANONYMOUS),
        Backing::Private { file, offset } => {
            let have = file.metadata()?.len();
            let need = offset.saturating_add(len as u64);
            if have < need {
                return Err(MemoryError::Short { have, need });
            }
            builder.with_mmap_flags(flags).with_file_offset(FileOffset::from_arc(file, offset))
        }
    };
    let mapping = builder.build().map_err(|error| map(error.to_string()))?;
    GuestRegionMmap::new(mapping, start).ok_or_else(|| map("it ends beyond the address space".into()))
}

/// The pages of one region that we wrote to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirtyRegion {
    /// Where the region begins.
    pub start: GuestAddress,
    /// A bit for each page of 4 KiB, lowest first: as KVM's dirty log has them.
    pub pages: Vec<u64>,
}

/// The pages that we wrote to since the last call, of each region that is tracked. They count as clean from now on.
pub fn take_dirty_pages(memory: &GuestMemory) -> Vec<DirtyRegion> {
    let dirty = memory.iter().filter_map(|region| {
        let mapping: &MmapRegion<DirtyPages> = region;
        let pages = mapping.bitmap().0.as_ref()?.get_and_reset();
        Some(DirtyRegion { start: region.start_addr(), pages })
    });
    dirty.collect()
}

/// A region's own log of writes, or none. (vm-memory has this for `Option` but cannot make one by itself.)
#[derive(Debug, Default)]
pub struct DirtyPages(Option<AtomicBitmap>);

impl<'a> WithBitmapSlice<'a> for DirtyPages {
    type S = Option<RefSlice<'a, AtomicBitmap>>;
}

impl Bitmap for DirtyPages {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.0.mark_dirty(offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.0.dirty_at(offset)
    }

    fn slice_at(&self, offset: usize) -> Option<RefSlice<'_, AtomicBitmap>> {
        self.0.slice_at(offset)
    }
}

impl NewBitmap for DirtyPages {
    /// Memory is tracked on demand only.
    fn with_len(_: usize) -> Self {
        Self::default()
    }
}

#[cfg(test)]
#[path = "memory_tests.rs"]
mod tests;
