//! `shoal-perf`: benchmarks that anyone can repeat. Every result names the way in which it was measured; speed is
//! given as a ratio taken in one run, or as a deterministic figure from the lab.

#![deny(unsafe_code)]

mod boot;
mod driver;
mod stats;

use clap::{Parser, Subcommand};

/// Benchmarks of Shoal: boot latency for now.
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
    /// Prints the result as JSON
    #[arg(long)]
    json: bool,
    /// Measured starts [default: 40 with --probe, 3 otherwise]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    runs: Option<u32>,
    #[command(flatten)]
    linux: boot::LinuxArgs,
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Boot(args) if args.probe => boot::probe(args.runs.unwrap_or(40), args.json),
        Command::Boot(args) => {
            let linux = args.linux.resolve()?;
            let runs = args.runs.unwrap_or(3);
            if args.lab {
                boot::lab(&linux, runs, args.json)
            } else {
                boot::here(&linux, runs, args.json)
            }
        }
    }
}
