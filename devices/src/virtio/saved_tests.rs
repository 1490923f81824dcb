//! Devices that are saved and restored, in every state and in the middle of their work, from honest and from hostile files.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};

use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::Value;
use vm_memory::{Bytes, GuestAddress};

use super::transport::negotiation::status;
use super::{Block, Net, Rng, VirtioDevice};
use crate::testing::{EVENT_IDX, Guest};

const SECTORS: usize = 16;

fn image() -> File {
    let mut file = tempfile::tempfile().unwrap();
    let bytes: Vec<u8> = (0..SECTORS * 512).map(|i| (i / 512 + i).to_le_bytes()[0]).collect();
    file.write_all(&bytes).unwrap();
    file
}

fn disk(file: &File) -> Box<dyn VirtioDevice> {
    Box::new(Block::new(file.try_clone().unwrap(), false, "disk").unwrap())
}

type Make = fn() -> Box<dyn VirtioDevice>;

/// A device of each kind, and which of its queues the driver fills with requests.
const DEVICES: [(Make, u32); 4] = [
    (|| Box::new(Block::empty(true, "spare")), 0),
    (|| disk(&image()), 0),
    (|| Box::new(Net::unplugged([2, 0, 0, 0, 0, 7]).unwrap()), 1),
    (|| Box::new(Rng::new()), 0),
];

fn registers(guest: &Guest) -> Vec<u32> {
    (0..0x140).step_by(4).map(|at| guest.get(at)).collect()
}

/// A driver that begins anew finds a device that works.
fn starts_again(guest: &Guest) {
    guest.set(0x70, 0);
    assert_eq!(guest.get(0x70), 0);
    for driver in &guest.drivers {
        driver.memory.write_slice(&[0; 0x4000], GuestAddress(driver.rings().0)).unwrap();
    }
    guest.steps(0).iter().for_each(|&(register, value)| guest.set(register, value));
    assert_eq!(guest.get(0x70), 15);
}

#[test]
fn every_device_goes_on_in_every_state_of_the_negotiation() {
    for (make, queue) in DEVICES {
        let steps = Guest::new(make()).steps(!0);
        for done in 0..=steps.len() {
            let before = Guest::new(make());
            steps[..done].iter().for_each(|&(register, value)| before.set(register, value));
            let expected = registers(&before);
            let mut after = before.restored_on(make());
            assert_eq!(registers(&after), expected, "{done} steps");
            steps[done..].iter().for_each(|&(register, value)| after.set(register, value));
            assert_eq!(after.get(0x70), 15);
            // A block device fails it, a card drops it, a source of entropy fills it: all answer.
            let request = [0; 16];
            let reads: &[&[u8]] = if queue == 1 { &[&request] } else { &[] };
            let (head, _) = after.drivers[queue as usize].send(reads, &[16]);
            after.drivers[queue as usize].event_idx = true;
            after.kick(queue);
            assert_eq!(after.receive(queue as usize).0, u32::from(head));
        }
    }
}

#[test]
fn whoever_gave_up_or_failed_stays_so_until_the_reset() {
    for (make, queue) in DEVICES {
        let before = Guest::start(make(), 0);
        before.set(0x70, status::FAILED);
        let after = before.restored_on(make());
        assert_eq!(after.get(0x70), 15 | status::FAILED);
        starts_again(&after);

        let mut before = Guest::start(make(), 0);
        before.drivers[queue as usize].claim(999);
        before.kick(queue);
        before.wait_for_failure();
        let after = before.restored_on(make());
        assert_eq!(after.get(0x70), 15 | status::DEVICE_NEEDS_RESET);
        after.kick(queue);
        assert_eq!(after.get(0x70), 15 | status::DEVICE_NEEDS_RESET);
        starts_again(&after);
    }
}

/// What happens to a disk and its guest.
#[derive(Debug, Clone)]
enum Event {
    Read(usize),
    Write(usize, u8),
    Kick,
    Collect,
    /// The machine stops and goes on.
    Pause,
    /// It goes on in another process.
    Move,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => (0..SECTORS).prop_map(Event::Read),
        6 => (0..SECTORS, any::<u8>()).prop_map(|(sector, fill)| Event::Write(sector, fill)),
        4 => Just(Event::Kick),
        3 => Just(Event::Collect),
        2 => Just(Event::Pause),
        2 => Just(Event::Move),
    ]
}

/// What a request is answered with: the addresses of its buffers, and what must be in the first.
type Answer = (Vec<u64>, Option<Vec<u8>>);

fn check(guest: &Guest, pending: &mut HashMap<u32, Answer>, head: u32) {
    let (at, expected) = pending.remove(&head).expect("an answer to a request that nobody waits for");
    let status = at.last().copied().unwrap();
    assert_eq!(guest.drivers[0].bytes(status, 1), [0]);
    if let Some(expected) = expected {
        assert_eq!(guest.drivers[0].bytes(at[0], 512), expected);
    }
}

