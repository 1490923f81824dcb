//! Much data, many connections, and ends that lose nothing of it.

use super::*;

/// Both directions of a bulk transfer at once over one connection, with credit kept as Linux keeps it, and something else
/// again and again.
pub fn bulk(
    guest: &mut Guest,
    port: u32,
    host_port: u32,
    out: &[u8],
    mut expected: usize,
    mut meanwhile: impl FnMut(&mut Guest),
) -> Vec<u8> {
    const ROOM: u32 = 256 * 1024;
    let (mut sent, mut credit, mut taken, mut told) = (0, BUF_ALLOC as usize, 0u32, 0u32);
    let mut got = Vec::new();
    let start = Instant::now();
    while sent < out.len() || expected > 0 {
        assert!(start.elapsed() < PATIENCE, "stuck: {sent} sent, {expected} to come, credit to {credit}");
        let mut base = header(Op::Data, port, host_port, 0);
        (base.buf_alloc, base.fwd_cnt) = (ROOM, taken);
        let now = (out.len() - sent).min(TX_BUFFER).min(credit - sent);
        if now > 0 {
            guest.send(Header { len: now.try_into().unwrap(), ..base }, &out[sent..sent + now]);
            sent += now;
            told = taken;
        } else if taken - told > ROOM / 2 {
            guest.send(Header { op: Op::CreditUpdate, ..base }, &[]);
            told = taken;
        }
        while let Some((packet, data)) = guest.poll() {
            assert!(matches!(packet.op, Op::Data | Op::CreditUpdate), "{packet:?}");
            credit = packet.fwd_cnt as usize + packet.buf_alloc as usize;
            taken += u32::try_from(data.len()).unwrap();
            assert!(taken - told <= ROOM, "the device sends more than there is room for");
            expected -= data.len();
            got.extend(data);
        }
        meanwhile(guest);
        std::thread::yield_now();
    }
    got
}

#[test]
fn twenty_megabytes_each_way_past_slow_ends() {
    past_slow_ends(20 << 20, |_| {});
}

#[test]
fn a_pause_loses_nothing() {
    let mut rounds = 0;
    past_slow_ends(4 << 20, |guest| {
        rounds += 1;
        if rounds % 20 == 0 {
            guest.pause();
        }
    });
}

fn past_slow_ends(size: usize, meanwhile: impl FnMut(&mut Guest)) {
    let (backend, listener) = listening(1);
    let mut guest = Guest::new(backend);
    guest.send(Header { buf_alloc: 256 * 1024, ..header(Op::Request, 2, 1, 0) }, &[]);
    guest.expect(Op::Response);
    let mut host = listener.accept().unwrap();
    let data = pattern(size);
    let mut writer = host.try_clone().unwrap();
    let from_host = data.clone();
    let writing = std::thread::spawn(move || writer.write_all(&from_host).unwrap());
    let reading = std::thread::spawn(move || {
        let (mut all, mut some) = (Vec::new(), [0; 10_007]);
        loop {
            let count = host.read(&mut some).unwrap();
            all.extend_from_slice(&some[..count]);
            match count {
                0 => return all,
                _ if all.len() % 64 == 0 => std::thread::sleep(Duration::from_millis(1)),
                _ => {}
            }
        }
    });
    assert!(bulk(&mut guest, 2, 1, &data, data.len(), meanwhile) == data);
    // The guest ends at once, without waiting for anything.
    guest.send(closing(shutdown::BOTH, 2, 1), &[]);
    guest.send(header(Op::Reset, 2, 1, 0), &[]);
    writing.join().unwrap();
    assert!(reading.join().unwrap() == data);
}

#[test]
fn all_that_a_host_wrote_arrives_before_its_end() {
    let (backend, listener) = listening(1);
    let mut guest = Guest::without_buffers(backend);
    guest.send(header(Op::Request, 2, 1, 0), &[]);
    let mut host = listener.accept().unwrap();
    let data = pattern(100_000);
    host.write_all(&data).unwrap();
    drop(host);
    // Only now does the guest have buffers, one after the other.
    guest.post(0);
    guest.expect(Op::Response);
    let mut got = Vec::new();
    loop {
        let (packet, data) = guest.receive();
        got.extend(data);
        match packet.op {
            Op::Data => {}
            Op::Shutdown => break assert_eq!(packet.flags, shutdown::BOTH),
            other => panic!("{other:?}"),
        }
    }
    assert!(got == data);
}

#[test]
fn connections_take_turns() {
    let (backend, listener) = listening(1);
    let mut guest = Guest::new(backend);
    let hosts: Vec<_> = (0..200)
        .map(|port| {
            guest.connect(port, 1);
            listener.accept().unwrap()
        })
        .collect();
    let mut order = Vec::new();
    for (i, mut host) in hosts.iter().enumerate() {
        host.write_all(&vec![u8::try_from(i).unwrap(); 2 * RX_BUFFER]).unwrap();
    }
    let mut got = [0; 200];
    while got.iter().any(|&count| count < 2 * RX_BUFFER) {
        let (packet, data) = guest.receive();
        assert!(data.iter().all(|&byte| u32::from(byte) == packet.dst_port));
        got[packet.dst_port as usize] += data.len();
        order.push(packet.dst_port);
    }
    for (i, mut host) in hosts.iter().enumerate() {
        let port = i.try_into().unwrap();
        guest.send(header(Op::Data, port, 1, 4), &port.to_le_bytes());
        let mut data = [0; 4];
        host.read_exact(&mut data).unwrap();
        assert_eq!(data, port.to_le_bytes());
    }
    drop(hosts);
    for _ in 0..200 {
        assert_eq!(guest.expect(Op::Shutdown).flags, shutdown::BOTH);
    }
}

#[test]
fn a_device_reset_ends_everything_and_loses_nothing() {
    let (backend, listener) = listening(1);
    let mut guest = Guest::new(backend);
    guest.connect(2, 1);
    guest.connect(3, 1);
    let (mut idle, mut busy) = (listener.accept().unwrap(), listener.accept().unwrap());
    // More than the host's socket holds, less than the credit.
    let data = pattern(BUF_ALLOC as usize);
    for chunk in data.chunks(TX_BUFFER) {
        guest.send(header(Op::Data, 3, 1, chunk.len()), chunk);
    }
    guest.send(header(Op::CreditRequest, 3, 1, 0), &[]);
    assert!(guest.expect(Op::CreditUpdate).fwd_cnt < BUF_ALLOC);
    guest.handle.reset(guest.node).unwrap();
    assert_eq!(idle.read(&mut [0]).unwrap(), 0);
    let mut got = Vec::new();
    busy.read_to_end(&mut got).unwrap();
    assert!(got == data);

    // A new driver finds a device without connections.
    let memory = guest.rx.memory.clone();
    memory.write_slice(&[0; 0x3000], GuestAddress(0)).unwrap();
    memory.write_slice(&[0; 0x3000], GuestAddress(TX_RING)).unwrap();
    guest.rx = Driver::new(memory.clone(), 0, SLOTS);
    guest.tx = Driver::new(memory, TX_RING, SLOTS);
    guest.tx_free = (0..SLOTS).collect();
    guest.activate();
    (0..SLOTS).for_each(|slot| guest.post(slot));
    guest.connect(3, 1);
    listener.accept().unwrap();
}
