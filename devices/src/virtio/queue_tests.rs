use proptest::prelude::*;

use super::*;
use crate::testing::{self, Driver, INDIRECT, NEXT};

fn driver() -> (Driver, Queue, Interrupt) {
    let driver = Driver::new(testing::memory(0x10_0000), 0, 16);
    let interrupt = Interrupt::new().unwrap();
    let queue = driver.queue(&interrupt);
    (driver, queue, interrupt)
}

#[test]
fn serves_chains_and_interrupts_once() {
    let (mut driver, mut queue, interrupt) = driver();
    driver.send(&[b"one"], &[4]);
    driver.send(&[b"two"], &[4]);
    let mut seen = Vec::new();
    queue
        .drain(|chain| {
            let mut data = [0; 3];
            chain.reader.read_exact(&mut data)?;
            chain.writer.write_all(&data)?;
            seen.push(data);
            Ok::<_, crate::virtio::DeviceError>(Served::Done)
        })
        .unwrap();
    assert_eq!(seen, [*b"one", *b"two"]);
    assert_eq!((driver.receive(), driver.receive(), driver.receive()), (Some((0, 3)), Some((2, 3)), None));
    assert_eq!(interrupt.line().read().unwrap(), 1, "one interrupt for both");
    assert_eq!(interrupt.status(), crate::virtio::interrupt::USED_BUFFER);
}

#[test]
fn a_chain_that_must_wait_comes_again() {
    let (mut driver, mut queue, _) = driver();
    driver.send(&[b"later"], &[]);
    queue.drain(|_| Ok::<_, QueueError>(Served::Later)).unwrap();
    assert_eq!(driver.receive(), None);
    queue.drain(|_| Ok::<_, QueueError>(Served::Done)).unwrap();
    assert_eq!(driver.receive(), Some((0, 0)));
}

#[test]
fn a_broken_chain_is_an_error() {
    // Next descriptor out of the table; a circle; an indirect table that is not a multiple of 16 bytes.
    for (flags, len, next) in [(NEXT, 16, 99), (NEXT, 16, 0), (INDIRECT, 15, 0)] {
        let (mut driver, mut queue, _) = driver();
        driver.descriptor(0, 0x8000, len, flags, next);
        driver.publish(0);
        assert!(matches!(queue.pop(), Err(QueueError::Chain(_))), "{flags} {len} {next}");
    }
    let (mut driver, mut queue, _) = driver();
    driver.claim(17);
    assert!(matches!(queue.pop(), Err(QueueError::Avail(_))), "more entries than the ring has");
}

#[test]
fn a_queue_outside_memory_is_refused_and_a_disabled_one_is_empty() {
    let memory = testing::memory(0x10000);
    let interrupt = Interrupt::new().unwrap();
    let kick = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let mut ring = virtio_queue::Queue::new(16).unwrap();
    ring.set_desc_table_address(Some(0xfff0), None);
    assert!(Queue::new(ring, memory.clone(), interrupt.clone(), kick()).unwrap().pop().unwrap().is_none());
    let mut ring = virtio_queue::Queue::new(16).unwrap();
    ring.set_desc_table_address(Some(0xfff0), None);
    ring.set_ready(true);
    assert!(matches!(Queue::new(ring, memory, interrupt, kick()), Err(QueueError::Layout)));
}

#[test]
fn nobody_is_served_for_ever() {
    let (mut driver, mut queue, _) = driver();
    driver.send(&[b"first"], &[]);
    let mut served = 0;
    // A driver that makes another chain available whenever one is taken.
    queue
        .drain(|_| {
            served += 1;
            driver.send(&[b"more"], &[]);
            Ok::<_, QueueError>(Served::Done)
        })
        .unwrap();
    assert_eq!(served, 16, "as many as the ring holds");
    assert_eq!(queue.kick.read().unwrap(), 1, "and it comes again");
    let enough = |_: &mut Chain| Ok::<_, QueueError>(Served::Enough);
    queue.drain(enough).unwrap();
    assert_eq!((queue.kick.read().unwrap(), queue.pop().unwrap().is_none()), (1, true));
    queue.drain(enough).unwrap();
    assert!(queue.kick.read().is_err(), "not while there is nothing to do");
}

