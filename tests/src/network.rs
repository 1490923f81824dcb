//! A network namespace with a TAP in it: the host's side of a guest's network, apart from the host's own.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// A network namespace with the TAP `tap0`, which has the address 10.9.0.1/24. It goes when this is dropped.
pub struct TapNetwork {
    name: String,
}

impl TapNetwork {
    /// Makes it. Needs root.
    #[allow(clippy::new_without_default, reason = "making one changes the host")]
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let network = TapNetwork { name: format!("vmm-test-{}-{count}", std::process::id()) };
        ip(&["netns", "add", &network.name]);
        network.ip(&["tuntap", "add", "tap0", "mode", "tap"]);
        network.ip(&["address", "add", "10.9.0.1/24", "dev", "tap0"]);
        network.ip(&["link", "set", "tap0", "up"]);
        network
    }

    fn ip(&self, args: &[&str]) {
        ip(&[&["-n", &self.name], args].concat());
    }

    /// The words to put before a command to run it inside.
    pub fn prefix(&self) -> [&str; 4] {
        ["ip", "netns", "exec", &self.name]
    }

    /// Does something inside, on a thread of its own.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let namespace =
            File::open(Path::new("/run/netns").join(&self.name)).expect("iproute2 keeps it there");
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
                    .expect("root may enter a namespace");
                work()
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl Drop for TapNetwork {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "delete", &self.name]).status();
    }
}

fn ip(args: &[&str]) {
    let output = Command::new("ip").args(args).output().expect("iproute2 is installed");
    assert!(output.status.success(), "ip {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}
