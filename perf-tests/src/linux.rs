//! Boot latency of a Linux guest.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use shoal_vmm::protocol::Pages;

use crate::boot::{ms, print_stages, stages};
use crate::driver::{Guest, Way, sibling, start_vmm};
use crate::results::{LinuxBoot, Measured};
use crate::signal::interrupted;
use crate::stats::{median, quantile};

/// What [`here`] measures.
pub const HERE: &str = "Linux guest on /dev/kvm";
/// What [`lab`] measures.
pub const LAB: &str = "Linux guest in the lab, time counted in instructions";

/// The command line behind Firecracker's 134 ms (docs/performance.md tells where it comes from).
const REFERENCE_CMDLINE: &str = "console=ttyS0 quiet 8250.nr_uarts=1 i8042.noaux i8042.nomux i8042.nopnp \
    i8042.dumbkbd reboot=k panic=-1 pci=off nokaslr";
const REFERENCE_MEMORY_MIB: u64 = 128;

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
                Err(e) => bail!(
                    "{}: {e}; run `scripts/images.sh --reference`, or name the file",
                    path.display()
                ),
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

/// A Linux guest on this machine's /dev/kvm.
pub fn here(linux: &Linux, runs: u32) -> Result<LinuxBoot> {
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
        if interrupted() {
            break;
        }
        let started = start_vmm(&Way::Plain(&vmm), &guest, linux.args.marker.as_bytes())?;
        if run > 0 {
            all.push(started);
        }
    }
    if all.is_empty() {
        bail!("interrupted before the first boot was measured");
    }
    if let Some(last) = all.last().filter(|_| linux.args.console) {
        eprintln!("{}", last.output);
    }
    let samples: Vec<f64> = all.iter().map(|s| ms(s.elapsed)).collect();
    let (min, max) = (quantile(&samples, 0.0), quantile(&samples, 1.0));
    Ok(LinuxBoot {
        runs: samples.len() as u32,
        init_ms: median(&samples),
        spread_percent: (max - min) / median(&samples) * 100.0,
        stages: stages(&all),
        samples_ms: samples,
    })
}

/// Prints a boot as a table.
pub fn print(method: &str, boot: &LinuxBoot) {
    println!("{method}: VMM process start to the first line of init");
    println!(
        "  median of {} starts  {:.2} ms (spread {:.2} %)",
        boot.runs, boot.init_ms, boot.spread_percent
    );
    print_stages(&boot.stages);
}

/// The same in the lab.
pub fn lab(linux: &Linux, runs: u32) -> Result<LinuxBoot> {
    let mut inside = vec!["boot".into(), "--here".into(), "--json".into()];
    inside.extend(["--runs".into(), runs.to_string().into()]);
    inside.extend(["--kernel".into(), linux.kernel.clone().into_os_string()]);
    inside.extend(["--initrd".into(), linux.initrd.clone().into_os_string()]);
    inside.extend(["--cmdline".into(), linux.args.cmdline.clone().into()]);
    inside.extend(["--marker".into(), linux.args.marker.clone().into()]);
    let pages = linux.args.pages.to_possible_value();
    let pages = pages.context("every value has a name")?;
    inside.extend(["--pages".into(), pages.get_name().into()]);
    if linux.args.console {
        inside.push("--console".into());
    }
    match crate::lab::run(&inside, &[&linux.kernel, &linux.initrd])?.measured {
        Measured::BootLinux(boot) => Ok(boot),
        _ => bail!("the lab printed another kind of result than a boot"),
    }
}
