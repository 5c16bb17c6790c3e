//! Other VMMs, driven by their own documented interfaces with the settings that their authors recommend for a guest
//! that starts fast (docs/performance.md lists them). Each boots the same guest by PVH, with its console on a socket.

use std::fmt;
use std::io::{ErrorKind, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tempfile::NamedTempFile;

use crate::driver::{Reaped, Seen, on_path, read_until};
use crate::libraries::libraries;

/// A peer that has not started the guest by then does not (a minute: QEMU takes a tenth of a second).
const PATIENCE: Duration = Duration::from_secs(60);

/// The sorts of VMM that can be compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sort {
    Qemu,
    Firecracker,
    CloudHypervisor,
}

impl Sort {
    const ALL: [Self; 3] = [Self::Qemu, Self::Firecracker, Self::CloudHypervisor];

    fn name(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::Firecracker => "firecracker",
            Self::CloudHypervisor => "cloud-hypervisor",
        }
    }

    /// What its --version says before the number, and the first version that can boot the probe guest: QEMU has
    /// `microvm` since 4.2 and qboot as its firmware since 5.1, Firecracker boots by PVH since 1.12, Cloud Hypervisor
    /// before 20 is older than anything that anybody compares with.
    fn expected(self) -> (&'static str, (u32, u32)) {
        match self {
            Self::Qemu => ("QEMU emulator version ", (5, 1)),
            Self::Firecracker => ("Firecracker v", (1, 12)),
            Self::CloudHypervisor => ("cloud-hypervisor v", (20, 0)),
        }
    }
}

/// NAME=PATH on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerArg {
    sort: Sort,
    path: PathBuf,
}

impl PeerArg {
    /// The same with the program's own path, found as a shell finds it.
    ///
    /// # Errors
    /// When there is no such program.
    pub fn found(&self) -> Result<Self> {
        let name = self.path.to_str().filter(|p| !p.contains('/'));
        let path = match name {
            Some(name) => on_path(name).with_context(|| format!("{name} is not on PATH"))?,
            None => std::path::absolute(&self.path)?,
        };
        Ok(Self { path, ..self.clone() })
    }

    /// All files that the program needs elsewhere: itself, its libraries, QEMU's firmware.
    ///
    /// # Errors
    /// When one of them cannot be found.
    pub fn files(&self) -> Result<Vec<PathBuf>> {
        let mut files = libraries(&self.path)?;
        files.push(self.path.clone());
        if self.sort == Sort::Qemu {
            let output = Command::new(&self.path).args(["-L", "help"]).output();
            let output = output.with_context(|| format!("starting {} -L help", self.path.display()))?;
            let folders = String::from_utf8_lossy(&output.stdout);
            let folders = folders.lines().filter_map(|l| Path::new(l).canonicalize().ok());
            let mut firmware = folders.map(|f| f.join("bios-microvm.bin"));
            let firmware = firmware.find(|p| p.is_file());
            files
                .push(firmware.with_context(|| {
                    format!("{} does not find its bios-microvm.bin", self.path.display())
                })?);
        }
        Ok(files)
    }

    /// The program, if it is QEMU.
    pub fn qemu(&self) -> Option<&Path> {
        (self.sort == Sort::Qemu).then_some(&self.path)
    }
}

impl FromStr for PeerArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names = Sort::ALL.map(Sort::name).join(", ");
        let (name, path) = text
            .split_once('=')
            .ok_or_else(|| format!("expected NAME=PATH with a NAME of {names}"))?;
        let sort = Sort::ALL.into_iter().find(|s| s.name() == name);
        let sort = sort.ok_or_else(|| format!("{name:?} is none of {names}"))?;
        if path.is_empty() {
            return Err(format!("name the program: {name}=PATH"));
        }
        Ok(Self {
            sort,
            path: path.into(),
        })
    }
}

impl fmt::Display for PeerArg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.sort.name(), self.path.display())
    }
}

