//! `shoal-lab`: runs commands and tests in a software-emulated machine with KVM in it; as process 1, its `/init`.

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand};
use shoal_lab::host::terminal::Terminal;
use shoal_lab::host::{self, BuildDir, LabError, Options, Outcome, ShareDir};
use shoal_lab::job::Stdin;
use shoal_lab::tally::{Counter, Tally};
use std::io::{self, BufRead, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Runs Shoal in a software-emulated machine that offers KVM, where the real one cannot run Linux guests.
#[derive(Debug, Parser)]
#[command(name = "shoal-lab", version)]
struct Cli {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Run a command as root in a fresh machine; end with its exit code (128 + signal when a signal killed it, 124
    /// when the time was up, 125 when the machine failed).
    Run {
        #[command(flatten)]
        machine: MachineArgs,
        /// Give the command this program's standard input (else it has /dev/null).
        #[arg(long)]
        stdin: bool,
        /// The command and its arguments.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Work in a fresh machine on this terminal.
    Shell {
        #[command(flatten)]
        machine: MachineArgs,
        /// The command and its arguments.
        #[arg(last = true, default_values_t = ["sh".to_owned()])]
        command: Vec<String>,
    },
    /// Run test programs (libtest harnesses), one after another in one machine, and add up their results.
    Test {
        #[command(flatten)]
        machine: MachineArgs,
        /// Static test programs.
        #[arg(required = true, value_name = "BIN")]
        programs: Vec<PathBuf>,
        /// Arguments for each of them, like a filter.
        #[arg(last = true, value_name = "HARNESS-ARGUMENT")]
        arguments: Vec<String>,
    },
    /// Add up the output of test harnesses on standard input; fail when a test failed or none ran.
    Tally,
    /// What `test` runs in the machine.
    #[command(hide = true)]
    RunTestPrograms {
        #[arg(required = true)]
        programs: Vec<PathBuf>,
        #[arg(last = true)]
        arguments: Vec<String>,
    },
}

#[derive(Debug, Args)]
struct MachineArgs {
    /// Count time in instructions, 1 ns each: what is measured inside repeats. All files are copied into memory.
    #[arg(long)]
    icount: bool,
    /// Memory of the machine, MiB.
    #[arg(long, default_value_t = 2048, value_name = "MIB", value_parser = clap::value_parser!(u32).range(256..=65536))]
    memory: u32,
    /// Limit for the whole run, seconds.
    #[arg(long, default_value_t = 600, value_name = "S", value_parser = clap::value_parser!(u64).range(1..=86400))]
    timeout: u64,
    /// Share a directory: HOSTDIR[:GUESTDIR][:rw].
    #[arg(long, value_name = "HOSTDIR[:GUESTDIR][:rw]")]
    share: Vec<ShareDir>,
    /// Set a variable of the command's environment.
    #[arg(long, value_name = "NAME=VALUE", value_parser = variable)]
    env: Vec<(String, String)>,
    /// Copy a file or directory into the machine's memory, at the same path.
    #[arg(long, value_name = "PATH")]
    copy: Vec<PathBuf>,
    /// Print the machine's kernel log on standard error.
    #[arg(long)]
    kernel_log: bool,
    /// Print how long the stages took, on standard error.
    #[arg(long)]
    timings: bool,
    /// The workspace's build directory (default: the one around this program, else the nearest).
    #[arg(long, env = "SHOAL_BUILD", value_name = "DIR")]
    build: Option<PathBuf>,
    /// A directory with boot/vmlinuz-* and lib/modules/* (default: what scripts/cloud-kernel.sh prints).
    #[arg(long, env = "SHOAL_LAB_KERNEL", value_name = "DIR")]
    kernel_tree: Option<PathBuf>,
}

impl MachineArgs {
    fn options(&self, command: Vec<String>, stdin: Stdin) -> anyhow::Result<Options> {
        let build = BuildDir::find(self.build.as_deref());
        if let (Some(named), None) = (&self.build, &build) {
            bail!("the build directory {} is not there", named.display());
        }
        Ok(Options {
            command,
            icount: self.icount,
            memory: self.memory,
            timeout: Duration::from_secs(self.timeout),
            shares: self.share.clone(),
            env: self.env.clone(),
            copies: self.copy.clone(),
            kernel_log: self.kernel_log,
            stdin,
            build,
            kernel_tree: self.kernel_tree.clone(),
        })
    }
}

fn variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() && !text.contains('\0') => {
            Ok((name.to_owned(), value.to_owned()))
        }
        _ => Err("it must be NAME=VALUE".to_owned()),
    }
}

fn main() -> ExitCode {
    if std::process::id() == 1 {
        return match shoal_lab::guest::main() {
            Err(error) => complain(&error.into()),
        };
    }
    match dispatch(Cli::parse()) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let code = error
                .downcast_ref::<LabError>()
                .map_or(host::EXIT_MACHINE, LabError::exit_code);
            eprintln!("shoal-lab: {error:#}");
            ExitCode::from(code)
        }
    }
}

