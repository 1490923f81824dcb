//! What is said on connections, by TCP and by vsock.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};

use crate::Outcome;

/// Sends back what comes.
pub fn echo(mut connection: impl Read + Write) -> Outcome {
    let mut buffer = vec![0; 64 << 10];
    let mut total = 0;
    loop {
        let count = connection.read(&mut buffer)?;
        if count == 0 {
            println!("served: {total}");
            return Ok(());
        }
        connection.write_all(buffer.get(..count).unwrap_or_default())?;
        total += count;
    }
}

/// Sends that many bytes of the pattern, says so by `shutdown`, and prints the answer.
pub fn ask<C: Read + Write>(
    mut connection: C,
    bytes: u64,
    shutdown: impl FnOnce(&C) -> std::io::Result<()>,
) -> Outcome {
    crate::pattern(bytes, &mut connection)?;
    shutdown(&connection)?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer)?;
    println!("answer: {answer}");
    Ok(())
}

/// Serves one TCP connection.
pub fn serve_tcp(port: u64) -> Outcome {
    let listener = TcpListener::bind(("0.0.0.0", u16::try_from(port)?))?;
    println!("listening: {port}");
    echo(listener.accept()?.0)
}

/// Connects by TCP, and asks.
pub fn send_tcp(address: &str, bytes: u64) -> Outcome {
    ask(TcpStream::connect(address)?, bytes, |connection| connection.shutdown(Shutdown::Write))
}
