//! `shoal run`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use http_body_util::BodyExt;
use hyper::Method;
use shoal_api_types::{
    Console, CreateGuest, Disk, Guest, Initrd, Kernel, Network, Rng, StopGuest, StopReason, Vsock,
};
use tokio::io::AsyncReadExt;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::client::{Client, guest_path};
use crate::commands::print;
use crate::devices;
use crate::options::Run;
use crate::output;

/// The image's own command line: the console, and its root file system on the first disk.
const IMAGE_CMDLINE: &str = "console=ttyS0 root=/dev/vda rootfstype=erofs ro panic=-1 quiet";
/// How long a guest may take to stop after the first Ctrl-C (ms); the second ends it at once.
const STOP_MS: u64 = 10_000;

/// Creates and starts a guest and shows its console.
pub async fn run(client: &Client, options: Run) -> Result<ExitCode> {
    let body = describe(&options)?;
    // Before the guest exists: whatever signal comes from here on, it is not left behind by accident.
    let mut signals = (!options.detach).then(Signals::new).transpose()?;
    let guest: Guest = client.post("/v1/guests", &body).await?;
    let Some(signals) = &mut signals else {
        print(&format!("{}\n", guest.id))?;
        if options.timeline {
            eprint!("{}", output::timeline(&guest.timeline));
        }
        return Ok(ExitCode::SUCCESS);
    };
    let shown = attach(client, &guest.id, options.interactive, signals).await;
    let ended: Result<Guest> = client.get(&guest_path(&guest.id, "")).await;
    if options.rm {
        // What went wrong before is worth more than this.
        let removed = client.delete(&guest_path(&guest.id, "?force=true")).await;
        shown.as_ref().ok().map_or(Ok(()), |()| removed)?;
    }
    shown?;
    let ended = ended?;
    if options.timeline {
        eprint!("{}", output::timeline(&ended.timeline));
    }
    Ok(exit_code(&ended))
}

fn absolute(path: &Path) -> Result<String> {
    let path = std::path::absolute(path).with_context(|| format!("resolving {path:?}"))?;
    path.into_os_string()
        .into_string()
        .map_err(|path| anyhow::anyhow!("{path:?} is not UTF-8; the API cannot name it"))
}

/// What to ask of the daemon.
fn describe(options: &Run) -> Result<CreateGuest> {
    let mut disks = Vec::new();
    let mut vsock = options.vsock;
    let (kernel, own_cmdline) = match &options.kernel {
        Some(kernel) => (kernel.clone(), "console=ttyS0"),
        None => {
            let (kernel, root) = image(options.image.as_deref())?;
            disks.push(Disk {
                id: Some("root".into()),
                path: absolute(&root)?,
                read_only: true,
                ..Disk::default()
            });
            vsock = true;
            (kernel, IMAGE_CMDLINE)
        }
    };
    for text in &options.disks {
        let (path, disk) = devices::disk(text)?;
        disks.push(Disk {
            path: absolute(Path::new(path))?,
            ..disk
        });
    }
    let mut cmdline = options.cmdline.clone().unwrap_or_else(|| own_cmdline.to_owned());
    if let Some(words) = &options.append {
        cmdline = format!("{cmdline} {words}");
    }
    if !options.command.is_empty() {
        cmdline = format!("{cmdline} -- {}", quote(&options.command)?);
    }
    Ok(CreateGuest {
        name: options.name.clone(),
        kernel: Kernel {
            path: absolute(&kernel)?,
            cmdline,
        },
        initrd: match &options.initrd {
            Some(path) => Some(Initrd {
                path: absolute(path)?,
            }),
            None => None,
        },
        vcpus: options.cpus,
        memory_mib: options.memory,
        disks,
        networks: options
            .taps
            .iter()
            .map(|tap| devices::network(tap))
            .collect::<Result<Vec<Network>>>()?,
        vsock: vsock.then(Vsock::default),
        console: Console::default(),
        rng: Rng::default(),
        start: true,
    })
}

/// Kernel and root file system of an image's folder.
fn image(folder: Option<&Path>) -> Result<(PathBuf, PathBuf)> {
    let folder = match folder {
        Some(folder) => folder.to_owned(),
        None => {
            let program = std::env::current_exe().context("finding the folder of shoal")?;
            program.parent().unwrap_or(Path::new("/")).join("../images")
        }
    };
    // `bin/../images` reads better without the detour; a folder that is missing is told by its name below.
    let folder = folder.canonicalize().unwrap_or(folder);
    let files = (folder.join("vmlinux"), folder.join("rootfs.erofs"));
    for file in [&files.0, &files.1] {
        if !file.exists() {
            bail!(
                "there is no {file:?}; build the image (make images), name its folder with --image or SHOAL_IMAGE, or \
                 give a --kernel"
            );
        }
    }
    Ok(files)
}