/// Process 1 is about to end, with which the machine ends too: its console is the last place to say why.
fn complain(error: &anyhow::Error) -> ExitCode {
    eprintln!("shoal-lab: {error:#}");
    let _ = std::fs::write("/dev/kmsg", format!("<2>shoal-lab: {error:#}\n"));
    ExitCode::FAILURE
}

fn dispatch(cli: Cli) -> anyhow::Result<u8> {
    match cli.what {
        What::Run {
            machine,
            stdin,
            command,
        } => {
            let options = machine.options(command, if stdin { Stdin::Pipe } else { Stdin::Null })?;
            let outcome = host::run(&options, io::stdout(), io::stderr())?;
            report_timings(&machine, &outcome);
            Ok(outcome.code)
        }
        What::Shell { machine, command } => {
            let terminal = Terminal::take()
                .context("standard input must be a terminal (else: shoal-lab run --stdin)")?;
            let options = machine.options(command, terminal.size())?;
            let result = host::run(&options, io::stdout(), io::stderr());
            drop(terminal);
            Ok(result?.code)
        }
        What::Test {
            machine,
            programs,
            arguments,
        } => test(&machine, programs, arguments),
        What::Tally => {
            let mut counter = Counter::default();
            let mut input = io::stdin().lock();
            let mut line = Vec::new();
            while input
                .read_until(b'\n', &mut line)
                .context("cannot read standard input")?
                > 0
            {
                counter.line(&String::from_utf8_lossy(&line));
                line.clear();
            }
            Ok(close(counter.finish()))
        }
        What::RunTestPrograms { programs, arguments } => Ok(u8::from(!shoal_lab::guest::run_test_programs(
            &programs, &arguments,
        )?)),
    }
}

fn report_timings(machine: &MachineArgs, outcome: &Outcome) {
    if machine.timings {
        let t = &outcome.timings;
        eprintln!(
            "shoal-lab: QEMU started after {:.2} s, command after {:.2} s (machine's clock: {:.2} s), ended after {:.2} s",
            t.started.as_secs_f64(),
            t.up.as_secs_f64(),
            t.uptime.as_secs_f64(),
            t.ended.as_secs_f64()
        );
    }
}

fn close(tally: Tally) -> u8 {
    println!("{tally}");
    u8::from(!tally.good())
}

fn test(machine: &MachineArgs, programs: Vec<PathBuf>, arguments: Vec<String>) -> anyhow::Result<u8> {
    let mut command: Vec<String> = ["/bin/shoal-lab", "run-test-programs"]
        .map(str::to_owned)
        .to_vec();
    let mut paths = Vec::new();
    for program in &programs {
        let path =
            std::fs::canonicalize(program).with_context(|| format!("test program {}", program.display()))?;
        command.push(
            path.to_str()
                .context("a test program's path is not UTF-8")?
                .to_owned(),
        );
        paths.push(path);
    }
    command.push("--".to_owned());
    command.extend(arguments);
    let mut options = machine.options(command, Stdin::Null)?;
    options.copies.extend(paths);

    let counter = Arc::new(Mutex::new(Counting {
        counter: Counter::default(),
        line: Vec::new(),
    }));
    let outcome = host::run(&options, Tee(counter.clone()), io::stderr());
    let mut counting = counter.lock().unwrap_or_else(PoisonError::into_inner);
    let results = counting.counter.results();
    let mut tally = std::mem::take(&mut counting.counter).finish();
    // What never began, or was cut off before it said anything.
    let missing = (programs.len() as u64).saturating_sub(results);
    tally.failed = tally.failed.max(missing);
    let code = close(tally);
    report_timings(machine, &outcome?);
    Ok(code)
}

/// Passes output on and counts results in it.
struct Tee(Arc<Mutex<Counting>>);

struct Counting {
    counter: Counter,
    /// The beginning of a line whose end has not come yet.
    line: Vec<u8>,
}

impl Write for Tee {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = io::stdout().write(bytes)?;
        let mut counting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for byte in &bytes[..count] {
            counting.line.push(*byte);
            // A harness's lines are short; what is longer is none of them and needs not be kept.
            if *byte == b'\n' || counting.line.len() > 64 << 10 {
                let line = std::mem::take(&mut counting.line);
                counting.counter.line(&String::from_utf8_lossy(&line));
            }
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stdout().flush()
    }
}
