//! The 16550 at [`PORTS`]: the guest's first console. vm-superio's model of the chip, an eventfd as its interrupt line, and a
//! [`Console`] as what its wire leads to.
//!
//! Registers are served on vCPU threads under one lock; [`SerialPort::input`] may be called on any thread. Each character
//! costs the guest two exits, so nothing more than a lock, a ring and, once a line, a wake-up is added to that.

use std::collections::VecDeque;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use thiserror::Error;
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
/// LINE_STATUS: whatever is sent is gone at once.
const IDLE: u8 = 0x60;
/// Bytes that the FIFO holds.
const FIFO: usize = 64;
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

/// What a snapshot carries of the chip. It may come from anybody.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    /// Divisor latch, low byte first.
    pub divisor: [u8; 2],
    /// Interrupt enable register.
    pub interrupt_enable: u8,
    /// Interrupt identification register, without the FIFO bits.
    pub interrupt_identification: u8,
    /// Line control register.
    pub line_control: u8,
    /// Line status register.
    pub line_status: u8,
    /// Modem control register.
    pub modem_control: u8,
    /// Modem status register.
    pub modem_status: u8,
    /// Scratch register.
    pub scratch: u8,
    /// Received bytes that the driver has not read.
    pub fifo: Vec<u8>,
    /// Input that waits for room in there.
    pub waiting: Vec<u8>,
}

/// Why saved state is not taken. The port is as it was.
#[derive(Debug, Error)]
pub enum SerialError {
    /// No driver can have brought the chip there.
    #[error("the saved serial port cannot be: {0}")]
    Impossible(&'static str),
    /// The host refused a descriptor.
    #[error("serial port: {0}")]
    Host(#[from] io::Error),
}

impl SerialState {
    fn check(&self) -> Result<(), SerialError> {
        let rules = [
            (self.fifo.len() <= FIFO, "more bytes than its FIFO holds"),
            (self.waiting.len() <= MOST_INPUT, "more input waits than may"),
            (self.interrupt_enable & !0x0f == 0, "interrupts that do not exist are enabled"),
            (self.interrupt_identification & !0x07 == 0, "interrupts that do not exist are pending"),
            // The transmitter is always ready, and data is ready when there is some.
            (
                self.line_status == IDLE | u8::from(!self.fifo.is_empty()),
                "its line status contradicts its FIFO",
            ),
        ];
        match rules.iter().find(|(holds, _)| !holds) {
            Some((_, rule)) => Err(SerialError::Impossible(rule)),
            None => Ok(()),
        }
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

    /// What a snapshot carries of the port. What the guest has printed is the console's.
    pub fn save(&self) -> SerialState {
        let port = self.lock();
        let uart = port.uart.state();
        SerialState {
            divisor: [uart.baud_divisor_low, uart.baud_divisor_high],
            interrupt_enable: uart.interrupt_enable,
            interrupt_identification: uart.interrupt_identification,
            line_control: uart.line_control,
            line_status: uart.line_status,
            modem_control: uart.modem_control,
            modem_status: uart.modem_status,
            scratch: uart.scratch,
            fifo: uart.in_buffer,
            waiting: port.waiting.iter().copied().collect(),
        }
    }

    /// Becomes the port that `state` was saved from, on the console that it has. An interrupt that was pending is raised again,
    /// so the interrupt controller must have its own state already.
    ///
    /// # Errors
    /// [`SerialError`]; the port is as it was then.
    pub fn restore(&self, state: SerialState) -> Result<(), SerialError> {
        state.check()?;
        let mut port = self.lock();
        let [baud_divisor_low, baud_divisor_high] = state.divisor;
        let uart = vm_superio::SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.fifo,
        };
        let console = port.uart.writer().clone();
        let line = Line(self.line.try_clone()?);
        port.uart = Serial::from_state(&uart, line, NoEvents, console)
            .map_err(|_| SerialError::Impossible("vm-superio refuses it"))?;
        port.waiting = state.waiting.into();
        Ok(())
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
#[path = "serial_tests.rs"]
mod tests;
