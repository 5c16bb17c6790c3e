//! `shoal-jailer`: jails one VMM by hand, and derives the seccomp policies from traced runs.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod cli;

/// Runs one program, usually shoal-vmm, in a jail: empty namespaces, a user and a cgroup of its own, no capabilities.
/// Stays as its parent, forwards signals, and reports its end.
///
/// The program must be static: there is no file system inside. It gets /dev/null as input; its outputs are passed on
/// by the jailer, so that it holds no terminal. Signals: a first SIGINT or SIGTERM is forwarded, a second kills.
///
/// Exit codes: that of the program; 128 + N when signal N ended it (159: a seccomp filter); 125 when there is no jail;
/// 2 for wrong usage.
#[derive(Parser)]
#[command(
    version,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    run: Option<cli::run::RunArguments>,
}

#[derive(Subcommand)]
enum Command {
    /// Run a command, and write down which lines of the seccomp policies the VMMs started below it use
    ///
    /// The VMMs must be started with `--seccomp trace`.
    Trace(cli::trace::TraceArguments),
    /// Compare the seccomp policies with traced runs; fail when a line is unused, or a call has no line
    PolicyReport(cli::report::ReportArguments),
    /// Clean up after a jailer that was killed (started by the jailer itself)
    #[command(hide = true)]
    Sweep(cli::sweep::SweepArguments),
}

fn main() -> ExitCode {
    let arguments = Cli::parse();
    let done = match (arguments.command, arguments.run) {
        (Some(Command::Trace(arguments)), _) => cli::trace::trace(&arguments),
        (Some(Command::PolicyReport(arguments)), _) => cli::report::report(&arguments),
        (Some(Command::Sweep(arguments)), _) => cli::sweep::sweep(&arguments),
        (None, Some(arguments)) => cli::run::run(&arguments),
        (None, None) => Err(anyhow::anyhow!("nothing to run; see --help")),
    };
    done.unwrap_or_else(|error| {
        eprintln!("shoal-jailer: {error:#}");
        ExitCode::from(cli::NO_JAIL)
    })
}
