//! Other VMMs, driven by their own documented interfaces with the settings that their authors recommend for a guest
//! that starts fast (docs/performance.md lists them). Each boots the same probe guest by PVH, with its console on a pipe.

use std::fmt;
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tempfile::NamedTempFile;

use crate::boot::PROBE_MEMORY_MIB;
use crate::driver::Reaped;

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

/// A VMM to compare with, and the files that it boots from.
pub struct Peer {
    arg: PeerArg,
    version: String,
    kernel: NamedTempFile,
    /// Firecracker's configuration; empty for the others.
    config: NamedTempFile,
}

impl Peer {
    /// Asks the program for its version and writes its files.
    pub fn new(arg: &PeerArg) -> Result<Self> {
        let output = Command::new(&arg.path)
            .arg("--version")
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("starting {} --version", arg.path.display()))?;
        let version = version(arg.sort, &String::from_utf8_lossy(&output.stdout))
            .with_context(|| format!("{} --version", arg.path.display()))?;
        let mut kernel = NamedTempFile::new().context("making a temporary file")?;
        kernel.write_all(shoal_probe::HALT_PVH)?;
        let mut config = NamedTempFile::new().context("making a temporary file")?;
        if arg.sort == Sort::Firecracker {
            let json = serde_json::json!({
                "boot-source": { "kernel_image_path": kernel.path() },
                "drives": [],
                "machine-config": { "vcpu_count": 1, "mem_size_mib": PROBE_MEMORY_MIB },
            });
            config.write_all(json.to_string().as_bytes())?;
        }
        Ok(Self {
            arg: arg.clone(),
            version,
            kernel,
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
        let memory = format!("{PROBE_MEMORY_MIB}M");
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
                .arg(self.kernel.path()),
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
                .arg(self.kernel.path()),
        };
        command
    }

    /// From before its process is made to the guest's first output, which must be the probe's `R` and nothing before.
    pub fn start(&self) -> Result<Duration> {
        let (mut console, console_end) = std::io::pipe()?;
        let mut errors = tempfile::tempfile()?;
        let mut command = self.command();
        // A pipe that stays open: the end of standard input means "quit" to some.
        command
            .stdin(Stdio::piped())
            .stdout(console_end)
            .stderr(errors.try_clone()?);
        let begin = Instant::now();
        let child = command.spawn();
        let child = Reaped(child.with_context(|| format!("starting {}", self.arg.path.display()))?);
        drop(command);
        let mut first = [0];
        let n = console.read(&mut first)?;
        let elapsed = begin.elapsed();
        drop(child);
        if (n, first) == (1, *b"R") {
            return Ok(elapsed);
        }
        let mut said = String::new();
        errors.rewind()?;
        errors.take(2000).read_to_string(&mut said).ok();
        match n {
            0 => bail!(
                "{} ended before the guest wrote anything; it said: {said}",
                self.arg.path.display()
            ),
            _ => bail!(
                "{} wrote {:?} where the guest's first byte was expected; it said: {said}",
                self.arg.path.display(),
                char::from(first[0])
            ),
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

    #[test]
    fn a_program_that_is_missing_or_something_else_is_refused() {
        let refuse = |path: &str| Peer::new(&format!("qemu={path}").parse().unwrap()).err().unwrap();
        assert!(format!("{:#}", refuse("/nonexistent/qemu")).contains("/nonexistent/qemu"));
        assert!(format!("{:#}", refuse("/bin/true")).contains("this is no qemu"));
    }
}
