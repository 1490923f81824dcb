use super::*;
use crate::bus::BusDevice;
use crate::testing::Guest;
use crate::virtio::Rng;
use crate::virtio::device::DeviceState;

fn guest() -> Guest {
    Guest::new(Box::new(Rng::new()))
}

#[test]
fn an_unacknowledged_interrupt_comes_again() {
    let mut before = Guest::start(Box::new(Rng::new()), 0);
    before.drivers[0].send(&[], &[32]);
    before.kick(0);
    while before.drivers[0].receive().is_none() {
        std::thread::yield_now();
    }
    let after = before.restored_on(Box::new(Rng::new()));
    assert_eq!(after.get(0x60), USED_BUFFER);
    after.wait();
    assert_eq!(after.get(0x60), 0);
}

#[test]
fn a_pause_loses_nothing() {
    let mut guest = Guest::start(Box::new(Rng::new()), 0);
    let held = guest.transport.quiesce().unwrap();
    assert!(held.is_live());
    let (head, _) = guest.drivers[0].send(&[], &[32]);
    guest.kick(0);
    let state = guest.transport.save(&held).unwrap();
    assert!(guest.transport.quiesce().is_err(), "the queues are taken");
    assert_eq!(guest.drivers[0].receive(), None, "a paused device answers nobody");
    guest.transport.resume(held).unwrap();
    assert_eq!(guest.receive(0), (head.into(), 32));
    assert!(matches!(guest.transport.restore(state), Err(RestoreError::NotFresh)));
}

#[test]
fn state_that_cannot_be_is_refused() {
    let before = Guest::start(Box::new(Rng::new()), 0);
    let state = before.saved();
    type Change = fn(&mut TransportState);
    let changes: [(Change, &str); 8] = [
        (
            |s| s.kind = crate::virtio::DeviceKind::Block,
            "the saved device is a block device, this one a rng device",
        ),
        (|s| s.interrupt_status = 4, "interrupt status 0x4 has bits that do not exist"),
        (|s| s.failed = true, "the saved device has 1 queues, this one 0"),
        (|s| s.negotiation.queues[0].descriptors = 1 << 40, "queue 0: queue rings are outside guest memory"),
        (|s| s.negotiation.queues[0].device = u64::MAX - 3, "queue 0: queue rings are outside guest memory"),
        (|s| s.negotiation.queues[0].max_size = 0, "queue 0: it may have 0 entries there and 16 here"),
        (|s| s.negotiation.status = 7, "status 0x7 is not one that a driver can reach"),
        (
            |s| s.device = DeviceState::Net(crate::virtio::net::NetState { mac: [0; 6] }),
            "the saved state does not fit",
        ),
    ];
    for (change, message) in changes {
        let mut changed = state.clone();
        change(&mut changed);
        let error = guest().transport.restore(changed).unwrap_err().to_string();
        assert!(error.starts_with(message), "{error}");
    }
    let other = guest();
    let mut changed = state;
    changed.config =
        crate::virtio::transport::state::ConfigState { bytes: vec![1; 100], generation: u32::MAX };
    let held = other.transport.restore(changed).unwrap();
    other.transport.resume(held).unwrap();
    assert_eq!((other.get(0xfc), other.get(0x60)), (0, CONFIG_CHANGE), "the driver is told of what differs");
    let mut byte = [9];
    other.transport.read(0x100, &mut byte);
    assert_eq!(byte, [0]);
}
