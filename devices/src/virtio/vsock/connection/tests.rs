use proptest::prelude::*;

use super::*;

const CID: u64 = 3;
const PORTS: Ports = Ports { guest: 5, host: 9 };

fn packet(op: Op, len: u32, flags: u32, buf_alloc: u32, fwd_cnt: u32) -> Header {
    Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: PORTS.guest,
        dst_port: PORTS.host,
        len,
        kind: STREAM,
        op,
        flags,
        buf_alloc,
        fwd_cnt,
    }
}

fn plain(op: Op) -> Header {
    packet(op, 0, 0, 1000, 0)
}

/// Open, and announced to both sides.
fn open() -> Connection {
    let mut new = Connection::from_guest(&plain(Op::Request));
    assert_eq!(new.next_packet(), Some(Outgoing::Response));
    assert_eq!(new.sending(Outgoing::Response).op, Op::Response);
    new
}

fn actions(connection: &mut Connection) -> Vec<Action> {
    std::iter::from_fn(|| connection.next_action()).collect()
}

const GONE: [Action; 2] = [Action::Forget { reset: false }, Action::Close];
const REFUSED: [Action; 2] = [Action::Forget { reset: true }, Action::Close];

#[test]
fn what_each_packet_does_to_an_open_connection() {
    let cases: [(Header, &[Action]); 11] = [
        (plain(Op::Request), &REFUSED),
        (plain(Op::Response), &[]),
        (plain(Op::Reset), &GONE),
        (plain(Op::CreditUpdate), &[]),
        (plain(Op::CreditRequest), &[]),
        (plain(Op::Unknown(99)), &[]),
        (packet(Op::Shutdown, 0, 0, 0, 0), &[]),
        (packet(Op::Shutdown, 0, shutdown::RECEIVE, 0, 0), &[Action::ShutRead]),
        (packet(Op::Shutdown, 0, shutdown::SEND | 1 << 31, 0, 0), &[Action::ShutWrite]),
        (packet(Op::Shutdown, 0, shutdown::BOTH, 0, 0), &REFUSED),
        (packet(Op::Data, BUF_ALLOC + 1, 0, 0, 0), &REFUSED),
    ];
    for (header, expected) in cases {
        let mut connection = open();
        assert_eq!(connection.packet(&header), Payload::None, "{header:?}");
        assert_eq!(actions(&mut connection), expected, "{header:?}");
    }
}

#[test]
fn what_each_packet_does_to_a_request() {
    for (op, expected) in [
        (Op::Response, &[Action::Announce][..]),
        (Op::Reset, &GONE),
        (Op::Data, &REFUSED),
        (Op::Request, &REFUSED),
        (Op::Shutdown, &REFUSED),
        (Op::Unknown(0), &REFUSED),
    ] {
        let mut connection = Connection::from_host(CID, PORTS);
        let request = connection.sending(connection.next_packet().unwrap());
        assert_eq!((request.op, request.src_cid, request.dst_cid), (Op::Request, HOST_CID, CID));
        assert_eq!((request.src_port, request.dst_port), (PORTS.host, PORTS.guest));
        assert_eq!(connection.next_packet(), None);
        assert!(connection.patience().is_some() && connection.interest().hangup);
        let _ = connection.packet(&plain(op));
        assert_eq!(actions(&mut connection), expected, "{op:?}");
        assert_eq!(connection.patience(), None);
    }
    // A guest that answers before it was asked.
    let mut connection = Connection::from_host(CID, PORTS);
    let _ = connection.packet(&plain(Op::Response));
    assert_eq!(actions(&mut connection), REFUSED);
    // One who asks and leaves, before and after the guest has heard.
    let mut connection = Connection::from_host(CID, PORTS);
    connection.hung_up();
    assert_eq!(actions(&mut connection), GONE);
    let mut connection = Connection::from_host(CID, PORTS);
    connection.sending(Outgoing::Request);
    connection.timed_out();
    assert_eq!(actions(&mut connection), REFUSED);
}

