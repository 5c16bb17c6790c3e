//! Sockets between host and guest.

use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};

use shoal_host::StopReason;

use crate::fleet::{Fleet, Guest, PATIENCE, jeos, linux_runs};
use crate::pattern::{self, ANSWER, OFFER};

const BYTES: u64 = 4 << 20;

/// Asks the guest's socket for a port; `None` when nobody listens there.
fn dial(guest: &Guest<'_>, port: u32) -> Option<UnixStream> {
    let path = guest
        .view()
        .vsock
        .as_ref()
        .expect("it has a socket device")
        .socket
        .clone();
    let mut stream = UnixStream::connect(path).expect("connecting to vsock.sock");
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    writeln!(stream, "CONNECT {port}").unwrap();
    // One byte at a time: what follows the line is the guest's.
    let mut line = String::new();
    BufReader::with_capacity(1, &stream)
        .read_line(&mut line)
        .expect("an answer");
    match line.strip_prefix("OK ") {
        Some(_) => Some(stream),
        None => {
            assert_eq!(line, "", "neither yes nor no");
            None
        }
    }
}

#[test]
fn sockets_both_ways() {
    if !linux_runs("sockets_both_ways") {
        return;
    }
    let fleet = Fleet::new();
    let listen = format!("guest-work vsock-listen 5000 {BYTES} || exit 1");
    let connect = format!("guest-work vsock-connect 6000 {BYTES} || exit 2");
    let refused = "if guest-work vsock-connect 6001 1; then exit 3; fi";
    let guest = fleet.start(jeos("", &[&listen, &connect, refused, "exit 42"]));
    guest.await_output("listening at 5000");
    assert!(
        dial(&guest, 5999).is_none(),
        "nobody listens at port 5999 of the guest"
    );

    let socket = guest.view().vsock.as_ref().unwrap().socket.clone();
    let listener = UnixListener::bind(format!("{}_6000", socket.display())).unwrap();
    let mut stream = dial(&guest, 5000).expect("the guest listens at port 5000");
    pattern::send(&mut stream, OFFER, BYTES).expect("sending to the guest");
    stream.shutdown(Shutdown::Write).unwrap();
    pattern::expect(&mut stream, ANSWER, BYTES).expect("what the guest answers");

    let (mut stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    pattern::expect(&mut stream, OFFER, BYTES).expect("what the guest sends");
    pattern::send(&mut stream, ANSWER, BYTES).expect("answering the guest");
    drop(stream);

    let end = guest.end();
    end.assert_is(StopReason::PowerOff, Some(42));
    let refused = end.console.lines().find(|l| l.contains("vsock-connect 6001"));
    println!(
        "sockets_both_ways: {}",
        refused.unwrap_or("the refusal was not told")
    );
    assert!(refused.is_some_and(|l| l.contains("failed: ")), "{}", end.console);
}
