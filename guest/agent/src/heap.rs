//! The heap of PID 1: blocks of a few sizes out of one array, each size with a list of those that are free.
//!
//! The C library's would ask the kernel for pages at nearly every allocation here, and give them back at the next: some 50,000 instructions each
//! time, which is more than any system call that the agent means to make. This one asks for nothing. The array is zeroes that
//! the executable does not carry, and a page of it exists from when it is first written to.
//!
//! What does not fit, such as an environment of a megabyte, is mapped for itself.

use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::ptr::{self, NonNull};

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// Bytes of the array.
const ARENA: usize = 256 << 10;

/// Sizes are powers of two: this is the smallest, and every block's alignment.
const SMALLEST: usize = 16;

/// The largest size from the array.
const LARGEST: usize = 64 << 10;

/// How many sizes there are.
const CLASSES: usize = (LARGEST.ilog2() - SMALLEST.ilog2() + 1) as usize;

/// A heap for one thread.
#[repr(C, align(16))]
pub struct Heap {
    arena: UnsafeCell<[u8; ARENA]>,
    state: UnsafeCell<State>,
}

struct State {
    /// How much of the array was ever given out.
    used: usize,
    /// For each size the first free block, which begins with the address of the next.
    free: [Option<NonNull<u8>>; CLASSES],
}

// SAFETY: PID 1 has one thread. Its child shares the memory until it executes, and PID 1 waits for that.
unsafe impl Sync for Heap {}

impl Heap {
    /// An empty heap.
    #[expect(clippy::new_without_default, reason = "a default value could not be a static's")]
    pub const fn new() -> Self {
        let state = State { used: 0, free: [None; CLASSES] };
        Self { arena: UnsafeCell::new([0; ARENA]), state: UnsafeCell::new(state) }
    }

    /// Which size a block for `layout` has; `None` if it is to be mapped.
    fn class(layout: Layout) -> Option<usize> {
        if layout.size() > LARGEST || layout.align() > SMALLEST {
            return None;
        }
        let size = layout.size().max(SMALLEST).next_power_of_two();
        Some((size.ilog2() - SMALLEST.ilog2()) as usize)
    }

    /// A block of the array; `None` if it is used up.
    fn take(&self, class: usize) -> Option<NonNull<u8>> {
        // SAFETY: one thread, and nothing called from here allocates: nobody else has a reference.
        let state = unsafe { &mut *self.state.get() };
        let first = state.free.get_mut(class)?;
        if let Some(block) = *first {
            // SAFETY: a free block holds what `give` wrote; it is aligned to 16.
            *first = unsafe { block.cast().read() };
            return Some(block);
        }
        let end = state.used.checked_add(SMALLEST << class).filter(|&end| end <= ARENA)?;
        // SAFETY: within the array, since `end` is.
        let block = unsafe { self.arena.get().cast::<u8>().add(state.used) };
        state.used = end;
        NonNull::new(block)
    }

    /// Takes a block of the array back.
    fn give(&self, class: usize, block: NonNull<u8>) {
        // SAFETY: as in `take`.
        let state = unsafe { &mut *self.state.get() };
        if let Some(first) = state.free.get_mut(class) {
            // SAFETY: the block is nobody's, aligned to 16, and has room for a pointer.
            unsafe { block.cast().write(*first) };
            *first = Some(block);
        }
    }

    fn owns(&self, block: *mut u8) -> bool {
        let start = self.arena.get().addr();
        (start..start + ARENA).contains(&block.addr())
    }
}

