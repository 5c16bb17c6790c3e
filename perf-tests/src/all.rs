//! Every benchmark that this machine can run, one after another, and the page of their results.

use std::fs::{self, File};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::boot::BesideArgs;
use crate::driver::{on_path, sibling};
use crate::linux::Ours;
use crate::machine::{Machine, mem_available};
use crate::peers::PeerArg;
use crate::results::{Measured, ResultFile};
use crate::signal::interrupted;
use crate::{api, boot, churn, costs, density, io, jail, linux, report, served};

/// What `all` runs, and where its results go.
#[derive(clap::Args)]
pub struct AllArgs {
    /// The folder for results (NAME.json), the page (report.html) and its plots (plots/*.svg, *.png)
    #[arg(long, default_value = "build/bench", value_name = "DIR")]
    out: PathBuf,
    /// Only these benchmarks
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    only: Vec<String>,
    /// Other VMMs to compare with: qemu=PATH, firecracker=PATH or cloud-hypervisor=PATH (repeatable)
    #[arg(
        long = "peer",
        value_name = "NAME=PATH",
        default_value = "qemu=qemu-system-x86_64"
    )]
    peers: Vec<PeerArg>,
    /// Of which commit or release the figures are; the report's history shows it
    #[arg(long, default_value = "", value_name = "TEXT")]
    label: String,
    /// Earlier results (files, or folders of them) for the report's history
    #[arg(long, value_name = "PATH")]
    history: Vec<PathBuf>,
}

