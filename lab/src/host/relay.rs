//! Threads that carry bytes between QEMU's channels and this process, and report what passed.

use crate::job::Message;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

/// What the main thread learns from the others.
#[derive(Debug)]
pub enum Event {
    /// A line on the control port; `None` when it is none that we know.
    Control(Option<Message>),
    /// So many bytes of standard output were passed on in all.
    Stdout(u64),
    /// So many bytes of standard error were passed on in all.
    Stderr(u64),
    /// Our own output cannot be written any more.
    OutputFailed(io::Error),
    /// QEMU closed the control port: it has ended.
    Closed,
}

/// Copies what comes from `source` to `sink`, each chunk as it comes, and reports the total after each.
pub fn output(
    mut source: UnixStream,
    mut sink: impl Write + Send + 'static,
    events: Sender<Event>,
    total_event: fn(u64) -> Event,
) -> JoinHandle<()> {
    thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        let mut total = 0;
        while let Ok(count @ 1..) = source.read(&mut buffer) {
            if let Err(error) = sink.write_all(&buffer[..count]).and_then(|()| sink.flush()) {
                let _ = events.send(Event::OutputFailed(error));
                return;
            }
            total += count as u64;
            if events.send(total_event(total)).is_err() {
                return;
            }
        }
    })
}

/// Reads the control port.
pub fn control(source: UnixStream, events: Sender<Event>) -> JoinHandle<()> {
    thread::spawn(move || {
        // A line longer than this is none of ours, and is cut.
        for line in BufReader::new(source).take(1 << 20).lines() {
            let Ok(line) = line else { break };
            if events.send(Event::Control(Message::parse(&line))).is_err() {
                return;
            }
        }
        let _ = events.send(Event::Closed);
    })
}

/// Sends our standard input into the machine, as `job::port::STDIN` has it. The thread is never joined: a read from a
/// terminal ends with the process.
pub fn input(mut sink: UnixStream) {
    thread::spawn(move || {
        let mut buffer = vec![0; 16 << 10];
        loop {
            let count = io::stdin().read(&mut buffer).unwrap_or(0);
            let length = (count as u32).to_le_bytes();
            if sink
                .write_all(&length)
                .and_then(|()| sink.write_all(&buffer[..count]))
                .is_err()
                || count == 0
            {
                return;
            }
        }
    });
}

/// The last of what was written to it.
#[derive(Debug, Clone, Default)]
pub struct Tail(Arc<Mutex<Vec<u8>>>);

impl Tail {
    const LIMIT: usize = 32 << 10;

    fn push(&self, bytes: &[u8]) {
        let mut kept = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        kept.extend_from_slice(bytes);
        let excess = kept.len().saturating_sub(Self::LIMIT);
        kept.drain(..excess);
    }

    /// `lines` lines without carriage returns: from the kernel's panic on if there was one, else the last.
    pub fn text(&self, lines: usize) -> String {
        let kept = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let text = String::from_utf8_lossy(&kept).replace('\r', "");
        let all: Vec<&str> = text.lines().collect();
        let panic = all.iter().position(|line| line.contains("Kernel panic"));
        let begin = panic.unwrap_or(all.len().saturating_sub(lines));
        all[begin..all.len().min(begin + lines)].join("\n")
    }
}

/// Keeps the end of a log, and prints all of it on standard error with `prefix` when that is wanted.
pub fn log(source: impl Read + Send + 'static, tail: Tail, prefix: Option<&'static str>) -> JoinHandle<()> {
    thread::spawn(move || {
        let mut source = BufReader::new(source);
        let mut line = Vec::new();
        // A log without line ends is cut into pieces, so that memory stays bounded.
        while let Ok(1..) = source.by_ref().take(4096).read_until(b'\n', &mut line) {
            tail.push(&line);
            if let Some(prefix) = prefix {
                eprintln!("{prefix}{}", String::from_utf8_lossy(&line).trim_end());
            }
            line.clear();
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tail_keeps_the_end() {
        let tail = Tail::default();
        for number in 0..10_000 {
            tail.push(format!("line {number}\r\n").as_bytes());
        }
        assert_eq!(tail.text(2), "line 9998\nline 9999");
        assert!(tail.0.lock().unwrap().len() <= Tail::LIMIT);
    }

    #[test]
    fn tail_begins_with_the_panic() {
        let tail = Tail::default();
        tail.push(b"before\r\nKernel panic - not syncing: x\r\none\r\ntwo\r\n");
        assert_eq!(tail.text(2), "Kernel panic - not syncing: x\none");
    }

    #[test]
    fn log_without_line_ends_is_kept() {
        let tail = Tail::default();
        log(io::Cursor::new(vec![b'x'; 100_000]), tail.clone(), None)
            .join()
            .unwrap();
        assert_eq!(tail.text(1), "x".repeat(Tail::LIMIT));
    }
}
