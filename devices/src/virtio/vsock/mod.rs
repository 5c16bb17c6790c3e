//! Socket device (virtio 1.2 §5.10): stream connections between the guest and Unix sockets of the host, both ways.
//!
//! - **Host to guest**, as Firecracker has it: a program connects to the device's Unix socket, sends `CONNECT <port>\n`
//!   and gets `OK <its port>\n` when the guest has accepted.
//! - **Guest to host**: the device asks the host for a socket; see [`broker`].
//!
//! ```text
//! guest ── rx, tx queues ──▶ handler ──▶ table of connections ──▶ Unix stream sockets
//!                                │
//!                                └──▶ hub: listener, broker, deadlines
//! ```

pub mod broker;
mod connection;
mod handler;
mod hub;
mod packet;
mod table;

use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

use super::core::RING_FEATURES;
use super::{ActivateError, Activation, DeviceKind, QueueHandler, Stopped, VirtioDevice, config_bytes};
use crate::limit::{DeviceLimits, Limiter, Limits, Path};
use crate::spec::{BuildEnv, BuildError, DeviceSpec, FdSlot, SaveError, Section, Versioned};
use crate::sys::socket_option;
use handler::VsockHandler;
use hub::Hub;

const NAME: &str = "socket device";
const QUEUE_SIZES: [u16; 3] = [256, 256, 8];
/// CIDs 0 to 2 and the one of all ones (32 bits) have meanings of their own (virtio 1.2 §5.10.4.1).
const GUEST_CIDS: std::ops::Range<u64> = 3..u32::MAX as u64;

/// A socket device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockSpec {
    /// The guest's context identifier: from 3 to 2³² - 2.
    pub cid: u64,
    /// A listening Unix stream socket, for programs of the host.
    pub listener: FdSlot,
    /// A listening Unix seqpacket socket, for the host itself; see [`broker`].
    pub broker: FdSlot,
    /// How many packets it carries, and how much data, both ways together.
    pub limits: Limits,
}

/// The device's saved state. Connections end with the machine that had them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// The guest's CID at the time; the guest is told to look again, so that another one is possible.
    pub cid: u64,
}

impl Versioned for VsockState {
    const NAME: &'static str = "virtio-vsock";
    const VERSION: u32 = 1;
}

impl DeviceSpec for VsockSpec {
    type State = VsockState;

    fn build(
        &self,
        env: &mut BuildEnv,
        saved: Option<VsockState>,
    ) -> Result<Box<dyn VirtioDevice>, BuildError> {
        if !GUEST_CIDS.contains(&self.cid) {
            return Err(BuildError::Invalid {
                device: NAME,
                what: format!(
                    "cid {} is reserved; use one from {} to {}",
                    self.cid,
                    GUEST_CIDS.start,
                    GUEST_CIDS.end - 1
                ),
            });
        }
        let listener = listening(
            env.take(self.listener)?,
            libc::SOCK_STREAM,
            "a listening stream socket",
        )?;
        let broker = listening(
            env.take(self.broker)?,
            libc::SOCK_SEQPACKET,
            "a listening seqpacket socket",
        )?;
        let cell = env.limit(NAME, DeviceLimits::All(self.limits))?;
        let limiter = Limiter::new(cell, Path::First);
        let hub = Hub::new(self.cid, listener, broker, saved.is_some(), limiter).map_err(|source| {
            BuildError::Backend {
                device: NAME,
                what: "preparing its sockets and timer",
                source,
            }
        })?;
        Ok(Box::new(Vsock {
            cid: self.cid,
            hub: Some(hub),
        }))
    }
}

fn listening(socket: OwnedFd, kind: i32, wanted: &'static str) -> Result<OwnedFd, BuildError> {
    let option = |name| {
        socket_option(&socket, name).map_err(|source| BuildError::Backend {
            device: NAME,
            what: wanted,
            source,
        })
    };
    if option(libc::SO_ACCEPTCONN)? != 1 || option(libc::SO_TYPE)? != kind {
        return Err(BuildError::Invalid {
            device: NAME,
            what: format!("expected {wanted}"),
        });
    }
    Ok(socket)
}

struct Vsock {
    cid: u64,
    /// With the handler while the device is active.
    hub: Option<Hub>,
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Vsock
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config_bytes(&self.cid.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, a: Activation) -> Result<Box<dyn QueueHandler>, ActivateError> {
        let got = a.queues.len();
        let (memory, interrupt) = (a.memory, a.interrupt);
        let Ok([rx, tx, event]) = <[_; 3]>::try_from(a.queues) else {
            return Err(ActivateError::MissingQueue { needed: 3, got });
        };
        let hub = self.hub.take().ok_or(ActivateError::BackendGone)?;
        Ok(Box::new(VsockHandler::new(
            memory,
            interrupt,
            [rx, tx, event],
            hub,
        )))
    }

    fn deactivate(&mut self, stopped: Stopped) {
        if let Ok(hub) = stopped.backend.downcast::<Hub>() {
            self.hub = Some(*hub);
        }
    }

    fn reset(&mut self) {
        if let Some(hub) = &mut self.hub {
            hub.forget_connections();
        }
    }

    fn save(&self) -> Result<Section, SaveError> {
        Section::encode(&VsockState { cid: self.cid })
    }
}

#[cfg(test)]
mod tests;