/// What a benchmark cannot do without.
#[derive(Clone, Copy)]
enum Need {
    /// A /dev/kvm that opens.
    Kvm,
    /// One that boots Linux.
    HardwareKvm,
    /// The lab.
    Lab,
    /// A guest of ours.
    Guest(Ours),
    /// A network namespace and a TAP in it.
    Network,
    /// A program of this machine, which goes into a guest.
    Program(&'static str),
}

impl Need {
    /// Why it is not there.
    fn missing(self, machine: &Machine) -> Option<String> {
        match self {
            Self::Kvm => match File::options().read(true).write(true).open("/dev/kvm") {
                Ok(_) => None,
                Err(e) => Some(format!("/dev/kvm does not open: {e}")),
            },
            Self::HardwareKvm => (!machine.kvm.starts_with("hardware")).then(|| {
                format!(
                    "Linux guests do not boot on this machine's KVM, which is: {}",
                    machine.kvm
                )
            }),
            Self::Lab => match (sibling("shoal-lab"), on_path("qemu-system-x86_64")) {
                (Err(e), _) => Some(format!("{e:#}")),
                (_, None) => {
                    Some("qemu-system-x86_64 is not on PATH, and the lab runs in it: make deps".into())
                }
                _ => None,
            },
            Self::Guest(ours) => ours.resolve().err().map(|e| format!("{e:#}")),
            Self::Network => io::net::missing(),
            Self::Program(name) => io::linux::missing(name),
        }
    }
}

/// A benchmark.
struct Bench {
    /// Its name, and that of its file.
    name: &'static str,
    needs: &'static [Need],
    run: fn(&AllArgs) -> Result<(&'static str, Measured)>,
}

impl Bench {
    fn in_lab(&self) -> bool {
        self.needs.iter().any(|need| matches!(need, Need::Lab))
    }
}

/// All. Those in the lab are run after the others, several at a time.
const BENCHES: &[Bench] = &[
    Bench {
        name: "boot-probe",
        needs: &[Need::Kvm],
        run: |args| {
            let boot = boot::probe(40, &BesideArgs::all(&args.peers))?;
            Ok((boot::PROBE, Measured::BootProbe(boot)))
        },
    },
    Bench {
        name: "boot-lab-reference",
        needs: &[Need::Lab, Need::Guest(Ours::Reference)],
        run: |args| {
            Ok((
                linux::LAB,
                Measured::BootLinux(linux::lab(&Ours::Reference.resolve()?, 3, &args.peers)?),
            ))
        },
    },
    Bench {
        name: "boot-lab-image",
        needs: &[Need::Lab, Need::Guest(Ours::Image)],
        run: |_| {
            Ok((
                linux::LAB,
                Measured::BootLinux(linux::lab(&Ours::Image.resolve()?, 3, &[])?),
            ))
        },
    },
    Bench {
        name: "boot-lab-daemon",
        needs: &[Need::Lab, Need::Guest(Ours::Image)],
        run: |_| Ok((served::LAB, Measured::BootLinux(served::lab(3)?))),
    },
    Bench {
        name: "boot-here-image",
        needs: &[Need::Kvm, Need::HardwareKvm, Need::Guest(Ours::Image)],
        run: |args| {
            Ok((
                linux::HERE,
                Measured::BootLinux(linux::here(&Ours::Image.resolve()?, 20, &args.peers)?),
            ))
        },
    },
    Bench {
        name: "api",
        needs: &[Need::Kvm],
        run: |_| Ok((api::PROBE, Measured::Api(api::probe(&api::ApiArgs::default())?))),
    },
    Bench {
        name: "costs-lab",
        needs: &[Need::Lab],
        run: |_| Ok((costs::LAB, Measured::Costs(costs::lab()?))),
    },
    Bench {
        name: "churn",
        needs: &[Need::Kvm],
        run: |_| Ok((churn::PROBE, Measured::Churn(churn::probe(20.0, 10)?))),
    },
    Bench {
        name: "jail",
        needs: &[Need::Kvm],
        run: |_| {
            Ok((
                jail::METHOD,
                Measured::Jail(jail::measure(&jail::JailArgs::default())?),
            ))
        },
    },
    Bench {
        name: "density-probe",
        needs: &[Need::Kvm],
        run: |_| Ok((density::PROBE, Measured::Density(density::probe(200)?))),
    },
    Bench {
        name: "block",
        needs: &[Need::Kvm],
        run: |args| {
            let result = io::block::measure(&io::block::BlockArgs::all(&args.peers))?;
            Ok((io::METHOD, Measured::Io(result)))
        },
    },
    Bench {
        name: "net",
        needs: &[Need::Kvm, Need::Network],
        run: |args| {
            let result = io::net::measure(&io::net::NetArgs::all(&args.peers))?;
            Ok((io::METHOD, Measured::Io(result)))
        },
    },
    Bench {
        name: "vsock",
        needs: &[Need::Kvm],
        run: |_| {
            Ok((
                io::METHOD,
                Measured::Io(io::vsock::measure(&io::vsock::VsockArgs::all())?),
            ))
        },
    },
    Bench {
        name: "block-fio",
        needs: &[Need::Lab, Need::Guest(Ours::Image), Need::Program("fio")],
        run: |_| {
            let args = io::block::BlockArgs::all_fio();
            Ok((args.method(), Measured::Io(io::block::measure(&args)?)))
        },
    },
    Bench {
        name: "net-iperf3",
        needs: &[Need::Lab, Need::Guest(Ours::Image), Need::Program("iperf3")],
        run: |_| {
            let args = io::net::NetArgs::all_iperf3();
            Ok((args.method(), Measured::Io(io::net::measure(&args)?)))
        },
    },
    Bench {
        name: "limits",
        needs: &[Need::Kvm],
        run: |_| {
            let result = io::limits::measure(&io::limits::LimitsArgs::short())?;
            Ok((io::limits::METHOD, Measured::Limits(result)))
        },
    },
    Bench {
        name: "density-lab",
        needs: &[Need::Lab],
        run: |_| Ok((density::LAB, Measured::Density(density::lab(200)?))),
    },
];

/// Runs all that can run here. What cannot is told, what fails is told, and the rest goes on; the page is made of what
/// was measured. An error says how many failed.
pub fn run(args: &AllArgs) -> Result<()> {
    check_names(&args.only)?;
    fs::create_dir_all(&args.out).with_context(|| format!("making the folder {}", args.out.display()))?;
    let chosen = |b: &&Bench| args.only.is_empty() || args.only.iter().any(|n| n == b.name);
    let benches: Vec<&Bench> = BENCHES.iter().filter(chosen).collect();
    let tally = Mutex::new(Tally::default());
    let (lab, here): (Vec<_>, Vec<_>) = benches.iter().enumerate().partition(|(_, b)| b.in_lab());
    let try_one = |(i, bench): (usize, &&Bench)| {
        if !interrupted() {
            println!("== {}/{} {}", i + 1, benches.len(), bench.name);
            attempt(args, bench, i, &tally);
        }
    };
    here.into_iter().for_each(try_one);
    let waiting = Mutex::new(lab.into_iter());
    thread::scope(|scope| {
        for _ in 0..labs_at_once() {
            scope.spawn(|| {
                loop {
                    let next = lock(&waiting).next();
                    let Some(next) = next else { return };
                    try_one(next);
                }
            });
        }
    });
    let mut tally = tally.into_inner().unwrap_or_else(PoisonError::into_inner);
    tally.files.sort();
    let files: Vec<PathBuf> = tally.files.into_iter().map(|(_, path)| path).collect();
    println!(
        "== {} measured, {} failed, {} skipped",
        files.len(),
        tally.failed.len(),
        tally.skipped
    );
    make_page(args, &files)?;
    if interrupted() {
        bail!(
            "interrupted: what was measured until then is in {}",
            args.out.display()
        );
    }
    if !tally.failed.is_empty() {
        bail!("failed: {}; the reasons are above", tally.failed.join(", "));
    }
    Ok(())
}

/// What came of the benchmarks.
#[derive(Default)]
struct Tally {
    /// Results, with the places of their benchmarks among all.
    files: Vec<(usize, PathBuf)>,
    failed: Vec<&'static str>,
    skipped: usize,
}

/// One for each processor, if there is memory for them: in the lab time is counted in instructions, so that nothing is
/// measured differently when other work goes on.
fn labs_at_once() -> usize {
    /// Of a machine of 2 GiB that is full, and of QEMU itself.
    const BYTES: u64 = 3 << 30;
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let room = mem_available().map_or(1, |bytes| bytes / BYTES);
    processors.min(room as usize).max(1)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Measures one where that can be done, and tells what came of it.
fn attempt(args: &AllArgs, bench: &Bench, place: usize, tally: &Mutex<Tally>) {
    let machine = Machine::here();
    if let Some(why) = bench.needs.iter().find_map(|need| need.missing(&machine)) {
        println!("SKIP: {}: {why}", bench.name);
        lock(tally).skipped += 1;
        return;
    }
    let begin = Instant::now();
    let done = one(args, bench, machine);
    // Two that are done at the same moment tell one after the other.
    let mut tally = lock(tally);
    match done.and_then(|(result, path)| result.deliver(false, Some(&path)).map(|()| path)) {
        Ok(path) => {
            println!("   {:.0} s, in {}", begin.elapsed().as_secs_f64(), path.display());
            tally.files.push((place, path));
        }
        // Ctrl-C reaches the lab too.
        Err(_) if interrupted() => println!(
            "   {} was interrupted before it had measured anything",
            bench.name
        ),
        Err(e) => {
            eprintln!("shoal-perf: {} failed: {e:#}", bench.name);
            tally.failed.push(bench.name);
        }
    }
}

fn check_names(only: &[String]) -> Result<()> {
    let known = || BENCHES.iter().map(|b| b.name);
    match only.iter().find(|n| !known().any(|k| k == n.as_str())) {
        None => Ok(()),
        Some(n) => bail!(
            "there is no benchmark {n:?}; there are {}",
            known().collect::<Vec<_>>().join(", ")
        ),
    }
}

/// Measures one; the result and the file that it belongs into.
fn one(args: &AllArgs, bench: &Bench, machine: Machine) -> Result<(ResultFile, PathBuf)> {
    let path = args.out.join(bench.name).with_extension("json");
    // An older result must not pass for one of this run, should this fail.
    match fs::remove_file(&path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(e).with_context(|| format!("removing the older {}", path.display()));
        }
        _ => {}
    }
    let (method, measured) = (bench.run)(args)?;
    let mut result = ResultFile::new(method, machine, interrupted(), measured);
    result.label.clone_from(&args.label);
    Ok((result, path))
}

fn make_page(args: &AllArgs, files: &[PathBuf]) -> Result<()> {
    if files.is_empty() {
        println!("nothing was measured: no report");
        return Ok(());
    }
    let (page, plots) = (args.out.join("report.html"), args.out.join("plots"));
    let output = report::Output {
        page: &page,
        svg: Some(&plots),
        png: Some(&plots),
    };
    report::write(files, &args.history, &output)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_known_and_different() {
        let mut names: Vec<_> = BENCHES.iter().map(|b| b.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), BENCHES.len());
        assert!(check_names(&["boot-probe".into()]).is_ok());
        let told = check_names(&["boot".into()]).unwrap_err().to_string();
        assert!(
            told.contains("\"boot\"") && told.contains("density-lab"),
            "{told}"
        );
    }

    #[test]
    fn what_is_missing_is_named() {
        let mut machine = Machine::here();
        machine.kvm = "pagetable (no hardware virtualization)".into();
        let why = Need::HardwareKvm.missing(&machine).unwrap();
        assert!(why.contains("pagetable"), "{why}");
        machine.kvm = "hardware (VMX)".into();
        assert!(Need::HardwareKvm.missing(&machine).is_none());
        assert!(on_path("no-such-program").is_none() && on_path("sh").is_some());
        let why = Need::Program("no-such-program").missing(&machine).unwrap();
        assert!(why.contains("deps.sh --bench"), "{why}");
    }
}
