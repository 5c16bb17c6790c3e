//! What jailing costs: time from the call to the exec, and to the program's end, beside the same without a jail.
//!
//! `jail-cost PROGRAM ROUNDS [HELD [MIB]]`: PROGRAM is shoal-escape; HELD jails run meanwhile; MIB are resident in
//! this process. Mounts are made by the caller (`unshare -m`).

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use shoal_jailer::{
    Executable, HandOver, IdAllocator, IdRange, JailSpec, Jailer, JailerConfig, Mode, Rlimits, cgroup,
};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let number = |i: usize, default| {
        arguments
            .get(i)
            .map_or(Ok(default), |text: &String| text.parse::<usize>())
    };
    let program = Executable::from_path(&std::path::absolute(&arguments[1])?)?;
    let (rounds, held, mib) = (number(2, 200)?, number(3, 0)?, number(4, 0)?);
    let ballast = vec![1_u8; mib << 20];
    let range = IdRange::new(200_000, 10_000)?;
    for mode in [Mode::Off, Mode::detect()] {
        let cgroup_parent = std::env::var_os("CGROUP").map(Into::into);
        let missing_controllers = cgroup::Missing::Report;
        let made = Instant::now();
        let jailer = Jailer::new(&JailerConfig {
            mode,
            uids: range,
            gids: range,
            cgroup_parent,
            missing_controllers,
        })?;
        let made = made.elapsed();
        for lack in jailer.degradations() {
            println!("  lacks {lack}");
        }
        let mut ids = IdAllocator::new(range);
        let (read, write) = std::io::pipe()?;
        let limits = cgroup::Limits {
            memory_max: Some(64 << 20),
            pids_max: Some(8),
            ..Default::default()
        };
        let mut start = |name: &str, argv: &[&str]| -> Result<_, Box<dyn std::error::Error>> {
            let argv: Result<Vec<_>, _> = argv.iter().map(|a| std::ffi::CString::new(*a)).collect();
            let fds = [HandOver {
                fd: read.as_fd(),
                target: 3,
            }];
            Ok(jailer.spawn(
                &program,
                &JailSpec {
                    id: &name.parse()?,
                    ids: ids.allocate()?,
                    argv: &argv?,
                    fds: &fds,
                    limits: &limits,
                    rlimits: Rlimits::default(),
                    oom_score_adj: Some(500),
                    core_scheduling: false,
                    die_with_parent: false,
                },
            )?)
        };
        let mut others = Vec::new();
        for i in 0..held {
            others.push(start(&format!("held-{i}"), &["escape", "hold", "3"])?);
        }
        let (mut starts, mut ends) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            let begin = Instant::now();
            let mut jail = start("cost", &["escape", "exit", "0"])?;
            starts.push(begin.elapsed());
            jail.wait()?;
            if let Some(leaf) = &mut jail.leaf {
                leaf.remove()?;
            }
            ends.push(begin.elapsed());
        }
        drop(write);
        for jail in others {
            jail.wait()?;
            jail.destroy()?;
        }
        report(&format!("{mode:?} call to exec"), &mut starts);
        report(&format!("{mode:?} call to removal"), &mut ends);
        println!("{mode:?} jailer made in {made:?}");
    }
    drop(ballast);
    Ok(())
}

fn report(what: &str, times: &mut [Duration]) {
    times.sort();
    let at = |percent: usize| times[(times.len() - 1) * percent / 100].as_secs_f64() * 1e3;
    println!(
        "{what}: median {:.3} ms, p95 {:.3} ms, max {:.3} ms",
        at(50),
        at(95),
        at(100)
    );
}
