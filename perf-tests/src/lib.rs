//! `shoal-perf`: benchmarks that anyone can repeat. Every result names the way in which it was measured; speed is
//! given as a ratio taken in one run, or as a deterministic figure from the lab.

#![deny(unsafe_code)]

mod accounts;
mod all;
mod api;
mod boot;
mod canvas;
mod churn;
mod costs;
#[allow(unsafe_code)]
mod counter;
mod daemon;
mod density;
mod driver;
#[doc(hidden)]
pub mod fuzzing;
mod gate;
mod hdr;
mod history;
mod io;
mod jail;
mod lab;
mod libraries;
mod linux;
mod machine;
#[allow(unsafe_code)]
mod mounts;
mod peers;
mod plot;
mod png;
mod report;
mod results;
mod served;
#[allow(unsafe_code)]
mod signal;
mod stats;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use machine::Machine;
use results::{Measured, ResultFile};

/// Benchmarks of Shoal: boot latency and density.
#[derive(Parser)]
#[command(
    name = "shoal-perf",
    version,
    after_help = "Binaries are looked for beside shoal-perf itself; \
    SHOAL_BIN_DIR names another folder."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Boot latency: from the start of the VMM's process to the guest's first output
    Boot(BootArgs),
    /// Host memory per idle guest, and start latency against the number that runs
    Density(DensityArgs),
    /// Requests per second of a disk, and what each costs the host, with a bare-metal guest on this machine's /dev/kvm
    Block(BlockCommand),
    /// Frames per second of a network interface each way, their latency, and what each costs the host
    Net(NetCommand),
    /// Throughput and latency of a stream between guest and host
    Vsock(VsockCommand),
    /// How exactly rate limiters keep what they were asked for
    Limits(LimitsCommand),
    /// Latency of each call of the API, against the number of guests that run
    Api(ApiCommand),
    /// What the jail adds to a start: alone, beside other jails, and with many mounts
    Jail(JailCommand),
    /// Instructions and system calls that the host pays for a VMM's start, calls of the API and operations of devices
    Costs(CostsArgs),
    /// Every benchmark that can run here, and the report
    All(all::AllArgs),
    /// Measures what each baseline file holds again, and fails when a figure grew by more than the file tolerates
    Check(CheckArgs),
    /// Makes one self-contained HTML page with plots from results files (--save, or --json to a file)
    Report(ReportArgs),
}

/// Where a result goes.
#[derive(clap::Args)]
struct OutArgs {
    /// Prints the result as JSON
    #[arg(long)]
    json: bool,
    /// Also writes the result as JSON to this file
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
    /// Of which commit or release the figures are; the report's history shows it
    #[arg(long, default_value = "", value_name = "TEXT")]
    label: String,
}

#[derive(clap::Args)]
#[command(group(clap::ArgGroup::new("way").required(true).args(["probe", "lab", "here"])))]
struct BootArgs {
    /// On this machine's /dev/kvm with a bare-metal guest, in turns with the floor (raw KVM calls)
    #[arg(long)]
    probe: bool,
    /// A Linux guest in the lab, where time is counted in instructions: the figure is the same on every machine
    #[arg(long)]
    lab: bool,
    /// What --lab runs inside of the lab: a Linux guest on this machine's /dev/kvm
    #[arg(long)]
    here: bool,
    /// Measured starts [default: 40 with --probe, 3 otherwise]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    runs: Option<u32>,
    /// With --lab and --here: Shoal's image on a disk, started by a daemon, from the request on
    #[arg(long, conflicts_with_all = ["probe", "image", "kernel", "initrd", "cmdline", "marker", "pages", "console"])]
    daemon: bool,
    #[command(flatten)]
    out: OutArgs,
    #[command(flatten)]
    beside: boot::BesideArgs,
    #[command(flatten)]
    linux: linux::LinuxArgs,
}

#[derive(clap::Args)]
#[command(group(clap::ArgGroup::new("place").required(true).args(["probe", "lab"])))]
struct DensityArgs {
    /// Idle bare-metal guests on this machine's /dev/kvm
    #[arg(long)]
    probe: bool,
    /// The same in the lab, where nothing else changes the host's memory
    #[arg(long)]
    lab: bool,
    /// How many
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    guests: u32,
    #[command(flatten)]
    churn: churn::ChurnArgs,
    #[command(flatten)]
    out: OutArgs,
}

