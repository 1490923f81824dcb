//! The 16550 at [`PORTS`]: the guest's first console. vm-superio's model of the chip, an eventfd as its interrupt line, and a
//! [`Console`] as what its wire leads to.
//!
//! Registers are served on vCPU threads under one lock; [`SerialPort::input`] may be called on any thread. Each character
//! costs the guest two exits, so nothing more than a lock, a ring and, once a line, a wake-up is added to that.

use std::collections::VecDeque;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::console::Console;

/// First port and number of ports of COM1.
pub const PORTS: (u64, u64) = (0x3f8, 8);
/// Interrupt of COM1.
pub const IRQ: u32 = 4;

/// How many bytes of input wait for a guest that does not read them.
const MOST_INPUT: usize = 64 << 10;

/// Registers that matter here. The others are vm-superio's affair.
const DATA: u8 = 0;
const INTERRUPT_ENABLE: u8 = 1;
const LINE_CONTROL: u8 = 3;
const MODEM_CONTROL: u8 = 4;
const LINE_STATUS: u8 = 5;
/// INTERRUPT_ENABLE: received data.
const RECEIVED: u8 = 0x01;
/// LINE_STATUS: the receive FIFO holds a byte.
const DATA_READY: u8 = 0x01;
/// LINE_CONTROL: registers 0 and 1 are the baud rate's divisor.
const DIVISOR_LATCH: u8 = 0x80;

/// The chip's interrupt line, which a VM connects to [`IRQ`] with an irqfd.
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        // An eventfd refuses a write only when its counter is full: then the line is raised already.
        let _ = self.0.write(1);
        Ok(())
    }
}

struct Port {
    uart: Serial<Line, NoEvents, Console>,
    /// Input for which the FIFO had no room yet.
    waiting: VecDeque<u8>,
}

impl Port {
    /// Whether the guest's driver is open and not in the middle of something. What came earlier it would throw away when it
    /// clears the chip at start-up.
    fn listens(&mut self) -> bool {
        self.uart.read(LINE_CONTROL) & DIVISOR_LATCH == 0 && self.uart.read(INTERRUPT_ENABLE) & RECEIVED != 0
    }

    /// Moves waiting input to the FIFO once that is empty: one interrupt for as much as fits.
    fn refill(&mut self) {
        if self.waiting.is_empty() || self.uart.read(LINE_STATUS) & DATA_READY != 0 || !self.listens() {
            return;
        }
        let (first, _) = self.waiting.as_slices();
        // In loopback mode it takes nothing; and `Line` never fails.
        let taken = self.uart.enqueue_raw_bytes(first).unwrap_or(0);
        self.waiting.drain(..taken);
    }

    fn write(&mut self, register: u8, value: u8) {
        // Neither the console nor the line fails.
        let _ = self.uart.write(register, value);
        if matches!(register, INTERRUPT_ENABLE | LINE_CONTROL | MODEM_CONTROL) {
            self.refill();
        }
    }

    fn read(&mut self, register: u8) -> u8 {
        let value = self.uart.read(register);
        if register == DATA {
            self.refill();
        }
        value
    }
}

/// A serial port with a console at the other end.
pub struct SerialPort {
    port: Mutex<Port>,
    line: EventFd,
}

impl SerialPort {
    /// A port as after power-on, which writes to `console`.
    ///
    /// # Errors
    /// Those of `eventfd(2)` and `dup(2)`.
    pub fn new(console: Console) -> io::Result<Self> {
        let line = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let uart = Serial::new(Line(line.try_clone()?), console);
        Ok(SerialPort { port: Mutex::new(Port { uart, waiting: VecDeque::new() }), line })
    }

    /// The eventfd that is written to when the chip wants attention.
    pub fn line(&self) -> &EventFd {
        &self.line
    }

    /// Sends `bytes` to the guest, and returns how many were taken: fewer than all when 64 KiB wait already. They reach the
    /// FIFO once a driver that wants interrupts has the port open; a driver that only polls hears nothing.
    #[must_use = "what was not taken must be offered again"]
    pub fn input(&self, bytes: &[u8]) -> usize {
        let mut port = self.lock();
        let room = MOST_INPUT.saturating_sub(port.waiting.len());
        let taken = bytes.get(..room).unwrap_or(bytes);
        port.waiting.extend(taken);
        port.refill();
        taken.len()
    }

    fn lock(&self) -> MutexGuard<'_, Port> {
        // Nothing here panics with the lock held, and plain data cannot be left half-changed.
        self.port.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut port = self.lock();
        // The chip is eight bits wide: a wider access is one to each port in turn.
        for (register, byte) in (offset..).zip(data) {
            *byte = u8::try_from(register).map_or(0xff, |r| port.read(r));
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut port = self.lock();
        for (register, byte) in (offset..).zip(data) {
            if let Ok(register) = u8::try_from(register) {
                port.write(register, *byte);
            }
        }
    }
}

#[cfg(test)]
mod tests {
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
}
