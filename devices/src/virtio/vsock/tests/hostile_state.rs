//! Saved state that somebody has tampered with.

use proptest::prelude::*;

use super::direct::Direct;
use super::*;
use crate::device_loop::Watch;
use crate::virtio::device::{DeviceState, StateError};
use crate::virtio::vsock::credit::Credit;
use crate::virtio::vsock::device::{BUFFER_BUDGET, MAX_CONNECTIONS};
use crate::virtio::vsock::state::{ConnectionState, PhaseState, ResetState, VsockState};

/// A connection with something in each field, of which `buffered` bytes wait for the host.
fn connection(guest_port: u32, buffered: usize) -> ConnectionState {
    let received = u32::try_from(buffered).unwrap().wrapping_sub(5);
    let credit =
        Credit { received, forwarded: 5u32.wrapping_neg(), sent: 9, peer_alloc: 5000, ..Credit::default() };
    ConnectionState {
        guest_port,
        host_port: 1,
        phase: PhaseState::Open,
        guest_shut: 0,
        host_shut: 0,
        told: 0,
        asked: true,
        credit,
        to_host: pattern(buffered),
        to_guest: b"for the guest".to_vec(),
        to_guest_ends: true,
    }
}

fn sample() -> VsockState {
    let asked = ConnectionState { phase: PhaseState::Asked, guest_shut: shutdown::SEND, ..connection(2, 10) };
    let half = ConnectionState {
        host_shut: shutdown::SEND,
        told: shutdown::SEND,
        to_guest: vec![],
        to_guest_ends: false,
        ..connection(3, 20)
    };
    let last = ConnectionState { phase: PhaseState::Flushing, host_shut: 0, told: 0, ..half.clone() };
    let stranger = ConnectionState { host_port: 7, ..connection(4, 3) };
    VsockState {
        cid: CID.into(),
        reset_owed: true,
        next_port: 1 << 30,
        connections: vec![connection(1, 30), asked, half, last, stranger],
        resets: vec![ResetState { guest_port: 9, host_port: 9, kind: 3 }],
    }
}

fn restored(state: VsockState) -> (Result<(), StateError>, Vsock, Listener) {
    let (backend, listener) = listening(1);
    let (mut device, _) = Vsock::new(CID, backend).unwrap();
    (device.restore(DeviceState::Vsock(state)), device, listener)
}

#[test]
fn what_is_sound_is_taken_as_it_is() {
    let (outcome, device, listener) = restored(sample());
    outcome.unwrap();
    for (port, ports) in [(1, "open"), (2, "asked"), (3, "half"), (3, "last")] {
        assert_eq!(listener.accept_from().unwrap().1, port, "{ports}");
    }
    let DeviceState::Vsock(again) = device.save() else { panic!() };
    let mut expected = sample();
    // Nobody listens there any more.
    expected.connections.pop();
    expected.resets.push(ResetState { guest_port: 4, host_port: 7, kind: STREAM });
    assert_eq!(again, expected);
}