/// The peers that can be used, each made by `new`. One that cannot is told, and the rest goes on.
pub fn usable<P>(args: &[PeerArg], new: impl Fn(&PeerArg) -> Result<P>) -> Vec<P> {
    let made = args.iter().map(|arg| (arg, new(arg)));
    made.filter_map(|(arg, peer)| match peer {
        Ok(peer) => Some(peer),
        Err(e) => {
            eprintln!("shoal-perf: the peer {arg} is left out: {e:#}");
            None
        }
    })
    .collect()
}

/// Asks a peer's program for its version.
///
/// # Errors
/// When it is missing, something else, or too old.
pub fn version_of(arg: &PeerArg) -> Result<String> {
    let output = Command::new(&arg.path)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("starting {} --version", arg.path.display()))?;
    version(arg.sort, &String::from_utf8_lossy(&output.stdout))
        .with_context(|| format!("{} --version", arg.path.display()))
}

/// What peers boot, with one vCPU.
pub struct PeerGuest {
    /// An ELF kernel with a PVH note.
    pub kernel: PathBuf,
    /// An initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
    /// Memory (MiB).
    pub memory_mib: u64,
    /// The output by which the start is seen to be done.
    pub marker: Vec<u8>,
    /// Nothing may come before it.
    pub at_once: bool,
}

/// A VMM to compare with, and what it boots.
pub struct Peer<'a> {
    arg: PeerArg,
    version: String,
    guest: &'a PeerGuest,
    /// Firecracker's configuration; empty for the others.
    config: NamedTempFile,
}

impl<'a> Peer<'a> {
    /// Asks the program for its version and writes its files.
    pub fn new(arg: &PeerArg, guest: &'a PeerGuest) -> Result<Self> {
        let version = version_of(arg)?;
        let mut config = NamedTempFile::new().context("making a temporary file")?;
        if arg.sort == Sort::Firecracker {
            let mut source = serde_json::json!({ "kernel_image_path": guest.kernel });
            if let Some(initrd) = &guest.initrd {
                source["initrd_path"] = serde_json::json!(initrd);
            }
            if !guest.cmdline.is_empty() {
                source["boot_args"] = serde_json::json!(guest.cmdline);
            }
            let json = serde_json::json!({
                "boot-source": source,
                "drives": [],
                "machine-config": { "vcpu_count": 1, "mem_size_mib": guest.memory_mib },
            });
            config.write_all(json.to_string().as_bytes())?;
        }
        Ok(Self {
            arg: arg.clone(),
            version,
            guest,
            config,
        })
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        self.arg.sort.name()
    }

