use super::status::*;
use super::*;
use crate::virtio::DeviceKind;

fn profile() -> Profile {
    Profile { kind: DeviceKind::Rng, features: 1 << 5, queue_sizes: vec![256, 100, 0], config: vec![] }
}

fn agreed(features: u64) -> Negotiation {
    let mut n = Negotiation::new(&profile());
    assert_eq!(n.write_status(ACKNOWLEDGE), Effect::None);
    assert_eq!(n.write_status(ACKNOWLEDGE | DRIVER), Effect::None);
    for page in [0, 1] {
        n.select_accepted(page);
        n.accept_features(super::page(features, page));
    }
    assert_eq!(n.write_status(ACKNOWLEDGE | DRIVER | FEATURES_OK), Effect::None);
    n
}

#[test]
fn the_proper_way_activates() {
    let mut n = agreed(feature::VERSION_1 | 1 << 5);
    assert_eq!(n.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK);
    assert_eq!(n.features(), feature::VERSION_1 | 1 << 5);
    assert_eq!(n.write_status(n.status() | DRIVER_OK), Effect::Activate);
    assert_eq!(n.take_rings().len(), 3);
    assert_eq!(n.queue_max_size(), 0, "the rings have left");
    assert_eq!(n.write_status(0), Effect::Reset);
    n.reset(&profile());
    assert_eq!((n.status(), n.queue_max_size()), (0, 256));
}

#[test]
fn features_that_were_not_offered_or_lack_version_1_are_not_ok() {
    for features in [0, 1 << 5, feature::VERSION_1 | 1 << 6, feature::VERSION_1 | 1 << 40] {
        let n = agreed(features);
        assert_eq!(n.status() & FEATURES_OK, 0, "{features:#x}");
    }
}

#[test]
fn steps_out_of_order_are_ignored() {
    let mut n = Negotiation::new(&profile());
    for value in [DRIVER, DRIVER_OK, ACKNOWLEDGE | DRIVER, 0xf, !FAILED] {
        assert_eq!(n.write_status(value), Effect::None);
        assert_eq!(n.status(), 0, "{value:#x}");
    }
    let mut n = agreed(feature::VERSION_1);
    n.accept_features(1);
    assert_eq!(n.features(), feature::VERSION_1, "too late");
    assert_eq!(n.write_status(FAILED), Effect::None);
    assert_eq!(n.write_status(n.status() | DRIVER_OK), Effect::None, "after FAILED only a reset helps");
    assert_eq!(n.write_status(0), Effect::Reset);
}

#[test]
fn queues_are_set_up_while_they_are_disabled() {
    let mut n = Negotiation::new(&profile());
    assert_eq!(n.queue_max_size(), 256);
    n.select_queue(1);
    assert_eq!(n.queue_max_size(), 64, "100 is no power of two");
    n.select_queue(2);
    assert_eq!(n.queue_max_size(), 1);
    n.select_queue(3);
    assert_eq!(n.queue_max_size(), 0);
    n.set_queue_ready(true);
    assert!(!n.queue_ready());
    n.select_queue(0);
    n.set_queue_size(128);
    n.set_ring_address(RingPart::Descriptors, Some(0x1000), Some(1));
    n.set_queue_ready(true);
    assert!(n.queue_ready());
    n.set_queue_size(64);
    n.set_ring_address(RingPart::Descriptors, Some(0x2000), None);
    let rings = n.take_rings();
    assert_eq!((rings[0].size(), rings[0].desc_table()), (128, 0x1_0000_1000));
}
