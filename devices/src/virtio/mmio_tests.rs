use std::sync::Mutex;

use super::super::rng::RngSpec;
use super::*;
use crate::spec::{BuildEnv, DeviceSpec};
use crate::testing::{DATA, MmioBench, writable};

fn rng() -> Box<dyn VirtioDevice> {
    RngSpec::default()
        .build(&mut BuildEnv::new(Vec::new()), None)
        .unwrap()
}

#[test]
fn a_driver_gets_from_magic_to_data() {
    let mut b = MmioBench::new(rng());
    assert_eq!([b.get(0), b.get(4), b.get(8)], [0x7472_6976, 2, 4]);
    let mut queue = b.drive().remove(0);
    assert_eq!(b.get(0x70), 0xf);
    queue.add(&[writable(DATA, 4096)]);
    b.set(NOTIFY_OFFSET, 0);
    assert!(b.wait_irq());
    assert_eq!(b.get(0x60), INT_USED);
    b.set(0x64, INT_USED);
    assert_eq!(b.get(0x60), 0);
    assert_eq!(queue.used(), Some((0, 4096)));
}

#[test]
fn driver_ok_calls_the_hook_once() {
    let mut b = MmioBench::new(rng());
    let calls = Arc::new(AtomicU32::new(0));
    let seen = calls.clone();
    b.transport
        .on_driver_ok(Box::new(move || _ = seen.fetch_add(1, Ordering::SeqCst)));
    b.negotiate();
    assert_eq!(calls.load(Ordering::SeqCst), 0);
    b.set_up_queue(0);
    b.set(0x70, 0xf);
    b.set(0x70, 0xf);
    assert_eq!(calls.load(Ordering::SeqCst), 1);
}

#[test]
fn a_device_without_its_queue_needs_a_reset_and_recovers_by_it() {
    let mut b = MmioBench::new(rng());
    b.negotiate();
    b.set(0x70, 0xf);
    assert_eq!(b.get(0x70), 0x4f);
    assert!(b.wait_irq());
    assert_eq!(b.get(0x60), INT_CONFIG);
    b.set(0x70, 0);
    assert_eq!([b.get(0x70), b.get(0x60)], [0, 0]);
    b.drive();
    assert_eq!(b.get(0x70), 0xf);
}

#[test]
fn a_broken_ring_stops_only_its_device() {
    let mut b = MmioBench::new(rng());
    let mut queue = b.drive().remove(0);
    // More chains than the ring has entries.
    (0..200).for_each(|_| queue.publish(0));
    let idx = queue.size + 200;
    vm_memory::Bytes::write_obj(&*b.memory, idx, vm_memory::GuestAddress(queue.avail + 2)).unwrap();
    b.set(NOTIFY_OFFSET, 0);
    assert!(b.wait_irq());
    assert_eq!(b.get(0x70), 0x4f);
    b.set(0x70, 0);
    b.drive();
    assert_eq!(b.get(0x70), 0xf);
}

#[test]
fn odd_accesses_read_zero_and_change_nothing() {
    let mut b = MmioBench::new(rng());
    for (offset, len) in [
        (0, 1),
        (0, 8),
        (1, 4),
        (0xff, 4),
        (0x1000, 4),
        (u64::MAX, 8),
        (0, 0),
        (0x60, 2),
    ] {
        let mut data = [0xaa; 8];
        b.transport.read(offset, &mut data[..len]);
        assert!(data[..len].iter().all(|&d| d == 0), "{offset:#x}+{len}");
        b.transport.write(offset, &data[..len]);
    }
    assert_eq!(b.get(0x70), 0);
}

#[test]
fn a_guest_cannot_flood_the_log() {
    let lines = Arc::new(Mutex::new(0));
    let count = lines.clone();
    let event_loop = crate::testing::LoopThread::new();
    let mut parts = MmioBench::parts(rng(), crate::testing::memory(), &event_loop);
    parts.log = Arc::new(move |_| *count.lock().unwrap() += 1);
    let mut t = MmioTransport::new(parts).unwrap();
    (0..10_000).for_each(|_| t.write(0xf0, &[1, 2, 3, 4]));
    let lines = *lines.lock().unwrap();
    assert!((1..=LimitedLog::BURST).contains(&lines), "{lines}");
}

#[test]
fn a_saved_transport_goes_on_where_it_stopped() {
    let mut b = MmioBench::new(rng());
    let mut queue = b.drive().remove(0);
    queue.add(&[writable(DATA, 16)]);
    b.set(NOTIFY_OFFSET, 0);
    assert!(b.wait_irq());
    assert_eq!(queue.used(), Some((0, 16)));
    let state = b.transport.save().unwrap();
    let bytes = Section::encode(&state).unwrap();
    // Added while nothing runs; the notification is lost with the old machine.
    queue.add(&[writable(DATA, 32)]);

    let parts = MmioBench::parts(rng(), b.memory.clone(), &b.event_loop);
    b.irq = parts.irq.clone();
    b.transport = MmioTransport::restore(parts, &bytes.decode().unwrap()).unwrap();
    assert_eq!([b.get(0x70), b.get(0x60)], [0xf, INT_USED]);
    b.transport.resume();
    assert!(b.wait_irq());
    assert_eq!(queue.used(), Some((1, 32)));
    assert_eq!(b.transport.save().unwrap().core, b.transport.core.state());
}

#[test]
fn another_device_s_state_is_refused() {
    let mut b = MmioBench::new(rng());
    let mut state = b.transport.save().unwrap();
    state.kind = DeviceKind::Block;
    let parts = MmioBench::parts(rng(), b.memory.clone(), &b.event_loop);
    assert!(matches!(
        MmioTransport::restore(parts, &state),
        Err(RestoreError::Kind { .. })
    ));
}

#[test]
fn queue_positions_do_not_outlive_a_reset() {
    let mut b = MmioBench::new(rng());
    for _ in 0..2 {
        let mut queue = b.drive().remove(0);
        (0..5).for_each(|_| _ = queue.add(&[writable(DATA, 16)]));
        b.set(NOTIFY_OFFSET, 0);
        assert!(b.wait_irq());
        b.set(0x70, 0);
        assert_eq!((0..5).map_while(|_| queue.used()).count(), 5);
    }
}

#[test]
fn a_driver_may_set_a_queue_up_again_before_it_starts() {
    let mut b = MmioBench::new(rng());
    b.negotiate();
    b.set_up_queue(0);
    b.set(0x80, 0x5000);
    assert_eq!(b.get(0x44), 1);
    b.set(0x44, 0);
    assert_eq!(b.get(0x44), 0);
    b.set_up_queue(0);
    b.set(0x70, 0xf);
    assert_eq!(b.get(0x70), 0xf);
    b.set(0x44, 0);
    assert_eq!(b.get(0x44), 1, "not while it runs");
}