    /// What it says of its version.
    pub fn version(&self) -> &str {
        &self.version
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.arg.path);
        let guest = self.guest;
        let memory = format!("{}M", guest.memory_mib);
        match self.arg.sort {
            // docs/system/i386/microvm.rst: the smallest machine, with the serial port, which the probe writes to.
            // QEMU 7.2 ends when KVM offers the register of these capabilities and then refuses its value (pagetable
            // KVM does), so the guest does without.
            Sort::Qemu => command
                .args([
                    "-M",
                    "microvm,x-option-roms=off,pit=off,pic=off,rtc=off,isa-serial=on",
                ])
                .args([
                    "-enable-kvm",
                    "-cpu",
                    "host,arch-capabilities=off",
                    "-smp",
                    "1",
                    "-m",
                    &memory,
                ])
                .args([
                    "-nodefaults",
                    "-no-user-config",
                    "-display",
                    "none",
                    "-serial",
                    "stdio",
                ])
                .arg("-kernel")
                .arg(&guest.kernel),
            // docs/getting-started.md: configuration from a file, no API server; the log away from the console.
            Sort::Firecracker => command
                .args([
                    "--no-api",
                    "--log-path",
                    "/dev/null",
                    "--level",
                    "Error",
                    "--config-file",
                ])
                .arg(self.config.path()),
            // README.md, docs/memory.md: no API socket unless asked for; the serial port on standard output.
            Sort::CloudHypervisor => command
                .args(["--cpus", "boot=1", "--memory", &format!("size={memory}")])
                .args(["--serial", "tty", "--console", "off", "--kernel"])
                .arg(&guest.kernel),
        };
        let (initrd, cmdline) = match self.arg.sort {
            Sort::Qemu => ("-initrd", "-append"),
            Sort::CloudHypervisor => ("--initramfs", "--cmdline"),
            // Its configuration has them.
            Sort::Firecracker => return command,
        };
        if let Some(path) = &guest.initrd {
            command.arg(initrd).arg(path);
        }
        if !guest.cmdline.is_empty() {
            command.arg(cmdline).arg(&guest.cmdline);
        }
        command
    }

    /// From before its process is made to the guest's marker.
    pub fn start(&self) -> Result<Duration> {
        let (mut console, console_end) = UnixStream::pair()?;
        console.set_read_timeout(Some(PATIENCE))?;
        let mut errors = tempfile::tempfile()?;
        let mut command = self.command();
        // A pipe that stays open: the end of standard input means "quit" to some.
        command
            .stdin(Stdio::piped())
            .stdout(OwnedFd::from(console_end))
            .stderr(errors.try_clone()?);
        let begin = Instant::now();
        let child = command.spawn();
        let child = Reaped(child.with_context(|| format!("starting {}", self.arg.path.display()))?);
        drop(command);
        let seen = read_until(&mut console, &self.guest.marker);
        let elapsed = begin.elapsed();
        drop(child);
        let mut said = String::new();
        errors.rewind()?;
        errors.take(2000).read_to_string(&mut said).ok();
        let program = self.arg.path.display();
        match seen {
            Ok(Seen::Marker(output)) if !self.guest.at_once || output.as_bytes() == self.guest.marker => {
                Ok(elapsed)
            }
            Ok(Seen::Marker(output)) => {
                bail!("{program} wrote {output:?} where the guest's first byte was expected; it said: {said}")
            }
            Ok(Seen::End(output)) => {
                bail!("{program} ended before the guest was up; the console: {output:?}; it said: {said}")
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                bail!("{program} has not started the guest after {PATIENCE:?}; it said: {said}")
            }
            Err(e) => Err(e).with_context(|| format!("reading the console of {program}")),
        }
    }
}

