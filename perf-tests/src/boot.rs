//! Boot latency.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
use shoal_vmm::protocol::{Pages, Step};

use crate::driver::{Guest, Started, sibling, start_floor, start_vmm};
use crate::stats::{median, quantile};

/// The command line behind Firecracker's 134 ms (docs/performance.md tells where it comes from).
const REFERENCE_CMDLINE: &str = "console=ttyS0 quiet 8250.nr_uarts=1 i8042.noaux i8042.nomux i8042.nopnp \
    i8042.dumbkbd reboot=k panic=-1 pci=off nokaslr";
const REFERENCE_MEMORY_MIB: u64 = 128;
const WARM_UP: u32 = 3;

fn ms(d: std::time::Duration) -> f64 {
    d.as_secs_f64() * 1e3
}

fn bar(runs: u32) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {bar:30} {pos}/{len}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(runs.into())
        .with_style(style)
        .with_message("starts")
}

/// The result of `boot --probe --json`. Times in ms, medians of `runs` interleaved starts.
#[derive(Serialize)]
struct ProbeResult {
    method: &'static str,
    runs: u32,
    floor_ms: f64,
    vmm_ms: f64,
    ratio: f64,
    floor_p90_ms: f64,
    vmm_p90_ms: f64,
    floor_samples_ms: Vec<f64>,
    vmm_samples_ms: Vec<f64>,
    /// The VMM's own stamps, from its `main` on (medians, ms).
    stages: Vec<Stage>,
}

#[derive(Serialize, Deserialize)]
struct Stage {
    step: String,
    at_ms: f64,
}

/// The VMM with a bare-metal guest and the floor, in turns.
pub fn probe(runs: u32, json: bool) -> Result<()> {
    let (vmm, floor) = (sibling("shoal-vmm")?, sibling("shoal-floor")?);
    let mut file = tempfile_with(shoal_probe::HALT_PVH)?;
    let kernel = shoal_vmm::kernel::load(&file).context("loading the probe guest")?;
    file.flush()?;
    let guest = Guest {
        kernel,
        initrd: None,
        cmdline: String::new(),
        memory_mib: 128,
        pages: Pages::Small,
    };
    let (mut floors, mut vmms, mut timelines) = (Vec::new(), Vec::new(), Vec::new());
    let progress = bar(runs);
    for run in 0..WARM_UP + runs {
        let f = start_floor(&floor)?;
        let v = start_vmm(&vmm, &guest, b"R")?;
        if run >= WARM_UP {
            floors.push(ms(f));
            vmms.push(ms(v.elapsed));
            timelines.push(v);
            progress.inc(1);
        }
    }
    progress.finish_and_clear();
    let result = ProbeResult {
        method: "/dev/kvm with the probe guest, in turns with the raw-ioctl floor",
        runs,
        floor_ms: median(&floors),
        vmm_ms: median(&vmms),
        ratio: median(&vmms) / median(&floors),
        floor_p90_ms: quantile(&floors, 0.9),
        vmm_p90_ms: quantile(&vmms, 0.9),
        stages: stages(&timelines),
        floor_samples_ms: floors,
        vmm_samples_ms: vmms,
    };
    if json {
        println!("{}", serde_json::to_string_pretty(&result)?);
    } else {
        println!("process start to first guest output, medians of {runs} starts in turns:");
        println!("  floor (raw KVM calls)  {:8.3} ms", result.floor_ms);
        println!("  shoal-vmm              {:8.3} ms", result.vmm_ms);
        println!("  ratio                  {:8.2}", result.ratio);
        print_stages(&result.stages);
    }
    Ok(())
}

/// Medians of when each step was reached, from the VMM's first stamp on.
fn stages(started: &[Started]) -> Vec<Stage> {
    let Some(first) = started.first() else {
        return Vec::new();
    };
    let since_start = |s: &Started, step: Step| {
        let begin = s.timeline.at(Step::ProcessStarted)?;
        Some(s.timeline.at(step)?.saturating_sub(begin) as f64 / 1e6)
    };
    let steps = first.timeline.stamps.iter().map(|s| s.step);
    steps
        .map(|step| {
            let samples: Vec<f64> = started.iter().filter_map(|s| since_start(s, step)).collect();
            Stage {
                step: format!("{step:?}"),
                at_ms: median(&samples),
            }
        })
        .collect()
}

fn print_stages(stages: &[Stage]) {
    println!("from the VMM's main on (medians):");
    for s in stages {
        println!("  {:<22} {:8.3} ms", s.step, s.at_ms);
    }
}

fn tempfile_with(bytes: &[u8]) -> Result<File> {
    let mut file = tempfile::tempfile().context("making a temporary file")?;
    file.write_all(bytes)?;
    Ok(file)
}

