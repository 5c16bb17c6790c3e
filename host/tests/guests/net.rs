//! TCP through a TAP.

use std::net::{Shutdown, TcpListener, TcpStream};

use shoal_host::{Network, StopReason};

use crate::fleet::{Fleet, PATIENCE, Tap, jeos, linux_runs, value};
use crate::pattern::{self, ANSWER, OFFER};

const TEST: &str = "tcp_through_a_tap_both_ways";
const BYTES: u64 = 8 << 20;
/// Largest frame without offloads (bytes): MTU and Ethernet header.
const FRAME: u64 = 1514;

/// Bytes per packet that the TAP counted in one direction.
fn packet_size(tap: &Tap, direction: &str) -> u64 {
    tap.counter(&format!("{direction}_bytes")) / tap.counter(&format!("{direction}_packets"))
}

#[test]
fn tcp_through_a_tap_both_ways() {
    if !linux_runs(TEST) {
        return;
    }
    match Tap::new() {
        Ok(tap) => tcp_both_ways(&tap, 1),
        Err(why) => println!("SKIP: {TEST}: no TAP can be made: {why}"),
    }
}

/// Over a TAP with as many queues, which a guest with as many vCPUs uses all. Its addresses are for documentation
/// (RFC 5737): nobody's network.
pub fn tcp_both_ways(tap: &Tap, queues: u32) {
    let fleet = Fleet::new();
    let listener = TcpListener::bind("198.51.100.1:7001").expect("the TAP's address is ours");
    let listen = format!("guest-work tcp-listen 198.51.100.2:7000 {BYTES} || exit 1");
    let connect = format!("guest-work tcp-connect 198.51.100.1:7001 {BYTES} || exit 2");
    let mut spec = jeos(
        "shoal.ip=198.51.100.2/24",
        &[
            "cat /sys/class/net/eth0/address",
            "echo queues=$(ls -d /sys/class/net/eth0/queues/rx-* | wc -l)",
            &listen,
            &connect,
            "exit 42",
        ],
    );
    spec.vcpus = queues;
    spec.networks.push(Network {
        tap: tap.name().into(),
        mac: Some("02:00:00:aa:bb:01".parse().expect("an address")),
        queues,
        ..Network::default()
    });
    let guest = fleet.start(spec);
    let console = guest.await_output("listening at 198.51.100.2:7000");
    assert!(console.contains("02:00:00:aa:bb:01"), "{console}");
    assert_eq!(value(&console, "queues"), queues.to_string());

    let mut stream = TcpStream::connect("198.51.100.2:7000").expect("the guest listens");
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    pattern::send(&mut stream, OFFER, BYTES).expect("sending to the guest");
    stream.shutdown(Shutdown::Write).unwrap();
    pattern::expect(&mut stream, ANSWER, BYTES).expect("what the guest answers");

    let (mut stream, from) = listener.accept().unwrap();
    assert_eq!(from.ip().to_string(), "198.51.100.2");
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    pattern::expect(&mut stream, OFFER, BYTES).expect("what the guest sends");
    pattern::send(&mut stream, ANSWER, BYTES).expect("answering the guest");
    drop(stream);

    let end = guest.end();
    end.assert_is(StopReason::PowerOff, Some(42));
    // What the TAP receives is what the guest sent. Packets larger than a frame were segmented by nobody.
    let (sent, received) = (packet_size(tap, "rx"), packet_size(tap, "tx"));
    println!(
        "{TEST}: the guest sent {sent} bytes a packet, and received {received}, acknowledgements included"
    );
    assert!(sent > FRAME && received > FRAME, "offloads are not in use");
}