#[derive(clap::Args)]
struct BlockCommand {
    #[command(flatten)]
    block: io::block::BlockArgs,
    #[command(flatten)]
    out: OutArgs,
}

#[derive(clap::Args)]
struct NetCommand {
    #[command(flatten)]
    net: io::net::NetArgs,
    #[command(flatten)]
    out: OutArgs,
}

#[derive(clap::Args)]
struct LimitsCommand {
    #[command(flatten)]
    limits: io::limits::LimitsArgs,
    #[command(flatten)]
    out: OutArgs,
}

#[derive(clap::Args)]
struct VsockCommand {
    #[command(flatten)]
    vsock: io::vsock::VsockArgs,
    #[command(flatten)]
    out: OutArgs,
}

#[derive(clap::Args)]
#[command(group(clap::ArgGroup::new("api_place").required(true).args(["probe", "lab"])))]
struct ApiCommand {
    /// With probe guests on this machine's /dev/kvm
    #[arg(long)]
    probe: bool,
    /// The same in the lab, where time is counted in instructions
    #[arg(long)]
    lab: bool,
    #[command(flatten)]
    api: api::ApiArgs,
    #[command(flatten)]
    out: OutArgs,
}

#[derive(clap::Args)]
struct JailCommand {
    #[command(flatten)]
    jail: jail::JailArgs,
    #[command(flatten)]
    out: OutArgs,
}

#[derive(clap::Args)]
#[command(group(clap::ArgGroup::new("costs_place").required(true).args(["here", "lab"])))]
struct CostsArgs {
    /// On this machine
    #[arg(long)]
    here: bool,
    /// In the lab, where time is counted in instructions
    #[arg(long)]
    lab: bool,
    #[command(flatten)]
    out: OutArgs,
}

#[derive(clap::Args)]
struct CheckArgs {
    /// Baselines, as perf-tests/baselines holds them
    #[arg(required = true, value_name = "BASELINE")]
    baselines: Vec<PathBuf>,
    /// Writes what is measured into the files instead; the tolerance stays
    #[arg(long)]
    update: bool,
}

#[derive(clap::Args)]
struct ReportArgs {
    /// Results files
    #[arg(required = true, value_name = "RESULTS")]
    results: Vec<PathBuf>,
    /// The page
    #[arg(short, long, default_value = "report.html", value_name = "FILE")]
    output: PathBuf,
    /// Also writes each plot as an SVG file into this folder
    #[arg(long, value_name = "DIR")]
    svg: Option<PathBuf>,
    /// Also writes each plot as PNG files into this folder: NAME.png light, NAME-dark.png dark
    #[arg(long, value_name = "DIR")]
    png: Option<PathBuf>,
    /// Earlier results (files, or folders of them) for the history; they get no sections of their own
    #[arg(long, value_name = "PATH")]
    history: Vec<PathBuf>,
}

/// The program `shoal-perf`.
///
/// # Errors
/// What the program ends with.
pub fn main() -> anyhow::Result<()> {
    let command = Cli::parse().command;
    signal::catch();
    match command {
        Command::Boot(args) => measure_boot(args),
        Command::Density(args) => measure_density(&args),
        Command::Block(args) => {
            measure_io(args.block.method(), || io::block::measure(&args.block), &args.out)
        }
        Command::Net(args) => measure_io(args.net.method(), || io::net::measure(&args.net), &args.out),
        Command::Vsock(args) => measure_io(io::METHOD, || io::vsock::measure(&args.vsock), &args.out),
        Command::Limits(args) => {
            let machine = Machine::here();
            let measured = Measured::Limits(io::limits::measure(&args.limits)?);
            deliver(io::limits::METHOD, machine, measured, &args.out)
        }
        Command::Api(args) => measure_api(&args),
        Command::Jail(args) => {
            let machine = Machine::here();
            let cost = jail::measure(&args.jail)?;
            deliver(jail::METHOD, machine, Measured::Jail(cost), &args.out)
        }
        Command::Costs(args) => {
            let machine = Machine::here();
            let (method, costs) = match args.lab {
                true => (costs::LAB, costs::lab()?),
                false => (costs::HERE, costs::here()?),
            };
            deliver(method, machine, Measured::Costs(costs), &args.out)
        }
        Command::Report(args) => {
            let output = report::Output {
                page: &args.output,
                svg: args.svg.as_deref(),
                png: args.png.as_deref(),
            };
            report::write(&args.results, &args.history, &output)
        }
        Command::All(args) => all::run(&args),
        Command::Check(args) => gate::check(&args.baselines, args.update),
    }
}

