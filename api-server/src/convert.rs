//! Between the API's types and the host's.

use axum::http::StatusCode;
use shoal_api_types as api;
use shoal_host::{
    GuestSpec, GuestView, LimitChanges, Mac, MemoryFigures, NetworkLimits, Rate, RateLimits, State,
    StopReason,
};

use crate::problem::ApiError;

/// A guest's description for the host. What it says is checked there; only what has no place in the host's types is
/// refused here.
pub fn spec(guest: api::CreateGuest) -> Result<GuestSpec, ApiError> {
    let disks = guest
        .disks
        .into_iter()
        .enumerate()
        .map(|(i, disk)| shoal_host::Disk {
            id: disk.id.unwrap_or_else(|| format!("disk{i}")),
            path: disk.path.into(),
            read_only: disk.read_only,
            engine: match disk.engine {
                api::DiskEngine::Sync => shoal_host::DiskEngine::Sync,
                api::DiskEngine::IoUring => shoal_host::DiskEngine::IoUring,
            },
            limits: limits(disk.limits),
            queues: disk.queues,
        });
    let networks = guest.networks.into_iter().enumerate().map(|(i, network)| {
        let mac = network
            .mac
            .map(|mac| mac.parse::<Mac>())
            .transpose()
            .map_err(|why| {
                ApiError::new(
                    StatusCode::UNPROCESSABLE_ENTITY,
                    "invalid-field",
                    "A field cannot be used",
                    why,
                )
                .field(Some(format!("networks[{i}].mac")))
            })?;
        Ok(shoal_host::Network {
            tap: network.tap,
            mac,
            rx_limits: limits(network.rx_limits),
            tx_limits: limits(network.tx_limits),
            queues: network.queues,
        })
    });
    Ok(GuestSpec {
        name: guest.name,
        kernel: guest.kernel.path.into(),
        cmdline: guest.kernel.cmdline,
        initrd: guest.initrd.map(|initrd| initrd.path.into()),
        vcpus: guest.vcpus,
        memory_mib: guest.memory_mib,
        disks: disks.collect(),
        networks: networks.collect::<Result<_, ApiError>>()?,
        vsock: guest.vsock.map(|vsock| shoal_host::Vsock {
            cid: vsock.cid,
            limits: limits(vsock.limits),
        }),
        console_kib: guest.console.keep_kib,
        rng_limits: limits(guest.rng.limits),
    })
}

fn limits(limits: api::Limits) -> RateLimits {
    let rate = |rate: api::Rate| Rate {
        per_second: rate.per_second,
        burst: rate
            .burst
            .unwrap_or_else(|| Rate::per_second(rate.per_second).burst),
    };
    RateLimits {
        bandwidth: limits.bandwidth.map(rate),
        operations: limits.operations.map(rate),
    }
}

fn shown_limits(limits: RateLimits) -> api::Limits {
    let rate = |rate: Rate| api::Rate {
        per_second: rate.per_second,
        burst: Some(rate.burst),
    };
    api::Limits {
        bandwidth: limits.bandwidth.map(rate),
        operations: limits.operations.map(rate),
    }
}

/// Limits that are to be changed.
pub fn limit_changes(set: api::SetLimits) -> LimitChanges {
    let networks = set.networks.into_iter().map(|(tap, network)| {
        let (rx, tx) = (network.rx.map(limits), network.tx.map(limits));
        (tap, NetworkLimits { rx, tx })
    });
    LimitChanges {
        disks: set.disks.into_iter().map(|(id, l)| (id, limits(l))).collect(),
        networks: networks.collect(),
        vsock: set.vsock.map(limits),
        rng: set.rng.map(limits),
    }
}

