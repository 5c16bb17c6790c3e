//! Runs the probe guest by the real VMM and reads what it prints.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use shoal_devices::spec::FdSlot;
use shoal_vmm::channel::ChannelError;
use shoal_vmm::kernel::{self, KernelError, LoadedKernel};
use shoal_vmm::protocol::{
    ConsoleConfig, Event, ExitReason, Failure, KernelConfig, MemoryConfig, Message, Pages, Request, VmConfig,
};
use tokio::time::Instant;

use super::{Instruction, Probe};
use crate::error::HostError;
use crate::launcher::{Launch, Launcher};
use crate::link::Link;
use crate::process::Process;
use crate::resources::open_kvm;

/// Instructions that are timed in ring 3 and ring 0. An emulator of 1 million/s needs 0.1 s for the latter.
const RING3: f64 = 50e6;
const RING0: f64 = 1e5;
/// Memory of the guest (bytes).
const MEMORY: u64 = 32 << 20;
/// How long one guest may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// The probe guest could not be run.
#[derive(Debug, thiserror::Error)]
pub(super) enum ProbeError {
    #[error("{what} failed")]
    Io {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Host(#[from] HostError),
    #[error("loading the probe guest failed")]
    Kernel(#[from] KernelError),
    #[error("talking to the VMM failed; it said: {1:?}")]
    Link(#[source] ChannelError, String),
    #[error(transparent)]
    Refused(#[from] Failure),
    #[error("the guest did not end within {PATIENCE:?}")]
    Hangs,
    #[error("the guest ended by {reason:?} and printed {output:?}")]
    Output { reason: ExitReason, output: String },
}

fn io(what: &'static str) -> impl FnOnce(io::Error) -> ProbeError {
    move |source| ProbeError::Io { what, source }
}

/// What a run of the guest printed, and how it ended.
struct Run {
    output: String,
    reason: ExitReason,
}

pub(super) async fn run(launcher: &Launcher) -> Result<Probe, ProbeError> {
    let kernel = load()?;
    let cmdline = format!("spin={RING3} ring0={RING0} exit=poweroff");
    let timing = guest(launcher, &kernel, &cmdline).await?;
    let (ring3, ring0) = (cycles(&timing.output, "spin"), cycles(&timing.output, "ring0"));
    let (Some(ring3), Some(ring0)) = (ring3, ring0) else {
        return Err(ProbeError::Output {
            reason: timing.reason,
            output: timing.output,
        });
    };
    let per_second = tsc_per_second();
    let mut instructions = Vec::new();
    for name in ["cmpxchg16b", "xrstor", "int3"] {
        let run = guest(launcher, &kernel, &format!("insn={name} exit=poweroff")).await?;
        let (works, detail) = judge(name, &run);
        instructions.push(Instruction { name, works, detail });
    }
    Ok(Probe {
        ring3_ips: RING3 / ring3 * per_second,
        ring0_ips: RING0 / ring0 * per_second,
        instructions,
    })
}

fn load() -> Result<LoadedKernel, ProbeError> {
    let mut file: File = memfd_create("shoal-probe", MemfdFlags::CLOEXEC)
        .map_err(|e| io("making a memfd")(e.into()))?
        .into();
    file.write_all(shoal_probe::PROBE)
        .map_err(io("writing the probe guest"))?;
    Ok(kernel::load(&file)?)
}

fn judge(name: &str, run: &Run) -> (bool, String) {
    let says = |what: &str| run.output.contains(&format!("probe: insn {name} {what}"));
    match &run.reason {
        ExitReason::PowerOff if says("ok") => (true, "works".into()),
        ExitReason::PowerOff if says("absent") => (true, "the processor does not have it".into()),
        ExitReason::KvmError { detail } => (false, detail.clone()),
        reason => (false, format!("the guest ended by {reason:?}")),
    }
}

/// The cycles of `probe: NAME COUNT in CYCLES cycles`.
fn cycles(output: &str, name: &str) -> Option<f64> {
    let line = output
        .lines()
        .find_map(|l| l.strip_prefix("probe: ")?.strip_prefix(name))?;
    let cycles: f64 = line.split_whitespace().nth(2)?.parse().ok()?;
    (cycles > 0.0).then_some(cycles)
}

/// Ticks of the time stamp counter per second, as the kernel found it out; 1 GHz when it does not tell, for only the
/// order of magnitude counts.
fn tsc_per_second() -> f64 {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let mhz = info.lines().find_map(|l| {
        l.strip_prefix("cpu MHz")?
            .split(':')
            .nth(1)?
            .trim()
            .parse::<f64>()
            .ok()
    });
    mhz.unwrap_or(1000.0) * 1e6
}

async fn guest(launcher: &Launcher, kernel: &LoadedKernel, cmdline: &str) -> Result<Run, ProbeError> {
    let memfd = |name| {
        memfd_create(name, MemfdFlags::CLOEXEC)
            .map(File::from)
            .map_err(|e| io("making a memfd")(e.into()))
    };
    let (mut console, mut log) = (memfd("probe-console")?, memfd("probe-log")?);
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
        .map_err(|e| io("making a socket pair")(e.into()))?;
    let clone = |file: &File| file.try_clone().map_err(io("duplicating a descriptor"));
    let launch = Launch {
        // Two doctors may be at work at the same time, and so may a guest.
        guest_id: format!("probe-{}", std::process::id()),
        control: theirs,
        log: clone(&log)?,
        memory_bytes: MEMORY,
        vcpus: 1,
        largest_file: 0,
    };
    let vmm = launcher.spawn(launch).map_err(HostError::Jail)?;
    let mut process = Process::of_child(vmm.pid, vmm.pidfd, vmm.lease).map_err(io("watching the VMM"))?;
    let link = Link::new(ours).map_err(io("preparing the control connection"))?;

    let fds: Vec<OwnedFd> = vec![open_kvm()?.into(), clone(&console)?.into()];
    let handed = [fds[0].as_fd(), fds[1].as_fd(), kernel.memfd.as_fd()];
    let config = VmConfig {
        guest_id: "probe".into(),
        kvm: FdSlot(0),
        vcpus: 1,
        memory: MemoryConfig {
            bytes: MEMORY,
            pages: Pages::Small,
        },
        kernel: KernelConfig {
            fd: FdSlot(2),
            layout: kernel.layout.clone(),
        },
        initrd: None,
        cmdline: cmdline.into(),
        console: ConsoleConfig::Stream(FdSlot(1)),
        devices: Vec::new(),
        exit_record: None,
    };
    let talk = async {
        link.send(&Request::Start(Box::new(config)), &handed)?;
        loop {
            match link.recv().await? {
                Message::Reply(Err(failure)) => return Ok(Err(failure)),
                Message::Event(Event::Exited { reason }) => return Ok(Ok(reason)),
                Message::Reply(Ok(_)) | Message::Event(Event::Stamped(_)) => {}
            }
        }
    };
    let talked = tokio::time::timeout_at(Instant::now() + PATIENCE, talk).await;
    // It is about to end, or must.
    process.kill();
    process.ended().await;
    let reason = match talked {
        Ok(Ok(result)) => result?,
        Ok(Err(error)) => return Err(ProbeError::Link(error, read(&mut log)?)),
        Err(_) => return Err(ProbeError::Hangs),
    };
    Ok(Run {
        output: read(&mut console)?,
        reason,
    })
}

fn read(file: &mut File) -> Result<String, ProbeError> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))
        .and_then(|_| file.take(64 << 10).read_to_end(&mut bytes))
        .map_err(io("reading"))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_guests_report() {
        let output = "probe: ready\nprobe: spin 100 in 250 cycles\nprobe: ring0 7 in 0 cycles\n";
        assert_eq!(cycles(output, "spin"), Some(250.0));
        assert_eq!(cycles(output, "ring0"), None, "no time is no measurement");
        assert_eq!(cycles(output, "other"), None);
        let run = |output: &str, reason| Run {
            output: output.into(),
            reason,
        };
        assert!(judge("int3", &run("probe: insn int3 ok\n", ExitReason::PowerOff)).0);
        assert!(!judge("int3", &run("probe: ready\n", ExitReason::PowerOff)).0);
        let error = ExitReason::KvmError {
            detail: "suberror 1".into(),
        };
        assert_eq!(
            judge("int3", &run("probe: insn int3", error)),
            (false, "suberror 1".into())
        );
    }
}
