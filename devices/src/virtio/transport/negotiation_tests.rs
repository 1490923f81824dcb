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

#[test]
fn every_state_goes_on_after_it_was_saved() {
    let steps = [
        (ACKNOWLEDGE, 0),
        (ACKNOWLEDGE | DRIVER, 0),
        (ACKNOWLEDGE | DRIVER | FEATURES_OK, feature::VERSION_1 | feature::RING_EVENT_IDX),
        (ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK, 0),
    ];
    for count in 0..=steps.len() {
        for last in [0, FAILED] {
            let mut n = Negotiation::new(&profile());
            n.select_queue(1);
            n.set_queue_size(32);
            n.set_ring_address(RingPart::Device, Some(0x1000), Some(7));
            n.set_queue_ready(true);
            let mut live = None;
            for &(status, features) in &steps[..count] {
                for page in [0, 1] {
                    n.select_accepted(page);
                    n.accept_features(super::page(features, page));
                }
                if n.write_status(status) == Effect::Activate {
                    live = Some(n.take_rings());
                }
            }
            if last == FAILED {
                assert_eq!(n.write_status(FAILED), Effect::None);
            }
            let state = n.save(live.iter().flatten());
            let (restored, rings) = Negotiation::restore(&profile(), &state, false).unwrap();
            assert_eq!(rings, live);
            assert_eq!(restored.save(rings.iter().flatten()), state);
            assert_eq!(
                (restored.status(), restored.features(), restored.queue_max_size(), restored.queue_ready()),
                (n.status(), n.features(), n.queue_max_size(), n.queue_ready())
            );
            if count == 4 {
                let lost = NegotiationState { queues: vec![], ..state };
                assert!(Negotiation::restore(&profile(), &lost, false).is_err(), "a live device has queues");
                assert!(matches!(Negotiation::restore(&profile(), &lost, true), Ok((_, None))));
            }
        }
    }
}

#[test]
fn what_no_driver_can_have_done_is_refused() {
    use RestoreError::*;
    let mut n = agreed(feature::VERSION_1);
    assert_eq!(n.write_status(n.status() | DRIVER_OK), Effect::Activate);
    let mut rings = n.take_rings();
    rings[0].set_ready(true);
    rings[0].set_next_avail(9);
    rings[0].set_next_used(9);
    let state = n.save(rings.iter());
    let restore = |state: &NegotiationState| Negotiation::restore(&profile(), state, false).err();
    assert!(restore(&state).is_none());
    let with = |change: &dyn Fn(&mut NegotiationState)| {
        let mut changed = state.clone();
        change(&mut changed);
        restore(&changed).unwrap()
    };
    assert!(matches!(with(&|s| s.offered |= 1 << 9), Offered { .. }));
    assert_eq!(
        with(&|s| s.offered ^= 0x60).to_string(),
        "the saved device has features 0x130000040, this one 0x130000020: 0x60 differ"
    );
    assert!(matches!(with(&|s| s.accepted = 1 << 5), Accepted(0x20)));
    assert!(matches!(with(&|s| s.accepted |= 1 << 50), Accepted(_)));
    for status in [2, 4, 7, 9, 13, 64, 15 | 64, 16, 1 << 31] {
        assert!(matches!(with(&|s| s.status = status), Status(_)), "{status:#x}");
    }
    assert!(matches!(with(&|s| s.queues.truncate(2)), QueueCount { saved: 2, here: 3 }));
    assert!(matches!(with(&|s| s.queues.clear()), QueueCount { saved: 0, here: 3 }));
    let broken: [&dyn Fn(&mut QueueState); 9] = [
        &|q| q.max_size = 512,
        &|q| q.size = 512,
        &|q| q.size = 0,
        &|q| q.size = 100,
        &|q| q.descriptors = 8,
        &|q| q.driver = 1,
        &|q| q.device = 2,
        &|q| q.next_used = 8,
        &|q| q.ready = false,
    ];
    for (case, change) in broken.iter().enumerate() {
        assert!(matches!(with(&|s| change(&mut s.queues[0])), Queue { index: 0, .. }), "{case}");
    }
    assert!(matches!(with(&|s| s.status = 11), Queue { index: 0, .. }), "not live, so nothing was used");
    let early = NegotiationState { status: 11, ..state };
    assert!(matches!(Negotiation::restore(&profile(), &early, true), Err(Failed)));
}
