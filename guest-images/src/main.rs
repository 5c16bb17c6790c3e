//! `shoal-images`: builds the guest kernel, root file systems and initramfs archives.
#![forbid(unsafe_code)]

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser, Subcommand};
use shoal_images::kernel::{self, Flavour, Progress};
use shoal_images::manifest::{self, Entry, Manifest};
use shoal_images::tree::{ExtraFile, Ingredients, Tree};
use shoal_images::{cache_directory, initramfs, rootfs};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Kernel plus root file system, compressed: the project's promise, in bytes.
const LIMIT: u64 = 10_000_000;

/// Builds Shoal's guest images.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build the guest kernel: vmlinux, bzImage and its configuration
    Kernel {
        #[command(flatten)]
        kernel: KernelArgs,
        /// Build the reference kernel of the boot figures instead (kernel/reference.config)
        #[arg(long)]
        reference: bool,
        /// Copy the result into this directory; without it, its directory in the cache is printed
        #[arg(long)]
        out: Option<PathBuf>,
    },
    /// Build a root file system (EROFS) of busybox and init
    Rootfs {
        #[command(flatten)]
        content: ContentArgs,
        /// The image to write
        #[arg(long)]
        out: PathBuf,
    },
    /// Build an initramfs (cpio, gzip) of busybox and init
    Initramfs {
        #[command(flatten)]
        content: ContentArgs,
        /// The archive to write
        #[arg(long)]
        out: PathBuf,
        /// Build the reference initramfs instead: busybox, an empty /dev, and a script that says GUEST-UP and resets
        #[arg(long, conflicts_with = "files")]
        reference: bool,
    },
    /// Build everything, with the probe guests and a manifest, into a directory
    Build {
        #[command(flatten)]
        kernel: KernelArgs,
        #[command(flatten)]
        content: ContentArgs,
        /// The directory to fill
        #[arg(long)]
        out: PathBuf,
    },
}

#[derive(Args)]
struct KernelArgs {
    /// The kernel's source
    #[arg(
        long,
        env = "SHOAL_KERNEL_SOURCE",
        default_value = "/usr/src/linux-source-6.1.tar.xz"
    )]
    source: PathBuf,
}

#[derive(Args)]
struct ContentArgs {
    /// A static busybox
    #[arg(long, env = "SHOAL_BUSYBOX", default_value = "/bin/busybox")]
    busybox: PathBuf,
    /// The init program; by default shoal-init beside this program
    #[arg(long, env = "SHOAL_INIT")]
    init: Option<PathBuf>,
    /// Add a file of this machine, SOURCE:/DESTINATION; may be given more than once
    #[arg(long = "file", value_name = "SOURCE:DESTINATION")]
    files: Vec<ExtraFile>,
}

impl ContentArgs {
    fn tree(self) -> Result<Tree> {
        let init = self.init.map_or_else(sibling_init, Ok)?;
        Ok(Tree::build(&Ingredients {
            busybox: self.busybox,
            init,
            files: self.files,
        })?)
    }
}

fn sibling_init() -> Result<PathBuf> {
    let me = std::env::current_exe().context("cannot find this program's own path")?;
    let init = me.with_file_name("shoal-init");
    ensure!(
        init.is_file(),
        "there is no {}; name the init with --init",
        init.display()
    );
    Ok(init)
}

/// Steps as lines; the count in one line on a terminal, else a line for each tenth.
struct Console {
    terminal: bool,
    tenth: usize,
}

impl Progress for Console {
    fn step(&mut self, text: &str) {
        eprintln!("kernel: {text}");
    }

    fn compiled(&mut self, done: usize, total: usize) {
        let tenth = done * 10 / total;
        if self.terminal {
            eprint!("\rkernel: compiled {done} of about {total} files");
            if done == total {
                eprintln!();
            }
            let _ = std::io::stderr().flush();
        } else if tenth > self.tenth {
            self.tenth = tenth;
            eprintln!("kernel: compiled {done} of about {total} files");
        }
    }
}

fn kernel(flavour: Flavour, arguments: &KernelArgs) -> Result<PathBuf> {
    ensure!(
        arguments.source.is_file(),
        "there is no kernel source {}; scripts/deps.sh installs it (Debian's linux-source-6.1)",
        arguments.source.display()
    );
    let mut console = Console {
        terminal: std::io::stderr().is_terminal(),
        tenth: 0,
    };
    Ok(kernel::build(flavour, &arguments.source, &cache_directory(), &mut console)?.directory)
}

