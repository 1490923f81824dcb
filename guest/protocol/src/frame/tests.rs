use std::io::Cursor;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::{
    Begin, ByteString, Disk, ExitStatus, FailReason, FromAgent, Identity, Ipv4Cidr, Network, Root, Seed,
    Start, StreamKind, ToAgent, Token, WindowSize,
};

fn bytes() -> impl Strategy<Value = ByteString> {
    vec(any::<u8>(), 0..40).prop_map(ByteString)
}

fn size() -> impl Strategy<Value = WindowSize> {
    any::<(u16, u16)>().prop_map(|(rows, columns)| WindowSize { rows, columns })
}

fn network() -> impl Strategy<Value = Network> {
    let mac = any::<Option<[u8; 6]>>();
    (".{0,15}", mac, any::<Option<[u8; 4]>>(), any::<u8>(), any::<Option<[u8; 4]>>()).prop_map(
        |(interface, mac, address, prefix, gateway)| Network {
            interface,
            mac,
            address: address.map(|address| Ipv4Cidr { address: address.into(), prefix }),
            gateway: gateway.map(Into::into),
        },
    )
}

fn begin() -> impl Strategy<Value = Begin> {
    (any::<u64>(), any::<[u8; 32]>(), any::<[u8; 16]>(), "vd[a-z]", ".{0,9}").prop_map(
        |(clock, seed, machine_id, device, file_system)| Begin {
            clock,
            seed: Seed(seed),
            machine_id,
            root: Root { device, file_system },
        },
    )
}

fn identity() -> impl Strategy<Value = Identity> {
    let name = proptest::option::of(".{0,9}");
    (any::<u64>(), any::<[u8; 32]>(), name, any::<[u8; 16]>(), proptest::option::of(network())).prop_map(
        |(clock, seed, hostname, machine_id, network)| Identity {
            clock,
            seed: Seed(seed),
            hostname,
            machine_id,
            network,
        },
    )
}

fn disk() -> impl Strategy<Value = Disk> {
    ("vd[a-z]", "vd[a-z]", any::<bool>()).prop_map(|(name, device, spare)| Disk { name, device, spare })
}

fn start() -> impl Strategy<Value = Start> {
    let words = || vec(bytes(), 0..6);
    let names = (".{0,9}", ".{0,9}", vec(disk(), 0..4));
    let rest = (proptest::option::of(size()), proptest::option::of(network()), any::<[bool; 2]>());
    (any::<[u8; 16]>(), words(), words(), bytes(), names, rest).prop_map(
        |(token, args, env, cwd, (user, hostname, disks), (terminal, network, [stdin, vsock]))| Start {
            token: Token(token),
            args,
            env,
            cwd,
            user,
            hostname,
            terminal,
            stdin,
            disks,
            network,
            vsock,
        },
    )
}

fn to_agent() -> impl Strategy<Value = ToAgent> {
    prop_oneof![
        begin().prop_map(|begin| ToAgent::Begin(Box::new(begin))),
        start().prop_map(|start| ToAgent::Start(Box::new(start))),
        identity().prop_map(|identity| ToAgent::Restored(Box::new(identity))),
        Just(ToAgent::Freeze),
        Just(ToAgent::Thaw),
        any::<i32>().prop_map(ToAgent::Signal),
        size().prop_map(ToAgent::Resize),
        Just(ToAgent::Shutdown),
    ]
}

fn from_agent() -> impl Strategy<Value = FromAgent> {
    let reason = prop_oneof![
        Just(FailReason::NotFound),
        Just(FailReason::NotExecutable),
        Just(FailReason::RootFs),
        Just(FailReason::Setup)
    ];
    let kind = prop_oneof![
        Just(StreamKind::Stdin),
        Just(StreamKind::Stdout),
        Just(StreamKind::Stderr),
        Just(StreamKind::Terminal)
    ];
    prop_oneof![
        any::<u32>().prop_map(|version| FromAgent::Hello { version }),
        proptest::option::of(bytes()).prop_map(|config| FromAgent::Image { config }),
        Just(FromAgent::Frozen),
        vec((kind, any::<u32>()), 0..5).prop_map(|streams| FromAgent::Restored { streams }),
        any::<u32>().prop_map(|pid| FromAgent::Started { pid }),
        (reason, ".{0,30}").prop_map(|(reason, message)| FromAgent::Failed { reason, message }),
        any::<u8>().prop_map(|code| FromAgent::Exited(ExitStatus::Code(code))),
        any::<u8>().prop_map(|signal| FromAgent::Exited(ExitStatus::Signal(signal))),
    ]
}

/// Feeds `bytes` to a decoder in pieces of the sizes in `cuts`, over and over.
fn decode_in_pieces<M: DeserializeOwned>(
    bytes: &[u8],
    cuts: &[usize],
) -> Result<(Vec<M>, FrameDecoder), ProtocolError> {
    let mut decoder = FrameDecoder::new();
    let mut messages = Vec::new();
    let mut rest = bytes;
    for cut in cuts.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let (piece, tail) = rest.split_at((*cut).clamp(1, rest.len()));
        rest = tail;
        decoder.push(piece);
        while let Some(message) = decoder.next_message()? {
            messages.push(message);
        }
    }
    Ok((messages, decoder))
}

