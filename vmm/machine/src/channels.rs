//! The ends of the guest's vsock connections that stay with this process.

use std::collections::BTreeMap;
use std::io;

use devices::virtio::vsock::{Backend, Connector, Listener, Vsock};

use crate::plan::ListeningSocket;

/// Listeners for the ports that were asked for, and the way into the guest.
pub struct Channels {
    ports: Vec<u32>,
    listeners: BTreeMap<u32, Listener>,
    connector: Option<Connector>,
    /// Its path is removed when the machine is gone.
    socket: Option<ListeningSocket>,
}

impl Channels {
    pub(crate) fn new(ports: &[u32]) -> Self {
        Channels { ports: ports.into(), listeners: BTreeMap::new(), connector: None, socket: None }
    }

    /// Makes the vsock device whose other ends these are.
    pub(crate) fn open(&mut self, cid: u32, socket: Option<ListeningSocket>) -> io::Result<Vsock> {
        let mut backend = Backend::new();
        for &port in &self.ports {
            self.listeners.insert(port, backend.listen(port)?);
        }
        if let Some(socket) = &socket {
            backend.serve_path(socket.path());
            backend.accept_from(socket.listener().try_clone()?)?;
        }
        self.socket = socket;
        let (device, connector) = Vsock::new(cid, backend)?;
        self.connector = Some(connector);
        Ok(device)
    }

    /// Takes the listener of `port`: once, and only if the port was asked for and the machine has a vsock device.
    pub fn listener(&mut self, port: u32) -> Option<Listener> {
        self.listeners.remove(&port)
    }

    /// Opens connections into the guest, if the machine has a vsock device.
    pub fn connector(&self) -> Option<&Connector> {
        self.connector.as_ref()
    }
}
