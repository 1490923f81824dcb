use super::*;

fn port() -> (SerialPort, Console) {
    let console = Console::new();
    (SerialPort::new(console.clone()).unwrap(), console)
}

fn get(port: &SerialPort, register: u8) -> u8 {
    let mut byte = [0];
    port.read(register.into(), &mut byte);
    byte[0]
}

fn set(port: &SerialPort, register: u8, value: u8) {
    port.write(register.into(), &[value]);
}

#[test]
fn what_is_written_reaches_the_console() {
    let (port, console) = port();
    for byte in b"hello\n" {
        assert_eq!(get(&port, LINE_STATUS) & 0x60, 0x60, "always ready to send");
        set(&port, DATA, *byte);
    }
    assert_eq!(console.tail(), b"hello\n");
    assert!(port.line().read().is_err(), "nobody asked for interrupts");
}

#[test]
fn is_found_by_a_driver() {
    // What Linux's `autoconfig` looks at: the scratch register, the interrupt enable register, loopback, FIFOs.
    let (port, _) = port();
    set(&port, INTERRUPT_ENABLE, 0xff);
    assert_eq!(get(&port, INTERRUPT_ENABLE), 0x0f);
    set(&port, INTERRUPT_ENABLE, 0);
    set(&port, 7, 0x5a);
    assert_eq!(get(&port, 7), 0x5a);
    set(&port, MODEM_CONTROL, 0x1a);
    assert_eq!(get(&port, 6) & 0xf0, 0x90, "RTS and OUT2 come back as CTS and DCD");
    set(&port, MODEM_CONTROL, 0);
    assert_eq!(get(&port, 2) & 0xc0, 0xc0, "a 16550A with FIFOs");
    let mut all = [0; 8];
    port.read(0, &mut all);
    assert_eq!((all[5], all[7]), (0x60, 0x5a));
}

#[test]
fn input_waits_for_the_driver_and_then_for_room() {
    let (port, _) = port();
    let text: Vec<u8> = (0..200).collect();
    assert_eq!(port.input(&text), 200);
    assert_eq!(get(&port, LINE_STATUS) & DATA_READY, 0, "nobody listens");
    set(&port, MODEM_CONTROL, 0x10);
    set(&port, INTERRUPT_ENABLE, RECEIVED);
    assert_eq!(get(&port, LINE_STATUS) & DATA_READY, 0, "not in loopback mode");
    set(&port, MODEM_CONTROL, 0);
    let mut heard = Vec::new();
    let mut interrupts = 0;
    while port.line().read().is_ok() {
        interrupts += 1;
        for _ in 0..64 {
            if get(&port, LINE_STATUS) & DATA_READY != 0 {
                heard.push(get(&port, DATA));
            }
        }
    }
    assert_eq!(heard, text);
    assert_eq!(interrupts, 4, "one for each filling of the FIFO");
}

#[test]
fn input_is_bounded() {
    let (port, _) = port();
    assert_eq!(port.input(&vec![b'x'; MOST_INPUT + 1]), MOST_INPUT);
    assert_eq!(port.input(b"more"), 0);
}

#[test]
fn goes_on_after_it_was_saved() {
    let (before, _) = port();
    let text: Vec<u8> = (0..200).collect();
    for (register, value) in [(LINE_CONTROL, 0x80), (0, 12), (1, 3), (LINE_CONTROL, 3), (7, 0x5a)] {
        set(&before, register, value);
    }
    set(&before, INTERRUPT_ENABLE, RECEIVED);
    assert_eq!(before.input(&text), 200);
    let state = before.save();
    assert_eq!((state.fifo.len(), state.waiting.len(), state.divisor), (64, 136, [12, 3]));

    let (after, console) = port();
    let bytes = serde_json::to_vec(&state).unwrap();
    after.restore(serde_json::from_slice(&bytes).unwrap()).unwrap();
    assert_eq!(after.save(), state);
    assert!(after.line().read().is_ok(), "there is something to read");
    let heard: Vec<u8> = std::iter::repeat_with(|| get(&after, DATA)).take(200).collect();
    assert_eq!(heard, text);
    assert_eq!((get(&after, LINE_STATUS), get(&after, 7)), (0x60, 0x5a));
    set(&after, DATA, b'x');
    assert_eq!(console.tail(), b"x");
}

#[test]
fn a_chip_that_cannot_be_is_refused() {
    let good = port().0.save();
    let changes: [fn(&mut SerialState); 7] = [
        |s| (s.fifo, s.line_status) = (vec![0; 65], 0x61),
        |s| s.waiting = vec![0; MOST_INPUT + 1],
        |s| s.interrupt_enable = 0x10,
        |s| s.interrupt_identification = 8,
        |s| s.line_status = 0x61,
        |s| s.line_status = 0,
        |s| s.fifo = vec![1],
    ];
    for (case, change) in changes.iter().enumerate() {
        let (port, _) = port();
        set(&port, 7, 0x5a);
        let mut state = good.clone();
        change(&mut state);
        assert!(matches!(port.restore(state), Err(SerialError::Impossible(_))), "{case}");
        assert_eq!(get(&port, 7), 0x5a, "{case}");
    }
}

proptest::proptest! {
    /// Whatever a driver does with the chip, its state is one that is taken back.
    #[test]
    fn every_state_is_taken_back(
        writes in proptest::collection::vec((0u8..8, proptest::prelude::any::<u8>(), proptest::prelude::any::<bool>()), 0..300),
        input in 0usize..500,
    ) {
        let (before, _) = port();
        let _ = before.input(&vec![7; input]);
        for (register, value, write) in writes {
            if write { set(&before, register, value) } else { get(&before, register); }
        }
        let state = before.save();
        let (after, _) = port();
        after.restore(state.clone()).unwrap();
        proptest::prop_assert_eq!(after.save(), state);
    }
}
