//! The address buses of a machine: which device answers at a port or at a guest-physical address.
//!
//! A [`Bus`] is assembled by a [`BusBuilder`] and frozen before the first vCPU runs, so that vCPU threads look devices up in
//! a sorted slice, without a lock. A device that needs one has it inside.

use std::sync::Arc;

use thiserror::Error;

/// A device that answers to reads and writes at addresses. Called on vCPU threads, on several at once.
pub trait BusDevice: Send + Sync {
    /// Fills `data` with what the guest reads at `offset` bytes from the start of the device's range.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes what the guest wrote at `offset` bytes from the start of the device's range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// A range that cannot be put on a bus.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BusError {
    /// The range is empty or runs past the end of the address space.
    #[error("device range {base:#x}+{size:#x} is empty or wraps around")]
    BadRange {
        /// First address of the range.
        base: u64,
        /// Its length in bytes.
        size: u64,
    },
    /// Two devices claim the same address.
    #[error("device range {base:#x}+{size:#x} overlaps a device at {other:#x}")]
    Overlap {
        /// First address of the range.
        base: u64,
        /// Its length in bytes.
        size: u64,
        /// First address of the range that was there before.
        other: u64,
    },
}

struct Range {
    base: u64,
    /// Last address of the range, inclusive.
    last: u64,
    device: Arc<dyn BusDevice>,
}

/// Collects ranges, in any order, and refuses those that overlap.
#[derive(Default)]
pub struct BusBuilder {
    ranges: Vec<Range>,
}

impl BusBuilder {
    /// Puts `device` at `size` bytes from `base`.
    ///
    /// # Errors
    /// [`BusError`] when the range is empty, wraps around, or overlaps another.
    pub fn insert(&mut self, base: u64, size: u64, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        let last =
            size.checked_sub(1).and_then(|s| base.checked_add(s)).ok_or(BusError::BadRange { base, size })?;
        let at = self.ranges.partition_point(|r| r.base < base);
        let before = at.checked_sub(1).and_then(|i| self.ranges.get(i)).filter(|r| r.last >= base);
        let after = self.ranges.get(at).filter(|r| r.base <= last);
        if let Some(other) = before.or(after) {
            return Err(BusError::Overlap { base, size, other: other.base });
        }
        self.ranges.insert(at, Range { base, last, device });
        Ok(())
    }

    /// Freezes the bus.
    pub fn freeze(self) -> Bus {
        Bus { ranges: self.ranges.into() }
    }
}

/// A frozen bus, shared by all vCPU threads.
#[derive(Clone)]
pub struct Bus {
    ranges: Arc<[Range]>,
}

impl Bus {
    /// The device at `address`, and how far into its range that is; `None` where nothing is, and where an access of `len`
    /// bytes would run out of the device's range.
    fn find(&self, address: u64, len: usize) -> Option<(&dyn BusDevice, u64)> {
        let at = self.ranges.partition_point(|r| r.last < address);
        let range = self.ranges.get(at).filter(|r| r.base <= address)?;
        let end = address.checked_add(len.saturating_sub(1) as u64)?;
        (end <= range.last).then(|| (&*range.device, address - range.base))
    }

    /// Serves a read. An address where nothing is reads as all ones, as on a PC whose bus floats high; `false` says so.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.find(address, data.len()) {
            Some((device, offset)) => {
                device.read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// Serves a write. What is written where nothing is is lost; `false` says so.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        let found = self.find(address, data.len());
        if let Some((device, offset)) = found {
            device.write(offset, data);
        }
        found.is_some()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, usize)>>);

    impl BusDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(0xab);
            self.0.lock().unwrap().push((offset, data.len()));
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.len()));
        }
    }

    fn recorder() -> Arc<Recorder> {
        Arc::new(Recorder::default())
    }

    #[test]
    fn finds_the_device_and_the_offset() {
        let (a, b) = (recorder(), recorder());
        let mut builder = BusBuilder::default();
        builder.insert(0x2000, 0x1000, b.clone()).unwrap();
        builder.insert(0x1000, 0x10, a.clone()).unwrap();
        let bus = builder.freeze();
        let mut data = [0u8; 4];
        assert!(bus.read(0x100c, &mut data));
        assert!(bus.write(0x2ffc, &data));
        assert_eq!(*a.0.lock().unwrap(), [(0xc, 4)]);
        assert_eq!(*b.0.lock().unwrap(), [(0xffc, 4)]);
    }

    #[test]
    fn an_empty_address_reads_as_ones() {
        let mut builder = BusBuilder::default();
        builder.insert(0x1000, 0x10, recorder()).unwrap();
        let bus = builder.freeze();
        for address in [0, 0xfff, 0x1010, 0x100e, u64::MAX] {
            let mut data = [0u8; 4];
            assert!(!bus.read(address, &mut data), "{address:#x}");
            assert_eq!(data, [0xff; 4]);
            assert!(!bus.write(address, &data));
        }
    }

    #[test]
    fn refuses_ranges_that_overlap_or_wrap() {
        let mut builder = BusBuilder::default();
        builder.insert(0x1000, 0x1000, recorder()).unwrap();
        for (base, size) in [(0x1000, 1), (0xfff, 2), (0x1fff, 1), (0x800, 0x2000)] {
            assert!(
                matches!(
                    builder.insert(base, size, recorder()),
                    Err(BusError::Overlap { other: 0x1000, .. })
                ),
                "{base:#x}"
            );
        }
        assert!(matches!(builder.insert(0x3000, 0, recorder()), Err(BusError::BadRange { .. })));
        assert!(matches!(builder.insert(u64::MAX, 2, recorder()), Err(BusError::BadRange { .. })));
        builder.insert(0x2000, 1, recorder()).unwrap();
        builder.insert(u64::MAX, 1, recorder()).unwrap();
    }
}
