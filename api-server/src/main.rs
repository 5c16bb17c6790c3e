//! `shoald`: serves the guests of one state directory over HTTP on a Unix socket.

#![forbid(unsafe_code)]

mod api;
mod body;
mod convert;
mod problem;
mod server;
mod socket;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use shoal_host::{Confinement, CoreScheduling, Host, HostConfig, SeccompMode};
use tokio::signal::unix::{SignalKind, signal};

/// Runs microVM guests, driven by JSON over HTTP on a Unix socket.
///
/// Guests outlive the daemon: when it is started again with the same state directory, it finds and takes over those
/// that still run. SIGTERM and SIGINT end it after the requests at hand were answered.
#[derive(Debug, Parser)]
#[command(name = "shoald", version, max_term_width = 100, args_override_self = true, after_help = EXAMPLE)]
struct Arguments {
    /// The Unix socket to serve.
    #[arg(long, value_name = "PATH", env = "SHOAL_SOCKET")]
    socket: PathBuf,
    /// The directory for records, logs and the guests' sockets; made when it is missing.
    #[arg(long, value_name = "DIR", env = "SHOAL_STATE")]
    state: PathBuf,
    /// Permissions of the socket (octal). Whoever can write to it can run guests on any file that the daemon can read.
    #[arg(long, value_name = "MODE", default_value = "0660", value_parser = socket::parse_mode)]
    socket_mode: u32,
    /// Group of the socket, by name or number.
    #[arg(long, value_name = "GROUP")]
    socket_group: Option<String>,
    /// How log lines on standard error look.
    #[arg(long, value_enum, default_value = "text")]
    log_format: LogFormat,
    /// The shoal-vmm program; the one beside shoald when it is not given.
    #[arg(long, value_name = "PATH", env = "SHOAL_VMM")]
    vmm: Option<PathBuf>,
    /// The cgroup (version 2, an absolute path) below which guests get their limits. When it is not given: below the
    /// daemon's own where that was delegated to it, else, as root, `shoal` at the top.
    #[arg(long, value_name = "PATH", env = "SHOAL_CGROUP")]
    cgroup: Option<PathBuf>,
    /// The first of the 4096 user ids (and group ids) that guests run as when the daemon is root. When it is not given:
    /// a block above 1900000000 that the state directory's path chooses.
    #[arg(long, value_name = "UID", env = "SHOAL_FIRST_USER")]
    first_user: Option<u32>,
    /// Whether a guest's threads share a core with those of no other (PR_SCHED_CORE): `auto` where processors share cores
    /// (SMT) and the kernel can do it, `on` refuses to start where it cannot, `off`.
    #[arg(
        long,
        value_name = "auto|on|off",
        default_value = "auto",
        env = "SHOAL_CORE_SCHEDULING"
    )]
    core_scheduling: CoreScheduling,
    /// For debugging: put VMMs into no jail. A guest that takes over its VMM has then what the daemon has.
    #[arg(long)]
    no_jail: bool,
    /// For debugging: what becomes of system calls that a VMM has no need of. `kill` ends it, `log` writes them to the
    /// kernel's log and allows them, `off` allows them, `trace` is for `shoal-jailer trace`.
    #[arg(long, value_name = "MODE", default_value = "kill", env = "SHOAL_SECCOMP")]
    seccomp: SeccompMode,
    /// Stop all guests at the end instead of leaving them to the next daemon.
    #[arg(long)]
    stop_guests_on_exit: bool,
}

const EXAMPLE: &str = "\
Example:
  shoald --socket /run/shoal.sock --state /var/lib/shoal &
  curl --unix-socket /run/shoal.sock http://shoal/v1/guests";

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

/// How long guests get to stop with `--stop-guests-on-exit`.
const STOP_DEADLINE: Duration = Duration::from_secs(10);

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    start_log(arguments.log_format);
    // Everything that the daemon makes is its owner's alone; the socket gets its mode afterwards.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    raise_file_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("starting the runtime")?;
    runtime.block_on(run(arguments))
}

async fn run(arguments: Arguments) -> Result<()> {
    let vmm = match arguments.vmm {
        Some(path) => path,
        None => std::env::current_exe()
            .context("finding the folder of shoald")?
            .with_file_name("shoal-vmm"),
    };
    // Before the state directory is touched: signals that come from here on end the daemon in order.
    let mut terminate = signal(SignalKind::terminate()).context("watching for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("watching for SIGINT")?;
    let confinement = Confinement {
        jail: !arguments.no_jail,
        seccomp: arguments.seccomp,
        cgroup: arguments.cgroup,
        first_user: arguments.first_user,
        core_scheduling: arguments.core_scheduling,
    };
    let config = HostConfig {
        confinement,
        ..HostConfig::new(&arguments.state, vmm)
    };
    let host = Host::open(config).await?;
    let socket = socket::bind(
        &arguments.socket,
        arguments.socket_mode,
        arguments.socket_group.as_deref(),
    )?;
    let router = api::router(host.clone()).0;
    let server = server::Server::start(socket.listener, router);
    tracing::info!(socket = ?arguments.socket, state = ?arguments.state, "ready");
    tokio::select! {
        _ = terminate.recv() => tracing::info!("SIGTERM"),
        _ = interrupt.recv() => tracing::info!("SIGINT"),
    }
    server.stop_accepting();
    drop(socket.guard);
    host.close(arguments.stop_guests_on_exit.then_some(STOP_DEADLINE))
        .await;
    server.finish().await;
    tracing::info!("ended");
    Ok(())
}

fn start_log(format: LogFormat) {
    let filter = tracing_subscriber::EnvFilter::try_from_env("SHOAL_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => log.with_ansi(false).init(),
        LogFormat::Json => log.json().init(),
    }
}

/// Each connection and each guest needs descriptors: take as many as the system allows.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let wanted = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, wanted) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}
