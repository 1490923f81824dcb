//! The targets: each takes any bytes, as one of the places does where bytes of a guest, a client or a file come in. None may panic,
//! hang or take memory without bound.
//!
//! `fuzz_targets/` has them for libFuzzer, a line each; `tests/smoke.rs` drives them on a stable compiler.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use devices::GuestMemory;
use devices::virtio::transport::negotiation::Negotiation;
use devices::virtio::transport::state::TransportState;
use devices::virtio::vsock::connection::Connection;
use devices::virtio::vsock::packet::{HEADER_SIZE, Header};
use devices::virtio::{Interrupt, Queue, Rng, VirtioDevice};
use machine::api::{Limits, Server};
use machine::boot::Kernel;
use machine::config::{BootProtocol, MachineConfig};
use machine::control::{Control, Refusal, Reply, Request};
use machine::plan::ListeningSocket;
use machine::snapshot::{MachineState, Manifest};
use protocol::{FrameDecoder, FromAgent, ToAgent};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

/// A machine that does whatever it is asked.
struct Obedient;

impl Control for Obedient {
    fn ask(&self, _: Request) -> Result<Reply, Refusal> {
        Ok(Reply::Done)
    }
}

/// The HTTP parser and the routes of the control API, behind a real socket.
pub fn api_request(data: &[u8]) {
    static SERVER: OnceLock<(PathBuf, Server)> = OnceLock::new();
    let (path, _) = SERVER.get_or_init(|| {
        let path = std::env::temp_dir().join(format!("vmm-fuzz-{}.sock", std::process::id()));
        let limits = Limits { read: Duration::from_millis(200), ..Limits::default() };
        let socket = ListeningSocket::bind(&path).expect("a socket");
        (path, Server::start(socket, Arc::new(Obedient), limits).expect("a server"))
    });
    let mut client = UnixStream::connect(path).expect("the server listens");
    let _ = client.write_all(data);
    let _ = client.shutdown(std::net::Shutdown::Write);
    let mut answer = Vec::new();
    let _ = client.read_to_end(&mut answer);
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 "), "{answer:?}");
}

/// A snapshot's manifest, as it is and behind the first line that belongs to it.
pub fn snapshot_manifest(data: &[u8]) {
    let _ = Manifest::decode(data);
    let line = format!("vmm-snapshot 1 {} {:08x}\n", data.len(), crc32fast::hash(data));
    if let Ok(manifest) = Manifest::decode(&[line.as_bytes(), data].concat()) {
        assert_eq!(Manifest::decode(&manifest.encode()).as_ref(), Ok(&manifest));
    }
}

/// A snapshot's state: reading it, and what a transport makes of it.
pub fn snapshot_state(data: &[u8]) {
    let _ = postcard::from_bytes::<MachineState>(data);
    if let Ok(state) = postcard::from_bytes::<TransportState>(data) {
        let _ = Negotiation::restore(&Rng::new().profile(), &state.negotiation, state.failed);
    }
}

/// A driver's rings: 64 KiB of guest memory that begins with the descriptor table.
pub fn virtqueue(data: &[u8]) {
    const SIZE: usize = 1 << 16;
    let memory: GuestMemory = devices::memory::anonymous(&[(GuestAddress(0), SIZE)], false).expect("memory");
    let data = &data[..data.len().min(SIZE)];
    memory.write_slice(data, GuestAddress(0)).expect("it fits");
    let mut ring = virtio_queue::Queue::new(16).expect("a power of two");
    ring.set_size(16);
    ring.set_desc_table_address(Some(0), Some(0));
    ring.set_avail_ring_address(Some(0x100), Some(0));
    ring.set_used_ring_address(Some(0x140), Some(0));
    ring.set_ready(true);
    let interrupt = Interrupt::new().expect("an eventfd");
    let kick = EventFd::new(0).expect("an eventfd");
    let Ok(mut queue) = Queue::new(ring, Arc::new(memory), interrupt, kick) else { return };
    for _ in 0..64 {
        let Ok(Some(mut chain)) = queue.pop() else { break };
        let mut bytes = [0; 64];
        let some = chain.reader.remaining().min(bytes.len());
        let _ = chain.reader.read_exact(&mut bytes[..some]);
        let room = chain.writer.remaining().min(bytes.len());
        let _ = chain.writer.write_all(&bytes[..room]);
        if queue.push(chain).and_then(|()| queue.notify()).is_err() {
            break;
        }
    }
}

/// Packets of a guest, one after the other, on one connection.
pub fn vsock(data: &[u8]) {
    let mut connection: Option<Connection> = None;
    for raw in data.as_chunks::<HEADER_SIZE>().0 {
        let header = Header::parse(raw);
        let _ = header.refusal();
        let connection = connection.get_or_insert_with(|| Connection::from_guest(&header));
        let _ = connection.packet(&header);
        match raw[0] % 5 {
            0 => connection.forwarded(header.len % 4096),
            1 => connection.readable(),
            2 => connection.end_of_file(),
            3 => connection.hung_up(),
            _ => {}
        }
        for _ in 0..8 {
            if connection.next_action().is_none() {
                break;
            }
        }
        if let Some(packet) = connection.next_packet() {
            let _ = connection.sending(packet).to_bytes();
        }
        let _ = (connection.reset(), connection.interest(), connection.patience());
    }
}

/// A kernel's file: ELF, bzImage or anything else.
pub fn kernel(data: &[u8]) {
    let name = rustix::fs::memfd_create("kernel", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
    let mut file = std::fs::File::from(name);
    file.write_all(data).expect("memory");
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    if let Ok(kernel) = Kernel::open(&path, BootProtocol::Auto) {
        let memory = devices::memory::anonymous(&[(GuestAddress(0), 32 << 20)], false).expect("memory");
        if kernel.check_fits(32 << 20).is_ok() {
            let _ = kernel.load(&memory);
        }
    }
}

/// A machine's description.
pub fn config(data: &[u8]) {
    if let Ok(config) = serde_json::from_slice::<MachineConfig>(data) {
        let text = serde_json::to_vec(&config).expect("plain data");
        assert_eq!(serde_json::from_slice::<MachineConfig>(&text).expect("our own"), config);
    }
}

/// What agent and host send each other, in frames.
pub fn protocol(data: &[u8]) {
    let (mut from, mut to) = (FrameDecoder::new(), FrameDecoder::new());
    for piece in data.chunks(7) {
        from.push(piece);
        to.push(piece);
        while let Ok(Some(_)) = from.next_message::<FromAgent>() {}
        while let Ok(Some(_)) = to.next_message::<ToAgent>() {}
    }
    let _ = (from.finish(), to.finish());
}