#[test]
fn what_is_not_is_refused_in_one_line() {
    let first = |change: fn(&mut ConnectionState)| {
        let mut state = sample();
        change(&mut state.connections[0]);
        state
    };
    let any = |change: fn(&mut VsockState)| {
        let mut state = sample();
        change(&mut state);
        state
    };
    for (state, words) in [
        (any(|s| s.cid = 2), "no guest has the vsock address 2"),
        (any(|s| s.cid = u64::from(u32::MAX)), "no guest has the vsock address 4294967295"),
        (any(|s| s.cid = 1 << 32), "no guest has"),
        (any(|s| s.next_port = 1024), "next vsock port is 1024"),
        (any(|s| s.connections[1].guest_port = 1), "connection 1 to 1: it exists already"),
        (any(|s| s.resets = vec![s.resets[0]; 2000]), "2000 vsock resets, 1151 at most"),
        (
            any(|s| s.connections = (0..1024).map(|port| connection(port, 0)).collect()),
            "1024 vsock connections, 1023 at most",
        ),
        (
            any(|s| s.connections = (0..257).map(|port| connection(port, BUF_ALLOC as usize)).collect()),
            "vsock connections hold 67371008",
        ),
        (first(|c| c.to_guest = vec![0; BUFFER_BUDGET + 1]), "vsock connections hold"),
        (first(|c| c.guest_port = u32::MAX), "a port is reserved"),
        (first(|c| c.host_port = u32::MAX), "a port is reserved"),
        (first(|c| c.credit.received = BUF_ALLOC), "more than it had credit for"),
        (first(|c| c.to_host.truncate(1)), "not as many as counted"),
        (first(|c| c.to_host.push(0)), "not as many as counted"),
        (first(|c| c.guest_shut = 4), "a direction is closed that does not exist"),
        (first(|c| c.told = 1), "told of an end that is none"),
        (first(|c| c.host_shut = shutdown::RECEIVE), "a host that is gone"),
        (first(|c| c.guest_shut = shutdown::RECEIVE), "a guest that does not listen"),
        (first(|c| c.host_shut = shutdown::SEND), "a guest that does not listen"),
        (first(|c| c.phase = PhaseState::Flushing), "a guest that does not listen"),
        (
            first(|c| {
                *c = ConnectionState {
                    phase: PhaseState::Flushing,
                    to_guest: vec![],
                    to_guest_ends: false,
                    ..connection(1, 0)
                }
            }),
            "nothing is left of it",
        ),
    ] {
        let (outcome, _, listener) = restored(state);
        let error = outcome.unwrap_err();
        assert!(matches!(error, StateError::Mismatch(_)), "{error}");
        assert!(error.to_string().contains(words), "{error} instead of {words}");
        assert!(!error.to_string().contains('\n'));
        assert!(listener.accept_timeout(Duration::ZERO).is_err(), "nobody hears of it");
    }
    let (mut device, _) = Vsock::new(CID, Backend::new()).unwrap();
    let error = device.restore(DeviceState::Rng).unwrap_err();
    assert!(error.to_string().contains("not a socket device's"));
}

#[test]
fn as_many_as_a_device_can_have() {
    let connections = (0..u32::try_from(MAX_CONNECTIONS).unwrap()).map(|port| connection(port, 1)).collect();
    let (outcome, mut device, listener) = restored(VsockState { connections, ..sample() });
    match outcome {
        Ok(()) => {
            assert!(device.streams_mut().is_consistent());
            for port in 0..u32::try_from(MAX_CONNECTIONS).unwrap() {
                let (_, from) = listener.accept_from().unwrap();
                assert_eq!(from, port);
            }
        }
        // This process may have no more descriptors.
        Err(error) => assert!(matches!(error, StateError::Host { .. }), "{error}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]
    /// Whatever a file says: refused, or a device that works.
    #[test]
    fn any_bytes(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..4u8), 1..6)) {
        let mut bytes = postcard::to_allocvec(&sample()).unwrap();
        for (at, byte, how) in changes {
            let at = at.index(bytes.len());
            match how {
                0 => bytes[at] = byte,
                1 => bytes[at] ^= 1 << (byte % 8),
                2 => bytes.insert(at, byte),
                _ => drop(bytes.remove(at)),
            }
        }
        let Ok(state) = postcard::from_bytes::<VsockState>(&bytes) else { return Ok(()) };
        let (backend, listener) = listening(1);
        let mut guest = Direct::new(Backend::new());
        let (_, queues) = guest.pause();
        if guest.move_to(CID, backend, state, queues).is_err() {
            return Ok(());
        }
        let hosts: Vec<_> = std::iter::from_fn(|| listener.accept_timeout(Duration::ZERO).ok()).collect();
        for port in 0..5 {
            for op in [Op::CreditRequest, Op::Data, Op::Request] {
                guest.send(&[&header(op, port, 1, 1).to_bytes()[..], b"x"].concat()).unwrap();
                guest.look();
                let _ = guest.receive();
                prop_assert!(guest.device.streams_mut().is_consistent());
            }
        }
        drop(hosts);
        guest.look();
        guest.later();
        while guest.receive().is_some() {}
        prop_assert!(guest.device.streams_mut().is_consistent());
        let (state, _) = guest.pause();
        prop_assert!(restored(state).0.is_ok(), "what a device saves, a device takes");
        guest.device.reset(&mut Watch::default());
        prop_assert!(guest.device.streams_mut().is_consistent());
    }
}