#[test]
fn what_is_buffered_is_taken_before_the_end() {
    let ends: [(Header, &[Action], &[Action]); 3] = [
        (packet(Op::Shutdown, 0, shutdown::SEND, 0, 0), &[], &[Action::ShutWrite]),
        (packet(Op::Shutdown, 0, shutdown::BOTH, 0, 0), &[Action::ShutRead], &REFUSED),
        (plain(Op::Reset), &GONE[..1], &GONE[1..]),
    ];
    for (end, at_once, when_taken) in ends {
        let mut connection = open();
        assert_eq!(connection.packet(&packet(Op::Data, 10, 0, 0, 0)), Payload::Take);
        let _ = connection.packet(&end);
        assert_eq!(actions(&mut connection), at_once, "{end:?}");
        assert!(connection.interest().writable);
        connection.forwarded(9);
        assert_eq!(actions(&mut connection), []);
        connection.forwarded(1);
        assert_eq!(actions(&mut connection), when_taken, "{end:?}");
        assert!(!connection.interest().writable);
    }
}

#[test]
fn the_guest_is_told_of_room_when_it_needs_to_know() {
    let mut connection = open();
    let quarter = BUF_ALLOC / 4;
    let push = |connection: &mut Connection, len| {
        assert_eq!(connection.packet(&packet(Op::Data, len, 0, 0, 0)), Payload::Take);
    };
    push(&mut connection, 2 * quarter);
    connection.forwarded(2 * quarter);
    assert_eq!(connection.next_packet(), None, "half is left");
    push(&mut connection, 1);
    assert_eq!(connection.next_packet(), Some(Outgoing::CreditUpdate));
    let update = connection.sending(Outgoing::CreditUpdate);
    assert_eq!((update.op, update.buf_alloc, update.fwd_cnt), (Op::CreditUpdate, BUF_ALLOC, 2 * quarter));
    push(&mut connection, BUF_ALLOC - 1);
    connection.forwarded(quarter - 1);
    assert_eq!(connection.next_packet(), None, "nothing worth a packet");
    connection.forwarded(1);
    assert_eq!(connection.next_packet(), Some(Outgoing::CreditUpdate));
    // Data tells it as well.
    let _ = connection.packet(&plain(Op::CreditUpdate));
    connection.readable();
    assert_eq!(connection.next_packet(), Some(Outgoing::Data(1000)));
    assert_eq!(connection.sending(Outgoing::Data(1)).fwd_cnt, 3 * quarter);
    connection.would_block();
    assert_eq!(connection.next_packet(), None);
    let _ = connection.packet(&plain(Op::CreditRequest));
    assert_eq!(connection.next_packet(), Some(Outgoing::CreditUpdate));
}

#[test]
fn the_host_waits_for_the_guests_room() {
    let mut connection = open();
    connection.readable();
    assert_eq!(connection.next_packet(), Some(Outgoing::Data(1000)));
    connection.sending(Outgoing::Data(1000));
    assert_eq!(connection.next_packet(), None);
    assert_eq!(connection.interest(), Interest::default(), "a hang-up would wake without end");
    let _ = connection.packet(&packet(Op::CreditUpdate, 0, 0, 1000, 600));
    assert_eq!(connection.next_packet(), Some(Outgoing::Data(600)));
    // It takes room back that it has given, or has consumed what it never got.
    for (alloc, forwarded) in [(100, 600), (1000, 1001), (0, 0)] {
        let _ = connection.packet(&packet(Op::CreditUpdate, 0, 0, alloc, forwarded));
        assert_eq!(connection.next_packet(), None, "{alloc} {forwarded}");
    }
}

#[test]
fn the_host_closes() {
    let mut connection = open();
    connection.readable();
    connection.end_of_file();
    assert_eq!(connection.next_packet(), Some(Outgoing::Shutdown));
    assert_eq!(connection.sending(Outgoing::Shutdown).flags, shutdown::SEND);
    assert!(connection.interest().hangup);
    assert_eq!(connection.patience(), None, "the guest may go on for ever");
    connection.hung_up();
    assert_eq!(connection.sending(connection.next_packet().unwrap()).flags, shutdown::BOTH);
    assert_eq!(connection.next_packet(), None);
    assert_eq!(connection.packet(&packet(Op::Data, 10, 0, 0, 0)), Payload::Discard);
    assert_eq!(connection.buffered(), 0);
    assert!(connection.patience().is_some());
    connection.timed_out();
    assert_eq!(actions(&mut connection), REFUSED);
    connection.timed_out();
    assert_eq!(actions(&mut connection), []);
}