fn run(events: &[Event], event_idx: bool) {
    let file = image();
    let mut model = Vec::new();
    (&file).seek(SeekFrom::Start(0)).unwrap();
    (&file).read_to_end(&mut model).unwrap();
    let mut guest = Guest::new(disk(&file));
    let features = if event_idx { !0 } else { !EVENT_IDX };
    guest.steps(features).iter().for_each(|&(register, value)| guest.set(register, value));
    guest.drivers[0].event_idx = event_idx;
    let mut pending: HashMap<u32, Answer> = HashMap::new();
    for event in events {
        match *event {
            Event::Read(sector) => {
                let header = [0u64, sector as u64].map(u64::to_le_bytes).concat();
                let (head, at) = guest.drivers[0].send(&[&header], &[512, 1]);
                pending.insert(head.into(), (at, Some(model[sector * 512..][..512].to_vec())));
            }
            Event::Write(sector, fill) => {
                let header = [1u64, sector as u64].map(u64::to_le_bytes).concat();
                model[sector * 512..][..512].fill(fill);
                let (head, at) = guest.drivers[0].send(&[&header, &[fill; 512]], &[1]);
                pending.insert(head.into(), (at, None));
            }
            Event::Kick => guest.kick(0),
            Event::Collect => {
                while let Some((head, _)) = guest.drivers[0].receive() {
                    check(&guest, &mut pending, head);
                }
            }
            Event::Pause => {
                let held = guest.transport.quiesce().unwrap();
                guest.transport.resume(held).unwrap();
            }
            Event::Move => guest = guest.restored_on(disk(&file)),
        }
        // The ring has room for 42 of three descriptors.
        if pending.len() == 40 {
            guest.kick(0);
            let (head, _) = guest.receive(0);
            check(&guest, &mut pending, head);
        }
    }
    guest.kick(0);
    while !pending.is_empty() {
        let (head, _) = guest.receive(0);
        check(&guest, &mut pending, head);
    }
    assert_eq!(guest.drivers[0].receive(), None);
    let mut contents = Vec::new();
    (&file).seek(SeekFrom::Start(0)).unwrap();
    (&file).read_to_end(&mut contents).unwrap();
    assert!(contents == model, "the disk holds what was written, in that order");
}

/// Paths of all that can be changed in a JSON document.
fn leaves(value: &Value, path: &str, found: &mut Vec<String>) {
    match value {
        Value::Object(members) => members.iter().for_each(|(k, v)| leaves(v, &format!("{path}/{k}"), found)),
        Value::Array(items) => {
            found.push(path.to_string());
            items.iter().enumerate().for_each(|(i, v)| leaves(v, &format!("{path}/{i}"), found));
        }
        _ => found.push(path.to_string()),
    }
}

fn number() -> impl Strategy<Value = u64> {
    let edges = [
        0,
        1,
        2,
        7,
        15,
        16,
        64,
        128,
        255,
        256,
        0x1000,
        0x3f_fff0,
        0x40_0000,
        0xffff,
        1 << 28,
        1 << 32,
        u64::MAX,
    ];
    prop_oneof![3 => prop::sample::select(edges.to_vec()), 1 => any::<u64>(), 1 => (0u32..64).prop_map(|bit| 1 << bit)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    /// Whenever a machine is paused or moved: no request is lost, none is answered twice, and all take effect in order.
    #[test]
    fn requests_survive_pauses_and_moves(events in prop::collection::vec(event(), 1..120), event_idx in any::<bool>()) {
        run(&events, event_idx);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    /// Whatever somebody wrote into a file: it is refused, or the device works or fails like any other, and can be reset.
    #[test]
    fn hostile_state_is_refused_or_harmless(
        device in 0..DEVICES.len(),
        done in any::<Index>(),
        changes in prop::collection::vec((any::<Index>(), number(), 0u8..4), 1..4),
    ) {
        let (make, queue) = DEVICES[device];
        let before = Guest::new(make());
        let steps = before.steps(!0);
        // Half of them are live.
        let done = done.index(2 * steps.len()).min(steps.len());
        steps[..done].iter().for_each(|&(register, value)| before.set(register, value));
        let mut guest = before;
        if done == steps.len() {
            guest.drivers[queue as usize].send(&[&[0; 16]], &[512, 1]);
            guest.kick(queue);
            guest.drivers[queue as usize].send(&[&[0; 16]], &[512, 1]);
        }
        let mut file = serde_json::to_value(guest.saved()).unwrap();
        for (at, number, how) in changes {
            let mut paths = Vec::new();
            leaves(&file, "", &mut paths);
            let leaf = file.pointer_mut(at.get(&paths[..]).as_str()).unwrap();
            match (how, leaf) {
                (0, Value::Array(items)) => drop(items.pop()),
                (_, Value::Array(items)) => items.extend(items.first().cloned()),
                (_, leaf @ Value::Bool(_)) => *leaf = Value::Bool(leaf == &Value::Bool(false)),
                (1, leaf) if leaf.is_u64() => *leaf = (leaf.as_u64().unwrap() ^ 1).into(),
                (2, leaf) if leaf.is_u64() => *leaf = leaf.as_u64().unwrap().wrapping_add(number).into(),
                (_, leaf) if leaf.is_u64() => *leaf = number.into(),
                _ => {}
            }
        }
        let Ok(state) = serde_json::from_value(file) else { return Ok(()) };
        let guest = guest.moved_to(make());
        let Ok(held) = guest.transport.restore(state) else { return Ok(()) };
        if guest.transport.resume(held).is_ok() {
            guest.kick(queue);
            registers(&guest);
        }
        // Once more through a pause: what was taken in can be given out.
        let held = guest.transport.quiesce().unwrap();
        guest.transport.save(&held).unwrap();
        let _ = guest.transport.resume(held);
        starts_again(&guest);
    }
}