proptest! {
    #[test]
    fn messages_round_trip_split_anywhere(sent in vec(to_agent(), 0..5), cuts in vec(1usize..50, 1..9)) {
        let mut wire = Vec::new();
        for message in &sent {
            write_message(&mut wire, message).unwrap();
        }
        let (received, decoder) = decode_in_pieces::<ToAgent>(&wire, &cuts).unwrap();
        prop_assert_eq!(&received, &sent);
        prop_assert!(decoder.finish().is_ok());

        let mut reader = Cursor::new(wire);
        for message in &sent {
            prop_assert_eq!(&read_message::<ToAgent>(&mut reader).unwrap().unwrap(), message);
        }
        prop_assert!(read_message::<ToAgent>(&mut reader).unwrap().is_none());
    }

    #[test]
    fn the_agents_messages_round_trip(sent in from_agent()) {
        let wire = encode(&sent).unwrap();
        prop_assert_eq!(read_message::<FromAgent>(&mut wire.as_slice()).unwrap(), Some(sent));
    }

    #[test]
    fn a_cut_frame_is_an_error(sent in to_agent(), at in any::<prop::sample::Index>()) {
        let mut wire = encode(&sent).unwrap();
        wire.truncate(at.index(wire.len()));
        let read = read_message::<ToAgent>(&mut wire.as_slice());
        let (messages, decoder) = decode_in_pieces::<ToAgent>(&wire, &[7]).unwrap();
        prop_assert!(messages.is_empty());
        if wire.is_empty() {
            prop_assert!(matches!(read, Ok(None)) && decoder.finish().is_ok());
        } else {
            prop_assert!(matches!(read, Err(ProtocolError::Truncated)));
            prop_assert!(matches!(decoder.finish(), Err(ProtocolError::Truncated)));
        }
    }

    #[test]
    fn any_bytes_are_a_message_or_an_error(wire in vec(any::<u8>(), 0..200), cuts in vec(1usize..50, 1..9)) {
        let _ = read_message::<FromAgent>(&mut wire.as_slice());
        let _ = decode_in_pieces::<FromAgent>(&wire, &cuts);
    }

    // A length that fits, so that what is behind it is looked at.
    #[test]
    fn any_frame_is_a_message_or_an_error(payload in vec(any::<u8>(), 0..200)) {
        let mut wire = (payload.len() as u32).to_le_bytes().to_vec();
        wire.extend(&payload);
        let whole = read_message::<FromAgent>(&mut wire.as_slice());
        let pieces = decode_in_pieces::<FromAgent>(&wire, &[3]);
        match (whole, pieces) {
            (Ok(one), Ok((many, _))) => prop_assert_eq!(one.into_iter().collect::<Vec<_>>(), many),
            (Err(_), Err(_)) => (),
            (whole, pieces) => prop_assert!(false, "{:?} {:?}", whole, pieces),
        }
    }
}

#[test]
fn lengths_are_bounded() {
    let mut wire = ((MAX_FRAME + 1) as u32).to_le_bytes().to_vec();
    assert!(matches!(read_message::<ToAgent>(&mut wire.as_slice()), Err(ProtocolError::TooLong(_))));
    let mut decoder = FrameDecoder::new();
    decoder.push(&wire);
    assert!(matches!(decoder.next_message::<ToAgent>(), Err(ProtocolError::TooLong(_))));
    wire = u32::MAX.to_le_bytes().to_vec();
    assert!(matches!(read_message::<ToAgent>(&mut wire.as_slice()), Err(ProtocolError::TooLong(_))));
    let long =
        ToAgent::Start(Box::new(Start { args: vec![ByteString(vec![0; MAX_FRAME])], ..Start::default() }));
    assert!(matches!(encode(&long), Err(ProtocolError::TooLong(_))));
}

#[test]
fn a_frame_holds_one_message() {
    let mut wire = encode(&ToAgent::Shutdown).unwrap();
    wire.push(0);
    wire[0] += 1;
    assert!(matches!(read_message::<ToAgent>(&mut wire.as_slice()), Err(ProtocolError::Trailing(1))));
}

// Byte for byte, so that a change of the wire format cannot go unnoticed: it needs a new PROTOCOL_VERSION.
#[test]
fn the_wire_format() {
    // The one that must be understood by every version there will be, to be refused.
    assert_eq!(encode(&FromAgent::Hello { version: 2 }).unwrap(), [2, 0, 0, 0, 0, 2]);
    let image = FromAgent::Image { config: Some(ByteString::from("{}")) };
    assert_eq!(encode(&image).unwrap(), [5, 0, 0, 0, 1, 1, 2, b'{', b'}']);
    assert_eq!(encode(&ToAgent::Signal(15)).unwrap(), [2, 0, 0, 0, 2, 30]);
    assert_eq!(encode(&FromAgent::Exited(ExitStatus::Signal(9))).unwrap(), [3, 0, 0, 0, 4, 1, 9]);
    let restored = FromAgent::Restored { streams: vec![(StreamKind::Stderr, 5)] };
    assert_eq!(encode(&restored).unwrap(), [4, 0, 0, 0, 6, 1, 2, 5]);
}
