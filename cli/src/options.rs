//! What can be typed.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;

/// Runs small Linux guests, each in its own virtual machine.
#[derive(Debug, Parser)]
#[command(name = "shoal", version, max_term_width = 100, after_help = EXAMPLES)]
pub struct Options {
    /// The daemon's socket.
    #[arg(
        long,
        global = true,
        env = "SHOAL_SOCKET",
        default_value = "/run/shoal.sock",
        value_name = "PATH"
    )]
    pub socket: PathBuf,
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "\
Examples:
  shoald --socket /run/shoal.sock --state /var/lib/shoal &   start the daemon
  shoal doctor                                               can this machine run guests?
  shoal run -- uname -a                                      run a program in a new guest
  shoal run --detach --name web --tap tap0 --vsock           leave a guest running
  shoal ps
  shoal logs -f web
  shoal stop web && shoal rm web";

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Create and start a guest, and show its console until it ends.
    Run(Box<Run>),
    /// List guests: those that run, or all.
    Ps {
        /// All guests, in whatever state.
        #[arg(short, long)]
        all: bool,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show a guest: its state, its boot timeline, what it costs in memory.
    Show {
        /// Id or name.
        guest: String,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Print a guest's console.
    Logs {
        /// Id or name.
        guest: String,
        /// Go on as output comes, until the guest ends.
        #[arg(short, long)]
        follow: bool,
    },
    /// Start guests that were created or have ended.
    Start {
        /// Ids or names.
        #[arg(required = true)]
        guests: Vec<String>,
    },
    /// Ask guests to stop, and end those that do not.
    Stop {
        /// Ids or names.
        #[arg(required = true)]
        guests: Vec<String>,
        /// How long each may take (seconds) before it is ended by force.
        #[arg(short, long, default_value_t = 10.0, value_name = "SECONDS", value_parser = seconds)]
        timeout: f64,
    },
    /// Limit a device of a guest otherwise, at once if it runs.
    #[command(after_help = LIMIT_HELP)]
    Limit {
        /// Id or name.
        guest: String,
        /// disk:ID, tap:NAME:rx, tap:NAME:tx, vsock or rng.
        device: String,
        /// bandwidth=RATE (bytes) and operations=RATE (requests or packets), or none. What is missing is not limited any
        /// more.
        #[arg(required = true)]
        limits: Vec<String>,
    },
    /// Forget guests and remove their files (not their disks).
    Rm {
        /// Ids or names.
        #[arg(required = true)]
        guests: Vec<String>,
        /// End guests that run.
        #[arg(short, long)]
        force: bool,
    },
    /// Find out by trying what this machine can run. Needs no daemon.
    ///
    /// Exit code: 0 Linux guests, 3 only bare-metal guests, 4 none.
    Doctor {
        /// As JSON.
        #[arg(long)]
        json: bool,
        /// The shoal-vmm program; the one beside shoal when it is not given.
        #[arg(long, env = "SHOAL_VMM", value_name = "PATH")]
        vmm: Option<PathBuf>,
    },
    /// Print the completion script for a shell.
    Completion {
        /// Which.
        shell: Shell,
    },
}

const LIMIT_HELP: &str = "\
A RATE is per second, and may say after a slash how much may be done at once after a time of rest
(a tenth of a second's worth when it does not): 500, 10M, 10M/1M. K, M and G are powers of 1024 for
bytes, of 1000 for operations. A request larger than that passes, and those after it pay for it.

Examples:
  shoal limit web disk:disk0 bandwidth=10M/1M operations=500
  shoal limit web tap:tap0:rx bandwidth=12500K
  shoal limit web disk:disk0 none";

const RUN_HELP: &str = "\
Without --kernel, the guest is Shoal's own JeOS image from --image: its kernel, and its root file
system as the first, read-only disk. What follows `--` is run in it; the guest powers off when that
ends.

Exit code: the workload's when the guest told it (over --vsock, which the image always has), else
0 the guest powered off, 64 it reset, 65 triple fault, 66 KVM error, 67 ended by force, 68 a signal
ended its VMM, 69 its VMM exited by itself, 70 lost, 71 its VMM made a forbidden system call, 72 its
VMM met a bug; 1 when nothing was run, 2 for wrong usage.

Examples:
  shoal run                                         the image's own program, then power off
  shoal run --timeline -- cat /proc/cpuinfo
  shoal run --cpus 4 --memory 1G --disk data.img:io_uring:operations=1000 --disk tools.img:ro
  shoal run --kernel bzImage --initrd root.cpio --cmdline 'console=ttyS0' --rm
  shoal run --detach --name web --tap tap0";

/// Options of `shoal run`.
#[derive(Debug, Args)]
#[command(after_help = RUN_HELP)]
pub struct Run {
    /// A name, unique on the host.
    #[arg(long)]
    pub name: Option<String>,
    /// The kernel: an ELF vmlinux or a bzImage.
    #[arg(long, value_name = "PATH")]
    pub kernel: Option<PathBuf>,
    /// An initial RAM disk.
    #[arg(long, value_name = "PATH")]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line, instead of the image's.
    #[arg(long, value_name = "TEXT")]
    pub cmdline: Option<String>,
    /// Words added to the kernel's command line.
    #[arg(long, value_name = "TEXT")]
    pub append: Option<String>,
    /// The folder with `vmlinux` and `rootfs.erofs`; `../images` beside the folder of shoal when it is not given.
    #[arg(long, env = "SHOAL_IMAGE", value_name = "DIR")]
    pub image: Option<PathBuf>,
    /// Number of vCPUs, 1 to 32.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub cpus: u32,
    /// Memory: 128M, 2G; without a unit in MiB.
    #[arg(long, default_value = "128M", value_name = "SIZE", value_parser = mebibytes)]
    pub memory: u64,
    /// A disk. Words behind it: `ro` makes it read-only, `io_uring` has its requests done many at once, `queues=N` gives it
    /// several queues (at most one for each vCPU), `bandwidth=RATE` and `operations=RATE` limit it (see shoal limit
    /// --help). May be given again.
    #[arg(long = "disk", value_name = "PATH[:WORD]…")]
    pub disks: Vec<String>,
    /// A network interface on an existing TAP. Words behind it: `queues=N` gives it several pairs of queues (at most one for
    /// each vCPU; the TAP has to be made with multi_queue), `rx.bandwidth=RATE`, `rx.operations=RATE` (to the guest),
    /// `tx.bandwidth=RATE` and `tx.operations=RATE` limit it. May be given again.
    #[arg(long = "tap", value_name = "NAME[:WORD]…")]
    pub taps: Vec<String>,
    /// A socket device; Shoal's image always has one.
    #[arg(long)]
    pub vsock: bool,
    /// Forget the guest when it has ended.
    #[arg(long, conflicts_with = "detach")]
    pub rm: bool,
    /// Print the guest's id and leave it running.
    #[arg(short, long)]
    pub detach: bool,
    /// Send standard input to the console, line by line.
    #[arg(short, long, conflicts_with = "detach")]
    pub interactive: bool,
    /// Print the boot timeline (to standard error).
    #[arg(long)]
    pub timeline: bool,
    /// The program that the guest's init runs, and its arguments.
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

fn mebibytes(text: &str) -> Result<u64, String> {
    let error = || format!("{text:?} is no size in whole MiB; one looks like 128M or 2G");
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| error())?;
    let factor = match unit {
        "" | "M" | "MiB" | "m" => 1,
        "G" | "GiB" | "g" => 1 << 10,
        "T" | "TiB" | "t" => 1 << 20,
        _ => return Err(error()),
    };
    number.checked_mul(factor).ok_or_else(error)
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(s) if (0.0..=3600.0).contains(&s) => Ok(s),
        _ => Err(format!("{text:?} is no number of seconds between 0 and 3600")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_options_are_consistent() {
        Options::command().debug_assert();
    }

    #[test]
    fn reads_sizes() {
        for (text, want) in [
            ("128M", 128),
            ("128", 128),
            ("2G", 2048),
            ("1T", 1 << 20),
            ("0", 0),
        ] {
            assert_eq!(mebibytes(text), Ok(want));
        }
        for bad in [
            "",
            "M",
            "1.5G",
            "-1",
            "1K",
            "99999999999999999999",
            "18446744073709551615T",
        ] {
            assert!(mebibytes(bad).is_err(), "{bad}");
        }
        assert!(seconds("NaN").is_err() && seconds("-1").is_err() && seconds("0.5").is_ok());
    }
}