// SAFETY: a block of the array is of its class's size, which is the layout's or more; blocks do not overlap, since `used` only
// grows by whole blocks and a free block leaves its list when it is given out. Mapped blocks are pages of their own.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if let Some(block) = Self::class(layout).and_then(|class| self.take(class)) {
            return block.as_ptr();
        }
        if layout.align() > 4096 {
            return ptr::null_mut();
        }
        let rights = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a mapping at an address of the kernel's choice touches nobody's memory.
        let pages = unsafe { mmap_anonymous(ptr::null_mut(), layout.size(), rights, MapFlags::PRIVATE) };
        pages.map_or(ptr::null_mut(), |pages| pages.cast())
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        match (Self::class(layout), NonNull::new(block)) {
            (Some(class), Some(block)) if self.owns(block.as_ptr()) => self.give(class, block),
            _ => {
                // SAFETY: not of the array, so `alloc` has mapped it with this size.
                let _ = unsafe { munmap(block.cast(), layout.size()) };
            }
        }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: the caller's promise: the size, rounded up to the alignment, does not overflow.
        let new_layout = unsafe { Layout::from_size_align_unchecked(new_size, layout.align()) };
        if self.owns(block) && Self::class(layout) == Self::class(new_layout) {
            return block;
        }
        // SAFETY: as above.
        let new = unsafe { self.alloc(new_layout) };
        if !new.is_null() {
            // SAFETY: two blocks, each of at least the smaller size; the old one is the caller's to give up.
            unsafe {
                ptr::copy_nonoverlapping(block, new, layout.size().min(new_size));
                self.dealloc(block, layout);
            }
        }
        new
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A block that a test holds, filled with a byte of its own.
    struct Held {
        block: *mut u8,
        layout: Layout,
        mark: u8,
    }

    impl Held {
        fn new(heap: &Heap, size: usize, mark: u8) -> Self {
            let layout = Layout::from_size_align(size, SMALLEST).unwrap();
            // SAFETY: the size is not zero.
            let block = unsafe { heap.alloc(layout) };
            assert!(!block.is_null() && block.addr() % SMALLEST == 0);
            // SAFETY: the block is of this size.
            unsafe { block.write_bytes(mark, size) };
            Self { block, layout, mark }
        }

        fn intact(&self, size: usize) -> bool {
            // SAFETY: the block is of this size at least, and was filled.
            unsafe { core::slice::from_raw_parts(self.block, size) }.iter().all(|&byte| byte == self.mark)
        }

        fn resize(&mut self, heap: &Heap, size: usize) {
            // SAFETY: the block is of this heap and layout.
            self.block = unsafe { heap.realloc(self.block, self.layout, size) };
            assert!(self.intact(size.min(self.layout.size())));
            self.layout = Layout::from_size_align(size, SMALLEST).unwrap();
            // SAFETY: the block has this size now.
            unsafe { self.block.write_bytes(self.mark, size) };
        }

        fn free(self, heap: &Heap) {
            assert!(self.intact(self.layout.size()));
            // SAFETY: the block is of this heap and layout, and used no more.
            unsafe { heap.dealloc(self.block, self.layout) };
        }
    }

    proptest! {
        #[test]
        fn blocks_do_not_touch(steps in prop::collection::vec((0u8..3, 1usize..200_000, any::<usize>()), 1..120)) {
            let heap = Box::new(Heap::new());
            let mut held: Vec<Held> = Vec::new();
            for (number, (what, size, which)) in steps.into_iter().enumerate() {
                match what {
                    0 => held.push(Held::new(&heap, if which % 4 == 0 { size } else { size % 300 + 1 }, number as u8)),
                    _ if held.is_empty() => (),
                    1 => { let at = which % held.len(); held.swap_remove(at).free(&heap); }
                    _ => { let at = which % held.len(); held[at].resize(&heap, size); }
                }
            }
            held.into_iter().for_each(|block| block.free(&heap));
        }
    }

    #[test]
    fn freed_blocks_serve_again() {
        let heap = Box::new(Heap::new());
        for _ in 0..100 {
            let blocks = [Held::new(&heap, 40 << 10, 1), Held::new(&heap, 40 << 10, 2)];
            assert!(blocks.iter().all(|held| heap.owns(held.block)));
            blocks.into_iter().for_each(|held| held.free(&heap));
        }
    }

    #[test]
    fn more_than_the_array_holds_is_mapped() {
        let heap = Box::new(Heap::new());
        let blocks: Vec<_> = (0..10).map(|n| Held::new(&heap, LARGEST, n)).collect();
        assert_eq!(blocks.iter().filter(|held| heap.owns(held.block)).count(), ARENA / LARGEST);
        blocks.into_iter().for_each(|held| held.free(&heap));
    }
}
