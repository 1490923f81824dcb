//! Connections over a pause and a snapshot. Device loop only, while the device is quiesced.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use event_manager::EventSet;

use super::Streams;
use crate::device_loop::Watch;
use crate::virtio::vsock::backend::Backend;
use crate::virtio::vsock::connection::Connection;
use crate::virtio::vsock::device::BUFFER_BUDGET;
use crate::virtio::vsock::state::{ConnectionState, ResetState, VsockState};
use crate::virtio::vsock::stream::Stream;

impl Streams {
    /// Stops watching. Sockets stay open, and nobody's patience runs out.
    pub fn pause(&mut self, now: Instant, watch: &mut Watch) {
        self.watch(watch);
        for (&source, stream) in &mut self.streams {
            stream.unwatch(source, watch);
        }
        for (&source, client) in &self.clients {
            watch.remove(&client.socket, source);
        }
        self.paused = Some(now);
    }

    /// Goes on after [`pause`](Self::pause) or [`restore`](Self::restore).
    pub fn resume(&mut self, now: Instant, watch: &mut Watch) {
        let Some(since) = self.paused.take() else { return };
        let pause = now.saturating_duration_since(since);
        for (&source, stream) in &mut self.streams {
            stream.deadline = stream.deadline.and_then(|at| at.checked_add(pause));
            stream.watch(source, watch);
        }
        for (&source, client) in &mut self.clients {
            client.deadline = client.deadline.checked_add(pause).unwrap_or(client.deadline);
            watch.add(&client.socket, source, EventSet::IN);
        }
        self.touched.clear();
        self.deadline_changed = true;
    }

    /// What a snapshot carries. Programs that have not said where they want to go are not in it: the guest never heard of
    /// them.
    pub fn save(&self) -> VsockState {
        let mut budget = BUFFER_BUDGET;
        let mut resets: Vec<_> = self.replies.iter().map(ResetState::of).collect();
        let mut connections = Vec::new();
        for stream in self.streams.values() {
            match stream.save(&mut budget) {
                Some(connection) => connections.push(connection),
                None if stream.connection.is_known() => {
                    resets.push(ResetState::of(&stream.connection.reset()));
                }
                None => {}
            }
        }
        VsockState { cid: self.cid, reset_owed: false, next_port: self.next_port, connections, resets }
    }

    /// Takes over the connections of a state that was checked and is this guest's: each gets a fresh socket, whose other end
    /// goes to the listener of its port. What nobody listens for ends.
    ///
    /// # Errors
    /// That of making a socket.
    pub fn restore(&mut self, state: VsockState, backend: &Backend) -> io::Result<()> {
        self.next_port = state.next_port;
        self.replies = state.resets.iter().map(|reset| reset.packet(self.cid)).collect();
        for connection in state.connections {
            match backend.deliver(connection.host_port, connection.guest_port) {
                Ok(socket) => self.take_over(connection, socket),
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    if connection.is_known() {
                        self.replies.push_back(Connection::restore(self.cid, &connection).reset());
                    }
                }
                Err(error) => return Err(error),
            }
        }
        self.paused = Some(Instant::now());
        Ok(())
    }

    fn take_over(&mut self, state: ConnectionState, socket: UnixStream) {
        let source = self.free_source();
        if state.is_known() {
            self.by_ports.insert(state.ports(), source);
        }
        self.streams.insert(source, Stream::restore(self.cid, state, socket));
        self.settle(source);
    }
}
