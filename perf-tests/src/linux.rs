//! Boot latency of a Linux guest.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use shoal_vmm::protocol::Pages;

use crate::boot::{Contender, SHOAL, Start, ms, print_stages, print_subjects, stages, subjects, take_turns};
use crate::driver::{Guest, Way, images, sibling};
use crate::peers::{Peer, PeerArg, PeerGuest, usable, version_of};
use crate::results::{LinuxBoot, Measured};

/// What [`here`] measures.
pub const HERE: &str = "Linux guest on /dev/kvm";
/// What [`lab`] measures.
pub const LAB: &str = "Linux guest in the lab, time counted in instructions";

/// The command line behind Firecracker's 134 ms (docs/performance.md tells where it comes from).
const REFERENCE_CMDLINE: &str = "console=ttyS0 quiet 8250.nr_uarts=1 i8042.noaux i8042.nomux i8042.nopnp \
    i8042.dumbkbd reboot=k panic=-1 pci=off nokaslr";
const REFERENCE_MARKER: &str = "GUEST-UP";
/// What Shoal's own image needs: no driver of it waits for hardware that is not there.
const IMAGE_CMDLINE: &str = "console=ttyS0 quiet reboot=k panic=-1";
/// What its process 1 writes when the guest is ready.
pub const IMAGE_MARKER: &str = "shoal-init: ready";
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
    #[arg(long, default_value = REFERENCE_MARKER)]
    marker: String,
    /// With --lab and --here: Shoal's own kernel and initial RAM disk, as `make images` leaves them
    #[arg(long, conflicts_with_all = ["kernel", "initrd", "cmdline", "marker"])]
    image: bool,
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
    what: String,
    kernel: PathBuf,
    initrd: PathBuf,
}

/// Which guest of ours is booted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ours {
    /// The kernel and initial RAM disk that Firecracker's figure was taken with.
    Reference,
    /// What `make images` builds for users.
    Image,
}

impl Ours {
    /// Its files, found.
    pub fn resolve(self) -> Result<Linux> {
        LinuxArgs {
            kernel: None,
            initrd: None,
            cmdline: REFERENCE_CMDLINE.into(),
            pages: PagesArg::Host,
            marker: REFERENCE_MARKER.into(),
            image: self == Self::Image,
            console: false,
        }
        .resolve()
    }
}

impl LinuxArgs {
    /// Finds the files: the given ones, else the reference ones of `make bench`, or those of Shoal's image.
    pub fn resolve(mut self) -> Result<Linux> {
        let folder = images()?;
        let given = self.kernel.is_some() || self.initrd.is_some();
        let what = match (self.image, given) {
            (true, _) => "Shoal's own image",
            (_, true) => "Another kernel or initial RAM disk",
            _ => "The reference kernel and initial RAM disk",
        };
        if self.image {
            (self.cmdline, self.marker) = (IMAGE_CMDLINE.into(), IMAGE_MARKER.into());
        }
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
        let names = match self.image {
            true => ["vmlinux", "initramfs.cpio.gz"],
            false => ["reference/vmlinux", "reference/initramfs.gz"],
        };
        let kernel = pick(&self.kernel, names[0])?;
        let initrd = pick(&self.initrd, names[1])?;
        Ok(Linux {
            args: self,
            what: what.into(),
            kernel,
            initrd,
        })
    }
}

/// A Linux guest on this machine's /dev/kvm, in turns with `peers`.
pub fn here(linux: &Linux, runs: u32, peers: &[PeerArg]) -> Result<LinuxBoot> {
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
    let theirs = PeerGuest {
        kernel: linux.kernel.clone(),
        initrd: Some(linux.initrd.clone()),
        cmdline: guest.cmdline.clone(),
        memory_mib: guest.memory_mib,
        marker: linux.args.marker.clone().into(),
        at_once: false,
    };
    let peers = usable(peers, |arg| Peer::new(arg, &theirs));
    let mut all = vec![Contender::new(SHOAL, "", Start::Shoal(Way::Plain(&vmm)))];
    all.extend(peers.iter().map(Contender::peer));
    // The first start reads the VMM's own file and is not counted.
    let started = take_turns(&mut all, &guest, &theirs.marker, 1, runs)?;
    if let Some(last) = started.last().filter(|_| linux.args.console) {
        eprintln!("{}", last.output);
    }
    let samples: Vec<f64> = started.iter().map(|s| ms(s.elapsed)).collect();
    Ok(LinuxBoot {
        subjects: subjects(&all),
        ..LinuxBoot::new(linux.what.clone(), samples, stages(&started))
    })
}

/// Prints a boot as a table.
pub fn print(method: &str, boot: &LinuxBoot) {
    println!("{method}: to the first line of init, {}", boot.guest);
    println!(
        "  median of {} starts  {:.2} ms (spread {:.2} %)",
        boot.runs, boot.init_ms, boot.spread_percent
    );
    if boot.subjects.len() > 1 {
        print_subjects(&boot.subjects);
    }
    print_stages(&boot.stages);
}

/// The same in the lab.
pub fn lab(linux: &Linux, runs: u32, peers: &[PeerArg]) -> Result<LinuxBoot> {
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
    let mut files = vec![linux.kernel.clone(), linux.initrd.clone()];
    let found = |arg: &PeerArg| {
        let arg = arg.found()?;
        version_of(&arg)?;
        let files = arg.files()?;
        Ok((arg, files))
    };
    for (peer, needed) in usable(peers, found) {
        inside.extend(["--peer".into(), peer.to_string().into()]);
        files.extend(needed);
    }
    match crate::lab::run(&inside, &files.iter().collect::<Vec<_>>())?.measured {
        Measured::BootLinux(boot) => Ok(LinuxBoot {
            guest: linux.what.clone(),
            ..boot
        }),
        _ => bail!("the lab printed another kind of result than a boot"),
    }
}
