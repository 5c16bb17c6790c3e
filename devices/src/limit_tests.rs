use super::*;

const SECOND: u64 = 1_000_000_000;

fn bucket(per_second: u64, burst: u64) -> Bucket {
    Bucket::new(Rate { per_second, burst })
}

/// Does `tokens` again and again from `start` on, as soon as the bucket lets it, until the clock has come to `end`; how
/// often that was.
fn run(bucket: &mut Bucket, tokens: u64, start: u64, end: u64) -> u64 {
    let (mut now, mut times) = (start, 0);
    loop {
        now += bucket.wait(now);
        if now >= end {
            return times;
        }
        assert_eq!(bucket.wait(now), 0, "what was waited for has come");
        bucket.take(tokens, now);
        times += 1;
    }
}

#[test]
fn the_rate_is_kept_to_the_token() {
    for (per_second, tokens, seconds) in [
        (1000, 1, 10),
        (3, 1, 100),
        (7, 1, 1000),
        (100_000_000, 4096, 3),
        (999_999_937, 1500, 2),
        (1 << 40, 1 << 20, 1),
    ] {
        // A burst of one step: what a clock that counts whole nanoseconds adds to the wait is not lost.
        let mut b = bucket(per_second, tokens);
        let done = run(&mut b, tokens, 0, seconds * SECOND) * tokens;
        let asked = per_second * seconds;
        // A burst at first, and the last may end later.
        assert!(
            (asked..=asked + 2 * tokens).contains(&done),
            "{done} of {asked} at {per_second}/s in steps of {tokens}"
        );
    }
}

#[test]
fn a_burst_is_what_gathered_and_no_more() {
    let mut b = bucket(100, 50);
    assert_eq!(run(&mut b, 1, 0, 1), 50, "full at first");
    assert_eq!(run(&mut b, 1, 0, SECOND), 99, "then as the rate has it");
    // A day of rest is worth one burst.
    let later = 86_400 * SECOND;
    assert_eq!(run(&mut b, 1, later, later + 1), 50);
    // Half a burst gathers in half its time.
    let later = later + SECOND / 4;
    assert_eq!(run(&mut b, 1, later, later + 1), 25);
}

#[test]
fn more_than_a_burst_passes_and_is_paid_for() {
    let mut b = bucket(1000, 10);
    assert_eq!(b.wait(0), 0);
    b.take(5000, 0);
    // Ten of them were there, and one has to be there again.
    assert_eq!(b.wait(0), 4991 * SECOND / 1000);
    assert_eq!(b.wait(4_991 * 1_000_000 - 1), 1);
    assert_eq!(b.wait(4_991 * 1_000_000), 0);
}

#[test]
fn the_greatest_numbers_do_not_overflow() {
    let mut b = bucket(Rate::MAX, Rate::MAX);
    for _ in 0..4 {
        b.take(u64::MAX, u64::MAX);
    }
    assert!(b.wait(u64::MAX) > 0 && b.span() == SECOND);
    let mut slow = bucket(1, Rate::MAX);
    (0..4).for_each(|_| slow.take(u64::MAX, 0));
    assert_eq!(slow.wait(0), u64::MAX, "longer than a clock counts");
    assert_eq!(slow.span(), u64::MAX);
}

#[test]
fn numbers_are_checked_once_at_the_boundary() {
    let rate = |per_second, burst| Rate { per_second, burst };
    for good in [
        rate(1, 1),
        rate(Rate::MAX, Rate::MAX),
        Rate::per_second(1),
        Rate::per_second(Rate::MAX),
    ] {
        assert_eq!(good.check(), Ok(()), "{good:?}");
    }
    for (bad, field) in [
        (rate(0, 1), "per_second"),
        (rate(1, 0), "burst"),
        (rate(u64::MAX, 1), "per_second"),
        (rate(1, u64::MAX), "burst"),
        (rate(Rate::MAX + 1, 1), "per_second"),
    ] {
        assert_eq!(bad.check().unwrap_err().field, field, "{bad:?}");
    }
    let limits = DeviceLimits::Net {
        rx: Limits::default(),
        tx: Limits {
            operations: Some(rate(5, 0)),
            ..Limits::default()
        },
    };
    let text = check(&limits).unwrap_err().to_string();
    assert_eq!(
        text,
        "tx_limits.operations: burst is 0, it has to be from 1 to 1099511627776"
    );
}

#[test]
fn limits_are_changed_by_the_board_and_wrong_ones_are_not_taken() {
    let limits = |n| Limits {
        operations: Some(Rate::per_second(n)),
        ..Limits::default()
    };
    let board = LimitBoard::default();
    let cell = Arc::new(LimitCell::new(DeviceLimits::All(Limits::default())).unwrap());
    board.add(cell.clone());
    let mut limiter = Limiter::new(cell.clone(), Path::First);
    assert!(limiter.timer().is_none(), "what is not limited needs no timer");
    limiter.look();
    assert!(limiter.operations.is_none());

    board.set(0, DeviceLimits::All(limits(50))).unwrap();
    limiter.look();
    assert_eq!(limiter.operations.unwrap().rate, Rate::per_second(50));
    assert!(limiter.timer().is_some());

    let net = DeviceLimits::Net {
        rx: limits(1),
        tx: limits(1),
    };
    for (device, wrong, want) in [
        (1, DeviceLimits::All(limits(60)), "no device 1"),
        (0, net, "another kind"),
        (
            0,
            DeviceLimits::All(limits(u64::MAX)),
            "limits.operations: per_second is 18446744073709551615",
        ),
    ] {
        let text = board.set(device, wrong).unwrap_err().to_string();
        assert!(
            text.contains(want) || want == "another kind" && text.contains("this kind"),
            "{text}"
        );
        limiter.look();
        assert_eq!(limiter.operations.unwrap().rate.per_second, 50, "as it was");
    }
    board.set(0, DeviceLimits::All(Limits::default())).unwrap();
    limiter.look();
    assert!(limiter.operations.is_none() && limiter.admits());
}

#[test]
fn each_direction_of_a_network_has_its_own() {
    let of = |n| Limits {
        bandwidth: Some(Rate::per_second(n)),
        ..Limits::default()
    };
    let cell = Arc::new(LimitCell::new(DeviceLimits::Net { rx: of(1), tx: of(2) }).unwrap());
    let rate = |path| {
        Limiter::new(cell.clone(), path)
            .bandwidth
            .unwrap()
            .rate
            .per_second
    };
    assert_eq!((rate(Path::First), rate(Path::Second)), (1, 2));
}
