use std::io::Read;
use std::sync::mpsc;

use super::*;

const LONG: Duration = Duration::from_secs(60);

fn print(console: &Console, text: &[u8]) {
    console.clone().write_all(text).unwrap();
}

#[test]
fn remembers_the_end() {
    let console = Console::new();
    print(&console, &vec![b'x'; MOST_KEPT]);
    print(&console, b"\none\r\ntwo \x1b[31m\xff\n");
    assert_eq!(console.tail().len(), MOST_KEPT);
    assert!(console.tail().ends_with(b"two \x1b[31m\xff\n"));
    assert_eq!(console.last_lines(2), ["one", "two \\u{1b}[31m\u{fffd}"]);
    assert!(!console.saw_panic());
}

#[test]
fn hears_a_panic_once_and_at_the_end_of_its_line() {
    let console = Console::new();
    let (sender, heard) = mpsc::channel();
    let witness = console.clone();
    console.on_panic(move || sender.send(witness.last_lines(1)).unwrap());
    print(&console, b"KKernel panic - not sync\nKernel panic -\n");
    assert!(!console.saw_panic());
    print(&console, b"[ 1.0] KKernel panic - not sync");
    print(&console, b"ing: Attempted to kill init!");
    assert!(console.saw_panic() && heard.try_recv().is_err());
    print(&console, b" exitcode=0x0b\r\n");
    assert_eq!(
        heard.recv().unwrap(),
        ["[ 1.0] KKernel panic - not syncing: Attempted to kill init! exitcode=0x0b"]
    );
    print(&console, b"Kernel panic - not syncing: again\n");
    assert!(heard.recv().is_err(), "told once");
}

#[test]
fn passes_on_byte_for_byte() {
    let (mut reader, writer) = io::pipe().unwrap();
    let console = Console::new();
    print(&console, b"before ");
    console.forward_to(Box::new(writer)).unwrap();
    assert!(console.forward_to(Box::new(io::sink())).is_err(), "one writer only");
    let text: Vec<u8> = (0..20_000u32).flat_map(u32::to_le_bytes).collect();
    let expected = text.clone();
    let reading = std::thread::spawn(move || {
        let mut heard = vec![0; expected.len()];
        reader.read_exact(&mut heard).unwrap();
        assert!(heard == expected);
    });
    for byte in &text {
        print(&console, &[*byte]);
    }
    assert!(console.flush(LONG));
    reading.join().unwrap();
    assert_eq!(console.dropped(), 0);
}

#[test]
fn a_host_that_does_not_read_costs_output_not_the_guest() {
    let (mut reader, writer) = io::pipe().unwrap();
    let console = Console::new();
    console.forward_to(Box::new(writer)).unwrap();
    // A pipe, a batch in the writer's hand and the queue hold at most 64 KiB each; the rest must not wait for ever.
    let printed = 1 << 20;
    print(&console, &vec![b'x'; printed]);
    assert!(!console.flush(Duration::ZERO));
    let dropped = console.dropped();
    assert!(dropped > 0);
    let expected = printed - usize::try_from(dropped).unwrap();
    std::io::copy(&mut (&mut reader).take(expected as u64), &mut io::sink()).unwrap();
    assert!(console.flush(LONG));
    print(&console, b"back\n");
    let mut back = [0; 5];
    reader.read_exact(&mut back).unwrap();
    assert_eq!((&back, console.dropped()), (b"back\n", dropped), "nothing is dropped any more");
}

#[test]
fn a_host_that_hangs_up_is_let_go() {
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    let console = Console::new();
    console.forward_to(Box::new(writer)).unwrap();
    print(&console, b"nobody\n");
    assert!(console.flush(LONG));
    print(&console, &vec![b'x'; 3 * MOST_QUEUED]);
    assert!(console.flush(Duration::ZERO), "nothing waits for a writer that is gone");
}