/// Puts words on the kernel's command line, which knows double quotes and nothing inside of them.
fn quote(words: &[String]) -> Result<String> {
    let quoted = words.iter().map(|word| match word {
        word if word.contains('"') => {
            bail!("the kernel's command line cannot carry {word:?}: it holds a double quote")
        }
        word if word.is_empty() || word.contains(char::is_whitespace) => Ok(format!("\"{word}\"")),
        word => Ok(word.clone()),
    });
    Ok(quoted.collect::<Result<Vec<_>>>()?.join(" "))
}

struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn new() -> Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt()).context("watching for SIGINT")?,
            terminate: signal(SignalKind::terminate()).context("watching for SIGTERM")?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// Shows the console until the guest ends. The first Ctrl-C asks the guest to stop, the second ends it.
async fn attach(client: &Client, id: &str, interactive: bool, signals: &mut Signals) -> Result<()> {
    let path = guest_path(id, "/console?follow=true");
    let mut body = client.send(Method::GET, &path, "", Vec::new()).await?.into_body();
    let mut deadline_ms = STOP_MS;
    let mut typing = interactive.then(|| tokio::spawn(type_in(client.clone(), id.to_owned())));
    let shown = loop {
        tokio::select! {
            frame = body.frame() => match frame {
                Some(Ok(frame)) => if let Ok(data) = frame.into_data() {
                    show(&data)?;
                },
                Some(Err(error)) => break Err(error).context("the daemon hung up; the guest may still run: shoal ps"),
                None => break Ok(()),
            },
            () = signals.next() => {
                eprintln!("shoal: asking guest {id} to stop; again ends it at once");
                let (client, path) = (client.clone(), guest_path(id, "/stop"));
                let stop = StopGuest { deadline_ms };
                // The console tells how it goes; a guest that has ended meanwhile is what was wanted.
                tokio::spawn(async move { drop(client.post::<Guest>(&path, &stop).await) });
                deadline_ms = 0;
            }
        }
    };
    if let Some(typing) = typing.take() {
        typing.abort();
    }
    shown
}

fn show(data: &[u8]) -> Result<()> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    out.write_all(data)
        .and_then(|()| out.flush())
        .context("writing to standard output")
}

async fn type_in(client: Client, id: String) -> Result<()> {
    let mut input = tokio::io::stdin();
    let mut buffer = [0; 512];
    let path = guest_path(&id, "/console");
    loop {
        let n = input.read(&mut buffer).await?;
        if n == 0 {
            return Ok(());
        }
        let typed = client
            .send(
                Method::POST,
                &path,
                "application/octet-stream",
                buffer[..n].to_vec(),
            )
            .await;
        if let Err(error) = typed {
            eprint!("{}", crate::error::describe(&error));
        }
    }
}

/// See the help of `shoal run`.
fn exit_code(guest: &Guest) -> ExitCode {
    let Some(stopped) = &guest.stopped else {
        return ExitCode::FAILURE;
    };
    if stopped.reason != StopReason::PowerOff {
        eprintln!("shoal: {}", stopped.detail);
    }
    ExitCode::from(match (guest.exit_code, stopped.reason) {
        (Some(code), StopReason::PowerOff | StopReason::Reset) => code.clamp(0, 255) as u8,
        (_, StopReason::PowerOff) => 0,
        (_, StopReason::Reset) => 64,
        (_, StopReason::TripleFault) => 65,
        (_, StopReason::KvmError) => 66,
        (_, StopReason::Killed) => 67,
        (_, StopReason::VmmSignal) => 68,
        (_, StopReason::VmmExit) => 69,
        (_, StopReason::Lost) => 70,
        (_, StopReason::SeccompKill) => 71,
        (_, StopReason::VmmBug) => 72,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_for_the_command_line() {
        let words = |w: &[&str]| w.iter().map(|s| s.to_string()).collect::<Vec<_>>();
        assert_eq!(
            quote(&words(&["sh", "-c", "echo hi", ""])).unwrap(),
            r#"sh -c "echo hi" """#
        );
        assert!(quote(&words(&["a\"b"])).is_err());
    }
}
