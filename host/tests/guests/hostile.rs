//! A guest that writes rubbish to every register and ring of every device. Bare metal: it runs wherever KVM does.

use std::fs;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use shoal_host::{Disk, GuestSpec, Network, State, StopReason, Vsock};

use crate::fleet::{Fleet, Guest, Tap, kvm_opens};

const TEST: &str = "rubbish_ends_nothing_and_spins_nothing";
/// Steps of rubbish for each seed.
const STEPS: u32 = 20_000;
/// What a guest that halts may cost while the test works for [`WORK`]: far less than its fair share of a CPU.
const IDLE: Duration = Duration::from_millis(50);
const WORK: Duration = Duration::from_millis(300);
/// How often the VMM may be found busy: it may have to finish what the guest asked for before it halted.
const ROUNDS: u32 = 20;

/// CPU time of a process (resolution 10 ms).
fn cpu_time(pid: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("the VMM lives");
    // The name, in parentheses, may hold anything; user and system time are the 12th and 13th field behind it.
    let fields = stat.rsplit_once(')').expect("a name in parentheses").1;
    let ticks = fields.split_whitespace().skip(11).take(2);
    let ticks: u64 = ticks.map(|t| t.parse::<u64>().expect("a number of ticks")).sum();
    Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second())
}

/// Works until this thread has used `time` of a CPU.
fn work(time: Duration) {
    let used = || {
        let t = clock_gettime(ClockId::ThreadCPUTime);
        Duration::new(t.tv_sec as u64, t.tv_nsec as u32)
    };
    let until = used() + time;
    while used() < until {
        std::hint::spin_loop();
    }
}

/// CPU time of the VMM while this thread works for [`WORK`], measured until `enough` says so, a bounded number of times.
/// They compete: while this thread gets CPU time, one of the VMM that spins gets as much, however busy the machine is.
fn cost(guest: &Guest<'_>, enough: impl Fn(Duration) -> bool) -> Duration {
    let mut used = Duration::ZERO;
    for _ in 0..ROUNDS {
        let before = cpu_time(guest.pid());
        work(WORK);
        used = cpu_time(guest.pid()) - before;
        if enough(used) {
            break;
        }
    }
    used
}

#[test]
fn rubbish_ends_nothing_and_spins_nothing() {
    if !kvm_opens(TEST) {
        return;
    }
    let tap = Tap::new().inspect_err(|why| println!("{TEST}: without a network device: {why}"));
    let fleet = Fleet::new();
    let probe = fleet.probe();
    let disk = |id: &str, read_only| Disk {
        id: id.into(),
        path: fleet.disk_file(id, 1 << 20),
        read_only,
        ..Disk::default()
    };
    let networks = tap.iter().map(|tap| Network {
        tap: tap.name().into(),
        ..Network::default()
    });
    let spec = GuestSpec {
        disks: vec![disk("written", false), disk("read", true)],
        networks: networks.collect(),
        vsock: Some(Vsock::default()),
        ..GuestSpec::new(probe, 1, 32)
    };
    // What is measured tells a guest that spins.
    let spinning = GuestSpec {
        cmdline: "exit=spin".into(),
        ..GuestSpec::new(fleet.probe(), 1, 32)
    };
    let spinning = fleet.start(spinning);
    spinning.await_output("probe: ready");
    let used = cost(&spinning, |used| used > IDLE);
    assert!(
        used > IDLE,
        "a guest that spins used {used:?} of the CPU while the test used {WORK:?}"
    );
    println!("{TEST}: one that spins used {used:?} of the CPU while the test used {WORK:?}");
    assert_eq!(spinning.stop(Duration::ZERO).reason, StopReason::Killed);

    for seed in 1..=4 {
        let mut spec = spec.clone();
        spec.cmdline = format!("seed={seed} garbage={STEPS} exit=halt");
        let guest = fleet.start(spec);
        guest.await_output("probe: halt");
        let used = cost(&guest, |used| used <= IDLE);
        assert!(
            used <= IDLE,
            "it halts, and used {used:?} of the CPU while the test used {WORK:?}"
        );
        println!(
            "{TEST}: seed {seed}: {STEPS} steps; halted, it used {used:?} of the CPU while the test used {WORK:?}"
        );
        assert_eq!(guest.view().state, State::Running);
        // It still listens.
        let end = guest.stop(Duration::ZERO);
        assert_eq!(end.reason, StopReason::Killed);
    }
    let read = fs::read(fleet.path("read")).expect("the disk is there");
    assert!(read.iter().all(|b| *b == 0), "the read-only disk was written");
}