/// Puts a whole new file in the place of an old one, so that a running guest keeps what it has open.
fn install(from: &Path, to: &Path) -> Result<()> {
    let directory = to.parent().unwrap_or(Path::new("."));
    let mut temporary = tempfile::Builder::new();
    temporary
        .prefix(".shoal-")
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644));
    let file = temporary
        .tempfile_in(directory)
        .with_context(|| format!("cannot write in {}", directory.display()))?;
    std::fs::copy(from, file.path()).with_context(|| format!("cannot copy {}", from.display()))?;
    file.persist(to)
        .with_context(|| format!("cannot write {}", to.display()))?;
    Ok(())
}

fn install_kernel(kernel: &Path, out: &Path) -> Result<()> {
    std::fs::create_dir_all(out).with_context(|| format!("cannot create {}", out.display()))?;
    for (from, to) in [
        ("vmlinux", "vmlinux"),
        ("bzImage", "bzImage"),
        ("config", "kernel.config"),
    ] {
        install(&kernel.join(from), &out.join(to))?;
    }
    Ok(())
}

fn build(kernel_arguments: &KernelArgs, content: ContentArgs, out: &Path) -> Result<()> {
    let busybox = content.busybox.clone();
    let tree = content.tree()?;
    install_kernel(&kernel(Flavour::Shoal, kernel_arguments)?, out)?;
    rootfs::write(&tree, &out.join("rootfs.erofs"))?;
    initramfs::write(&tree, &out.join("initramfs.cpio.gz"))?;
    initramfs::write(
        &initramfs::reference_tree(&busybox)?,
        &out.join("reference.cpio.gz"),
    )?;
    for (name, image) in shoal_probe::FILES {
        std::fs::write(out.join(name), image).with_context(|| format!("cannot write {name}"))?;
    }
    let manifest = describe(out)?;
    let path = out.join("manifest.json");
    std::fs::write(&path, serde_json::to_string_pretty(&manifest)? + "\n")
        .with_context(|| format!("cannot write {}", path.display()))?;
    let compressed = manifest.compressed_bytes;
    println!(
        "kernel + root file system, compressed: {:.1} MB (limit {} MB)",
        mb(compressed),
        LIMIT / 1_000_000
    );
    ensure!(
        compressed < LIMIT,
        "the images are too large: {compressed} bytes, the limit is {LIMIT}"
    );
    Ok(())
}

fn mb(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

fn describe(out: &Path) -> Result<Manifest> {
    let mut names = vec![
        "vmlinux",
        "bzImage",
        "kernel.config",
        "rootfs.erofs",
        "initramfs.cpio.gz",
        "reference.cpio.gz",
    ];
    names.extend(shoal_probe::FILES.iter().map(|(name, _)| *name));
    let files = names
        .iter()
        .map(|name| Entry::of(out, name))
        .collect::<Result<Vec<_>, _>>()?;
    let size = |name: &str| files.iter().find(|f| f.name == name).map_or(0, |f| f.bytes);
    let vmlinux = std::fs::read(out.join("vmlinux")).context("cannot read the kernel just built")?;
    Ok(Manifest {
        version: manifest::VERSION,
        shoal: env!("CARGO_PKG_VERSION").to_owned(),
        kernel_release: manifest::kernel_release(&vmlinux)
            .context("the kernel just built tells no version")?,
        // Both are compressed as they are: the bzImage by gzip, the file system by LZ4.
        compressed_bytes: size("bzImage") + size("rootfs.erofs"),
        files,
    })
}

fn run() -> Result<()> {
    match Cli::parse().command {
        Command::Kernel {
            kernel: arguments,
            reference,
            out,
        } => {
            let flavour = if reference {
                Flavour::Reference
            } else {
                Flavour::Shoal
            };
            let directory = kernel(flavour, &arguments)?;
            match out {
                Some(out) => install_kernel(&directory, &out),
                None => {
                    println!("{}", directory.display());
                    Ok(())
                }
            }
        }
        Command::Rootfs { content, out } => Ok(rootfs::write(&content.tree()?, &out)?),
        Command::Initramfs {
            content,
            out,
            reference: true,
        } => Ok(initramfs::write(
            &initramfs::reference_tree(&content.busybox)?,
            &out,
        )?),
        Command::Initramfs {
            content,
            out,
            reference: false,
        } => Ok(initramfs::write(&content.tree()?, &out)?),
        Command::Build { kernel, content, out } => build(&kernel, content, &out),
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("shoal-images: {e:#}");
            ExitCode::FAILURE
        }
    }
}