#[derive(Debug, Clone)]
enum Step {
    Packet { op: u16, len: u32, flags: u32, alloc: u32, forwarded: u32 },
    Take(u32),
    Readable,
    WouldBlock,
    EndOfFile,
    WriteClosed,
    HungUp,
    TimedOut,
    Reset,
    Send(u32),
}

fn step() -> impl Strategy<Value = Step> {
    let edge = prop_oneof![0..4096u32, Just(BUF_ALLOC), Just(u32::MAX), any::<u32>()];
    let len = prop_oneof![0..100_000u32, any::<u32>()];
    prop_oneof![
        6 => (0..9u16, len, 0..8u32, edge.clone(), edge)
            .prop_map(|(op, len, flags, alloc, forwarded)| Step::Packet { op, len, flags, alloc, forwarded }),
        6 => (5..6u16, 0..100_000u32, 0..1u32, 0..100_000u32, 0..1u32)
            .prop_map(|(op, len, flags, alloc, forwarded)| Step::Packet { op, len, flags, alloc, forwarded }),
        6 => any::<u32>().prop_map(Step::Take),
        4 => Just(Step::Readable),
        6 => any::<u32>().prop_map(Step::Send),
        1 => Just(Step::WouldBlock),
        1 => Just(Step::EndOfFile),
        1 => Just(Step::WriteClosed),
        1 => Just(Step::HungUp),
        1 => Just(Step::TimedOut),
        1 => Just(Step::Reset),
    ]
}

proptest! {
    /// Whatever a guest and a host do: no panic, no more buffered than was promised, no more sent than there is room for,
    /// and an end that is final.
    #[test]
    fn any_course_keeps_its_promises(asked_by_host: bool, steps in prop::collection::vec(step(), 0..200)) {
        let mut connection = match asked_by_host {
            true => Connection::from_host(CID, PORTS),
            false => Connection::from_guest(&plain(Op::Request)),
        };
        let (mut sent, mut over, mut forgotten, mut announced) = (0u32, false, false, !asked_by_host);
        let (mut alloc, mut consumed) = if asked_by_host { (0, 0) } else { (1000, 0) };
        for step in steps {
            match step {
                Step::Packet { op, len, flags, alloc: a, forwarded } => {
                    (alloc, consumed) = (a, forwarded);
                    let before = connection.buffered();
                    match connection.packet(&packet(op.into(), len, flags, a, forwarded)) {
                        Payload::Take => prop_assert_eq!(connection.buffered(), before + len),
                        Payload::None | Payload::Discard => prop_assert!(connection.buffered() <= before),
                    }
                }
                Step::Take(count) => connection.forwarded(count),
                Step::Readable => connection.readable(),
                Step::WouldBlock => connection.would_block(),
                Step::EndOfFile => connection.end_of_file(),
                Step::WriteClosed => connection.write_closed(),
                Step::HungUp => connection.hung_up(),
                Step::TimedOut => connection.timed_out(),
                Step::Reset => connection.transport_reset(),
                Step::Send(count) => if let Some(mut out) = connection.next_packet() {
                    prop_assert!(!forgotten, "the guest does not know this connection any more");
                    if let Outgoing::Data(room) = out {
                        prop_assert!(announced && room > 0 && room <= MAX_PAYLOAD);
                        prop_assert!(u64::from(sent.wrapping_sub(consumed)) + u64::from(room) <= u64::from(alloc));
                        let count = 1 + count % room;
                        out = Outgoing::Data(count);
                        sent = sent.wrapping_add(count);
                    }
                    let header = connection.sending(out);
                    prop_assert_eq!((header.dst_port, header.buf_alloc), (PORTS.guest, BUF_ALLOC));
                }
            }
            prop_assert!(connection.buffered() <= BUF_ALLOC);
            let mut asked = 0;
            while let Some(action) = connection.next_action() {
                asked += 1;
                prop_assert!(!over && asked < 5, "{:?}", action);
                match action {
                    Action::Announce => prop_assert!(!std::mem::replace(&mut announced, true)),
                    Action::Forget { .. } => prop_assert!(!std::mem::replace(&mut forgotten, true)),
                    Action::Close => {
                        over = true;
                        prop_assert!(forgotten && connection.buffered() == 0);
                    }
                    Action::ShutWrite => prop_assert_eq!(connection.buffered(), 0),
                    Action::ShutRead => {}
                }
            }
            if over {
                prop_assert_eq!((connection.next_packet(), connection.interest()), (None, Interest::default()));
            }
        }
    }
}