fn measure_boot(args: BootArgs) -> anyhow::Result<()> {
    let machine = Machine::here();
    let (method, measured) = if args.probe {
        let boot = boot::probe(args.runs.unwrap_or(40), &args.beside)?;
        (boot::PROBE, Measured::BootProbe(boot))
    } else if args.daemon {
        let runs = args.runs.unwrap_or(3);
        match args.lab {
            true => (served::LAB, Measured::BootLinux(served::lab(runs)?)),
            false => (served::HERE, Measured::BootLinux(served::here(runs)?)),
        }
    } else {
        let linux = args.linux.resolve()?;
        let runs = args.runs.unwrap_or(3);
        match args.lab {
            true => (
                linux::LAB,
                Measured::BootLinux(linux::lab(&linux, runs, &args.beside.peers)?),
            ),
            false => (
                linux::HERE,
                Measured::BootLinux(linux::here(&linux, runs, &args.beside.peers)?),
            ),
        }
    };
    deliver(method, machine, measured, &args.out)
}

fn measure_io(
    method: &str,
    measure: impl FnOnce() -> anyhow::Result<io::results::IoResult>,
    out: &OutArgs,
) -> anyhow::Result<()> {
    let machine = Machine::here();
    deliver(method, machine, Measured::Io(measure()?), out)
}

fn measure_churn(args: &DensityArgs, rate: f64) -> anyhow::Result<()> {
    let machine = Machine::here();
    let (method, churn) = match args.lab {
        true => (churn::LAB, churn::lab(rate, args.churn.seconds)?),
        false => (churn::PROBE, churn::probe(rate, args.churn.seconds)?),
    };
    let left = churn.verdict();
    deliver(method, machine, Measured::Churn(churn), &args.out)?;
    match left {
        None => Ok(()),
        Some(left) => anyhow::bail!("left behind: {left}"),
    }
}

fn measure_density(args: &DensityArgs) -> anyhow::Result<()> {
    if let Some(rate) = args.churn.churn {
        return measure_churn(args, rate);
    }
    let machine = Machine::here();
    let (method, density) = match args.lab {
        true => (density::LAB, density::lab(args.guests)?),
        false => (density::PROBE, density::probe(args.guests)?),
    };
    let (short, leaks) = (
        density.stopped_because.clone(),
        density.leaks != results::Leaks::default(),
    );
    deliver(method, machine, Measured::Density(density), &args.out)?;
    if let Some(why) = short {
        anyhow::bail!("fewer guests than asked for: {why}");
    }
    anyhow::ensure!(!leaks, "something was left behind: see the result");
    Ok(())
}

fn measure_api(args: &ApiCommand) -> anyhow::Result<()> {
    let machine = Machine::here();
    let (method, api) = match args.lab {
        true => (api::LAB, api::lab(&args.api)?),
        false => (api::PROBE, api::probe(&args.api)?),
    };
    let leaks = api.leaks != daemon::Census::default();
    deliver(method, machine, Measured::Api(api), &args.out)?;
    anyhow::ensure!(!leaks, "something was left behind: see the result");
    Ok(())
}

fn deliver(method: &str, machine: Machine, measured: Measured, out: &OutArgs) -> anyhow::Result<()> {
    let mut result = ResultFile::new(method, machine, signal::interrupted(), measured);
    result.label.clone_from(&out.label);
    result.deliver(out.json, out.save.as_deref())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
