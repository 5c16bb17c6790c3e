use super::*;
use crate::testing::{Bench, DATA, END, readable, writable};

fn bench() -> Bench {
    Bench::new(
        RngSpec::default()
            .build(&mut BuildEnv::new(Vec::new()), None)
            .unwrap(),
    )
}

#[test]
fn buffers_are_filled_with_random_bytes() {
    let mut b = bench();
    b.queues[0].add(&[writable(DATA, 100), writable(DATA + 1000, 3000)]);
    b.kick(0);
    assert_eq!(b.queues[0].used(), Some((0, 3100)));
    assert_eq!(b.interrupts(), 1);
    let bytes = b.read(DATA + 1000, 3000);
    let distinct = bytes.iter().collect::<std::collections::HashSet<_>>().len();
    assert!(distinct > 200, "{distinct} distinct values in 3,000 bytes");
    assert!(
        b.read(DATA + 100, 900).iter().all(|&x| x == 0),
        "nothing between the buffers is touched"
    );
}

#[test]
fn one_request_is_bounded() {
    let mut b = bench();
    b.queues[0].add(&[writable(DATA, u32::MAX)]);
    b.kick(0);
    assert_eq!(b.queues[0].used(), Some((0, MAX_REQUEST)));
}

#[test]
fn what_cannot_be_written_is_given_back_empty() {
    let mut b = bench();
    b.queues[0].add(&[readable(DATA, 64)]);
    b.queues[0].add(&[writable(END, 64)]);
    b.queues[0].add(&[writable(u64::MAX - 3, 64)]);
    b.queues[0].add(&[writable(DATA, 0)]);
    b.kick(0);
    for head in 0..4 {
        assert_eq!(b.queues[0].used(), Some((head, 0)));
    }
    assert!(!b.needs_reset());
}

#[test]
fn a_full_ring_takes_several_wake_ups_and_is_served_whole() {
    let mut b = bench();
    for _ in 0..QUEUE_SIZE {
        b.queues[0].add(&[writable(DATA, 8)]);
    }
    b.kick(0);
    let served = std::iter::from_fn(|| b.queues[0].used()).count();
    assert_eq!(served, usize::from(QUEUE_SIZE));
}

#[test]
fn no_more_is_given_than_its_limit_allows() {
    let spec = RngSpec {
        limits: Limits {
            bandwidth: Some(crate::limit::Rate {
                per_second: 1,
                burst: 1000,
            }),
            ..Limits::default()
        },
    };
    let mut env = BuildEnv::new(Vec::new());
    let board = env.limits();
    let mut b = Bench::new(spec.build(&mut env, None).unwrap());
    for _ in 0..10 {
        b.queues[0].add(&[writable(DATA, 600)]);
    }
    b.kick(0);
    // The second is begun with what the first has left, and owes the rest.
    assert_eq!(std::iter::from_fn(|| b.queues[0].used()).count(), 2);
    assert!(!b.turn_once(0), "what is held back does not keep the loop awake");
    b.set_limits(&board, DeviceLimits::All(Limits::default()));
    assert_eq!(std::iter::from_fn(|| b.queues[0].used()).count(), 8);
}