#[test]
fn interrupts_when_the_driver_wants_them() {
    // Flags: bit 0 says "none, please". The event index, where it counts: "once this one is used".
    for (event_idx, flags, event, interrupted) in [
        (false, 0, 0, true),
        (false, 1, 0, false),
        (true, 1, 0, true),
        (true, 0, 2, true),
        (true, 0, 3, false),
        (true, 0, 0xffff, false),
    ] {
        let (mut driver, mut queue, interrupt) = driver();
        queue.ring.set_event_idx(event_idx);
        let (_, avail, used) = driver.rings();
        driver.memory.write_obj::<u16>(flags, GuestAddress(avail)).unwrap();
        driver.memory.write_obj::<u16>(event, GuestAddress(avail + 4 + 2 * 16)).unwrap();
        (0..3).for_each(|_| drop(driver.send(&[], &[4])));
        queue.notify().unwrap();
        assert!(interrupt.line().read().is_err(), "nothing was used");
        let mut chains: Vec<_> = std::iter::from_fn(|| queue.pop().unwrap()).collect();
        chains[1].writer.write_all(b"abc").unwrap();
        queue.push_together(chains.into_iter()).unwrap();
        assert_eq!(driver.memory.read_obj::<u16>(GuestAddress(used + 2)).unwrap(), 3);
        assert_eq!(
            [driver.receive(), driver.receive(), driver.receive()],
            [Some((0, 0)), Some((1, 3)), Some((2, 0))]
        );
        queue.notify().unwrap();
        assert_eq!(interrupt.line().read().is_ok(), interrupted, "{event_idx} {flags} {event}");
    }
}

#[test]
fn a_chain_has_so_many_buffers_and_no_more() {
    for (count, accepted) in [(1024u16, true), (1025, false)] {
        let (mut driver, mut queue, _) = driver();
        let table = driver.buffer(16 * 1025);
        let entries = Driver::new(driver.memory.clone(), table, 16);
        for i in 0..count {
            entries.descriptor(i, 0x8000, 1, if i + 1 < count { NEXT } else { 0 }, i + 1);
        }
        driver.descriptor(0, table, 16 * u32::from(count), INDIRECT, 0);
        driver.publish(0);
        assert_eq!(queue.pop().is_ok(), accepted, "{count}");
    }
}

proptest! {
    /// Whatever a guest writes into its rings: an error or chains within memory, never a panic, never without end.
    #[test]
    fn any_ring_ends(
        descriptors in prop::collection::vec((0u64..0x12_0000, any::<u32>(), 0u16..8, 0u16..20), 16),
        heads in prop::collection::vec(0u16..20, 0..16),
        index in any::<u16>(),
    ) {
        let (mut driver, mut queue, _) = driver();
        for (i, (address, len, flags, next)) in (0u16..).zip(descriptors) {
            driver.descriptor(i, address, len % 0x2000, flags, next);
        }
        for head in heads {
            driver.publish(head);
        }
        if index % 4 == 0 {
            driver.claim(index);
        }
        let mut served = 0;
        let _ = queue.drain(|chain| {
            served += 1;
            let mut data = vec![0; chain.reader.remaining()];
            chain.reader.read_exact(&mut data).unwrap();
            // What the guest reads back may be its own rings: then it only harms itself.
            chain.writer.write_with(usize::MAX, |slices| Ok(slices.iter().map(|s| s.len()).sum())).unwrap();
            Ok::<_, QueueError>(if served < 1000 { Served::Done } else { Served::Later })
        });
        prop_assert!(served <= 1000);
    }
}