/// What a Linux guest is booted from, and how its boot is seen to be done.
#[derive(clap::Args)]
pub struct LinuxArgs {
    /// The kernel of --lab and --here: an ELF vmlinux or a bzImage [default: the reference kernel of `make bench`]
    #[arg(long)]
    kernel: Option<PathBuf>,
    /// The initial RAM disk of --lab and --here [default: the reference one of `make bench`]
    #[arg(long)]
    initrd: Option<PathBuf>,
    /// The kernel's command line with --lab and --here
    #[arg(long, default_value = REFERENCE_CMDLINE, hide_default_value = true)]
    cmdline: String,
    /// The pages behind the guest's memory with --lab and --here
    #[arg(long, value_enum, default_value = "host")]
    pages: PagesArg,
    /// The console output to wait for with --lab and --here
    #[arg(long, default_value = "GUEST-UP")]
    marker: String,
    /// Prints what the guest of the last start wrote to its console up to the marker, to standard error
    #[arg(long)]
    console: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum PagesArg {
    /// As the host has it set
    Host,
    /// 4 KiB pages only
    Small,
    /// Transparent huge pages where the host has them
    Transparent,
}

impl From<PagesArg> for Pages {
    fn from(arg: PagesArg) -> Self {
        match arg {
            PagesArg::Host => Self::Host,
            PagesArg::Small => Self::Small,
            PagesArg::Transparent => Self::Transparent,
        }
    }
}

/// [`LinuxArgs`] with the files found.
pub struct Linux {
    args: LinuxArgs,
    kernel: PathBuf,
    initrd: PathBuf,
}

impl LinuxArgs {
    /// Finds the files: the given ones, else the reference ones of `make bench`.
    pub fn resolve(self) -> Result<Linux> {
        let folder = sibling("shoal-vmm")?.with_file_name("../images");
        let pick = |given: &Option<PathBuf>, name: &str| {
            let path = given.clone().unwrap_or_else(|| folder.join(name));
            match path.canonicalize() {
                Ok(path) => Ok(path),
                Err(e) => bail!("{}: {e}; run `scripts/images.sh --reference`, or name the file", path.display()),
            }
        };
        let kernel = pick(&self.kernel, "reference/vmlinux")?;
        let initrd = pick(&self.initrd, "reference/initramfs.gz")?;
        Ok(Linux {
            args: self,
            kernel,
            initrd,
        })
    }
}

/// The result of `boot --lab --json` and `boot --here --json`. Times in ms.
#[derive(Serialize, Deserialize)]
struct LinuxResult {
    method: String,
    runs: u32,
    /// VMM process start to the first line of the guest's init: median.
    init_ms: f64,
    /// Largest minus smallest sample, as a share of the median (percent).
    spread_percent: f64,
    samples_ms: Vec<f64>,
    stages: Vec<Stage>,
}

/// A Linux guest on this machine's /dev/kvm.
pub fn here(linux: &Linux, runs: u32, json: bool) -> Result<()> {
    let open = |p: &Path| File::open(p).with_context(|| format!("opening {}", p.display()));
    let vmm = sibling("shoal-vmm")?;
    let kernel = shoal_vmm::kernel::load(&open(&linux.kernel)?)
        .with_context(|| format!("loading the kernel {}", linux.kernel.display()))?;
    let initrd = shoal_vmm::kernel::load_initrd(&open(&linux.initrd)?)
        .with_context(|| format!("loading the initial RAM disk {}", linux.initrd.display()))?;
    let guest = Guest {
        kernel,
        initrd: Some(initrd),
        cmdline: linux.args.cmdline.clone(),
        memory_mib: REFERENCE_MEMORY_MIB,
        pages: linux.args.pages.into(),
    };
    let mut all = Vec::new();
    // The first start reads the VMM's own file and is not counted.
    for run in 0..runs + 1 {
        let started = start_vmm(&vmm, &guest, linux.args.marker.as_bytes())?;
        if run > 0 {
            all.push(started);
        }
    }
    if let Some(last) = all.last().filter(|_| linux.args.console) {
        eprintln!("{}", last.output);
    }
    let samples: Vec<f64> = all.iter().map(|s| ms(s.elapsed)).collect();
    let (min, max) = (quantile(&samples, 0.0), quantile(&samples, 1.0));
    let result = LinuxResult {
        method: "Linux guest on /dev/kvm".into(),
        runs,
        init_ms: median(&samples),
        spread_percent: (max - min) / median(&samples) * 100.0,
        stages: stages(&all),
        samples_ms: samples,
    };
    print(&result, json)
}

fn print(result: &LinuxResult, json: bool) -> Result<()> {
    if json {
        println!("{}", serde_json::to_string_pretty(result)?);
    } else {
        println!("{}: VMM process start to the first line of init", result.method);
        println!(
            "  median of {} starts  {:.2} ms (spread {:.2} %)",
            result.runs, result.init_ms, result.spread_percent
        );
        print_stages(&result.stages);
    }
    Ok(())
}

/// The same in the lab.
pub fn lab(linux: &Linux, runs: u32, json: bool) -> Result<()> {
    let lab = sibling("shoal-lab")?;
    let (perf, vmm) = (sibling("shoal-perf")?, sibling("shoal-vmm")?);
    let mut command = Command::new(&lab);
    command.args(["run", "--icount", "--timeout", "300"]);
    for file in [&perf, &vmm, &linux.kernel, &linux.initrd] {
        command.arg("--copy").arg(file);
    }
    command
        .arg("--")
        .arg(&perf)
        .args(["boot", "--here", "--json", "--runs", &runs.to_string()]);
    command
        .arg("--kernel")
        .arg(&linux.kernel)
        .arg("--initrd")
        .arg(&linux.initrd);
    command.args(["--cmdline", &linux.args.cmdline, "--marker", &linux.args.marker]);
    let pages = linux
        .args
        .pages
        .to_possible_value()
        .context("every value has a name")?;
    command.arg("--pages").arg(pages.get_name());
    if linux.args.console {
        command.arg("--console");
    }
    command.stderr(std::process::Stdio::inherit());
    let output = command
        .output()
        .with_context(|| format!("starting {}", lab.display()))?;
    if !output.status.success() {
        bail!("the lab ended with {}", output.status);
    }
    let mut result: LinuxResult =
        serde_json::from_slice(&output.stdout).context("reading the figures that the lab printed")?;
    result.method = "Linux guest in the lab, time counted in instructions".into();
    print(&result, json)
}