/// A guest as clients see it.
pub fn guest(view: &GuestView, memory: Option<MemoryFigures>) -> api::Guest {
    let spec = &view.spec;
    let text = |path: &std::path::Path| path.to_string_lossy().into_owned();
    api::Guest {
        id: view.id.clone(),
        name: spec.name.clone(),
        state: state(&view.state),
        stopped: match &view.state {
            State::Stopped { reason } => Some(stopped(reason)),
            _ => None,
        },
        error: match &view.state {
            State::Failed { error } => Some(error.clone()),
            _ => None,
        },
        exit_code: view.exit_code,
        pid: view.pid,
        created_unix_ms: view.created_ms,
        kernel: api::Kernel {
            path: text(&spec.kernel),
            cmdline: spec.cmdline.clone(),
        },
        initrd: spec.initrd.as_ref().map(|path| api::Initrd { path: text(path) }),
        vcpus: spec.vcpus,
        memory: api::Memory {
            configured_mib: spec.memory_mib,
            used: memory.map(used),
        },
        disks: spec
            .disks
            .iter()
            .map(|d| api::Disk {
                id: Some(d.id.clone()),
                path: text(&d.path),
                read_only: d.read_only,
                engine: match d.engine {
                    shoal_host::DiskEngine::Sync => api::DiskEngine::Sync,
                    shoal_host::DiskEngine::IoUring => api::DiskEngine::IoUring,
                },
                limits: shown_limits(d.limits),
                queues: d.queues,
            })
            .collect(),
        networks: spec
            .networks
            .iter()
            .map(|n| api::Network {
                tap: n.tap.clone(),
                mac: n.mac.map(|mac| mac.to_string()),
                rx_limits: shown_limits(n.rx_limits),
                tx_limits: shown_limits(n.tx_limits),
                queues: n.queues,
            })
            .collect(),
        vsock: view.vsock.as_ref().map(|v| api::GuestVsock {
            cid: v.cid,
            socket: text(&v.socket),
            limits: shown_limits(spec.vsock.as_ref().map(|v| v.limits).unwrap_or_default()),
        }),
        console: api::Console {
            keep_kib: spec.console_kib,
        },
        rng: api::Rng {
            limits: shown_limits(spec.rng_limits),
        },
        timeline: view
            .timeline
            .iter()
            .map(|(step, ms)| api::TimelineStep {
                step: step.clone(),
                ms: *ms,
            })
            .collect(),
    }
}

fn state(state: &State) -> api::GuestState {
    match state {
        State::Created => api::GuestState::Created,
        State::Starting => api::GuestState::Starting,
        State::Running => api::GuestState::Running,
        State::Stopping => api::GuestState::Stopping,
        State::Stopped { .. } => api::GuestState::Stopped,
        State::Failed { .. } => api::GuestState::Failed,
    }
}

fn stopped(why: &StopReason) -> api::Stopped {
    use api::StopReason as R;
    let (reason, detail, signal) = match why {
        StopReason::PowerOff => (R::PowerOff, "the guest powered off".into(), None),
        StopReason::Reset => (R::Reset, "the guest asked for a reset".into(), None),
        StopReason::TripleFault => (
            R::TripleFault,
            "the guest's kernel crashed (triple fault)".into(),
            None,
        ),
        StopReason::KvmError { detail } => (R::KvmError, detail.clone(), None),
        StopReason::Killed => (R::Killed, "the guest was ended by force".into(), None),
        StopReason::SeccompKill { syscall } => {
            let call = syscall.as_deref().unwrap_or("whose name the kernel did not tell");
            let detail =
                format!("the guest's VMM made the forbidden system call {call} and was ended for it");
            (R::SeccompKill, detail, None)
        }
        StopReason::VmmBug { place } => (
            R::VmmBug,
            format!("a bug of the guest's VMM, at {place}, ended it; please report it"),
            None,
        ),
        StopReason::VmmSignal { signal } => (
            R::VmmSignal,
            format!("signal {signal} ended the guest's VMM"),
            Some(*signal),
        ),
        StopReason::VmmExit { code } => (
            R::VmmExit,
            format!("the guest's VMM exited with code {code} and did not say why"),
            None,
        ),
        StopReason::Lost => (
            R::Lost,
            "the guest ended while no daemon watched, and left no record".into(),
            None,
        ),
    };
    api::Stopped {
        reason,
        detail,
        signal,
        syscall: match why {
            StopReason::SeccompKill { syscall } => syscall.clone(),
            _ => None,
        },
    }
}

fn used(figures: MemoryFigures) -> api::MemoryUsed {
    api::MemoryUsed {
        resident_kib: figures.rss_kib,
        proportional_kib: figures.pss_kib,
        guest_kib: figures.guest_kib,
        overhead_kib: figures.overhead_kib,
    }
}