/// Takes the version out of what `--version` printed, and refuses other programs and versions that are too old.
fn version(sort: Sort, printed: &str) -> Result<String> {
    let (before, least) = sort.expected();
    let Some(version) = printed.lines().find_map(|l| l.strip_prefix(before)) else {
        let said: String = printed.chars().take(100).collect();
        bail!(
            "this is no {}: its version does not begin with {before:?} but is {said:?}",
            sort.name()
        )
    };
    let mut numbers = version
        .split(|c: char| !c.is_ascii_digit())
        .map(str::parse::<u32>);
    let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else {
        bail!("the version {version:?} has no numbers")
    };
    if (major, minor) < least {
        bail!(
            "version {version} is too old: {}.{} or later is needed",
            least.0,
            least.1
        );
    }
    Ok(version.chars().take(100).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_are_named_on_the_command_line() {
        let arg: PeerArg = "qemu=/usr/bin/q=x".parse().unwrap();
        assert_eq!(
            (arg.sort, arg.to_string().as_str()),
            (Sort::Qemu, "qemu=/usr/bin/q=x")
        );
        for bad in ["qemu", "qemu=", "xen=/x", "=", ""] {
            assert!(bad.parse::<PeerArg>().is_err(), "{bad}");
        }
    }

    #[test]
    fn versions_are_checked() {
        let debian = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg)\nCopyright";
        assert_eq!(version(Sort::Qemu, debian).unwrap(), "7.2.22 (Debian 1:7.2+dfsg)");
        assert!(version(Sort::Firecracker, debian).is_err());
        assert!(
            version(Sort::Qemu, "QEMU emulator version 4.2.0")
                .unwrap_err()
                .to_string()
                .contains("too old")
        );
        assert!(version(Sort::Firecracker, "Firecracker v1.7.0").is_err());
        assert_eq!(
            version(Sort::Firecracker, "Firecracker v1.12.1\n\nSupported").unwrap(),
            "1.12.1"
        );
        assert!(version(Sort::CloudHypervisor, "cloud-hypervisor v53.0-dev").is_ok());
        assert!(version(Sort::CloudHypervisor, "cloud-hypervisor vNext").is_err());
        assert!(version(Sort::Qemu, "").is_err());
    }

    /// A program that says it is `version`, and otherwise does `script`. Another process writes the file: were it open
    /// here, a test beside this one could pass it on to what it starts, and the kernel would not execute it.
    fn fake(version: &str, script: &str) -> tempfile::TempPath {
        let version = format!("if [ \"$1\" = --version ]; then echo \"{version}\"; exit; fi");
        let path = NamedTempFile::new().unwrap().into_temp_path();
        let mut install = Command::new("install")
            .args(["-m", "755", "/dev/stdin"])
            .arg(&path)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        write!(install.stdin.take().unwrap(), "#!/bin/sh\n{version}\n{script}\n").unwrap();
        assert!(install.wait().unwrap().success());
        path
    }

    fn guest(at_once: bool) -> PeerGuest {
        PeerGuest {
            kernel: "/k".into(),
            initrd: Some("/i".into()),
            cmdline: "console=ttyS0 quiet".into(),
            memory_mib: 128,
            marker: b"UP".into(),
            at_once,
        }
    }

    #[test]
    fn each_peer_is_told_of_the_whole_guest() {
        for (name, version, told) in [
            (
                "qemu",
                "QEMU emulator version 7.2.0",
                "-kernel /k -initrd /i -append console=ttyS0 quiet",
            ),
            (
                "cloud-hypervisor",
                "cloud-hypervisor v53.0",
                "--kernel /k --initramfs /i --cmdline console=ttyS0 quiet",
            ),
            (
                "firecracker",
                "Firecracker v1.17.0",
                r#""boot_args":"console=ttyS0 quiet","initrd_path":"/i","kernel_image_path":"/k""#,
            ),
        ] {
            // What it is told comes as its standard error: its arguments, and the file that the last of them may name.
            let program = fake(
                version,
                "echo \"$@\" >&2; for last; do :; done; cat \"$last\" >&2; exit 1",
            );
            let arg: PeerArg = format!("{name}={}", program.display()).parse().unwrap();
            let guest = guest(false);
            let peer = Peer::new(&arg, &guest).unwrap();
            assert_eq!(
                (peer.name(), peer.version()),
                (name, version.rsplit([' ', 'v']).next().unwrap())
            );
            let said = peer.start().unwrap_err().to_string();
            assert!(said.contains(told) && said.contains("128"), "{said}");
        }
    }

    #[test]
    fn what_comes_before_the_marker_matters_where_it_should() {
        let version = "QEMU emulator version 7.2.0";
        let start = |script: &str, at_once| {
            let program = fake(version, script);
            let arg: PeerArg = format!("qemu={}", program.display()).parse().unwrap();
            Peer::new(&arg, &guest(at_once)).unwrap().start()
        };
        start("echo firmware; printf UP; cat", false).unwrap();
        start("printf UP; cat", true).unwrap();
        let said = start("echo UProar; cat", true).unwrap_err().to_string();
        assert!(said.contains("UProar"), "{said}");
        let said = start("echo no KVM >&2", false).unwrap_err().to_string();
        assert!(said.contains("ended before") && said.contains("no KVM"), "{said}");
    }

    #[test]
    fn a_program_that_is_missing_or_something_else_is_refused() {
        let refuse = |path: &str| version_of(&format!("qemu={path}").parse().unwrap()).unwrap_err();
        assert!(format!("{:#}", refuse("/nonexistent/qemu")).contains("/nonexistent/qemu"));
        assert!(format!("{:#}", refuse("/bin/true")).contains("this is no qemu"));
    }
}
