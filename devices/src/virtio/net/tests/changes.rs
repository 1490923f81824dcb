//! A card whose TAP comes late, or that goes on in another process.

use super::*;

#[test]
fn a_card_is_plugged_in_while_it_runs() {
    with_tap(|tap| {
        let net = Net::unplugged(MAC).unwrap();
        let counters = net.counters();
        let guest = Guest::start(Box::new(net), !0);
        let mut card = Card { guest, counters, posted: Default::default() };
        card.post(8, &[1526]);
        let packet = frame(UDP, udp(b"lost"), 0);
        card.send(&[&packet]);
        assert_eq!(card.counters.tx_dropped.load(Relaxed), 1);
        assert!(card.guest.transport.attach(Backend::Tap(File::open("/dev/null").unwrap().into())).is_err());
        card.guest.transport.attach(Backend::Tap(tap)).unwrap();
        assert_eq!(card.guest.get(0xfc), 0, "its address is what it was");
        let socket = UdpSocket::bind("10.9.0.1:6000").unwrap();
        card.send(&[&frame(UDP, udp(b"heard"), 0)]);
        let mut heard = [0; 100];
        let (len, from) = socket.recv_from(&mut heard).unwrap();
        assert_eq!(&heard[..len], b"heard");
        // A pause loses nothing that the host sent meanwhile.
        let held = card.guest.transport.quiesce().unwrap();
        socket.send_to(b"answer", from).unwrap();
        card.guest.transport.resume(held).unwrap();
        assert_eq!(card.segment(UDP).1[8..], *b"answer");
    });
}

#[test]
fn a_card_moves_with_what_its_driver_posted() {
    with_tap(|tap| {
        let socket = UdpSocket::bind("10.9.0.1:6000").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut card = Card::new(tap.try_clone().unwrap(), feature::MRG_RXBUF);
        // Fewer buffers than one packet may need: all of them are taken from the ring, and put back.
        card.post(20, &[100, 200]);
        let text = [b'x'; 500];
        for round in 0u8..30 {
            card.guest.drivers[TX].send(&[&frame(UDP, udp(&[round]), 0)], &[]);
            let net = Net::new(tap.try_clone().unwrap(), [2, 0, 0, 0, 0, 9]).unwrap();
            card.counters = net.counters();
            card.guest = card.guest.restored_on(Box::new(net));
            let mut heard = [0; 9];
            let (len, from) = socket.recv_from(&mut heard).unwrap();
            assert_eq!(heard[..len], [round], "each once, in order, without a doorbell");
            let address: Vec<u8> =
                [card.guest.get(0x100), card.guest.get(0x104)].map(u32::to_le_bytes).concat();
            assert_eq!(address[..6], MAC, "its own address, not the new card's");
            socket.send_to(&text, from).unwrap();
            let (_, segment, count) = card.segment(UDP);
            assert_eq!((&segment[8..], count), (&text[..], 2));
            card.post(2, &[100, 200]);
        }
    });
}
