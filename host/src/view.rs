//! What the host tells about a guest.

use std::path::PathBuf;
use std::sync::Arc;

use crate::paths::GuestDir;
use crate::spec::{FIRST_CID, GuestSpec};
use crate::state::State;
use crate::store::Record;

/// A guest at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct GuestView {
    /// The id that the host gave it: 12 hexadecimal digits.
    pub id: String,
    /// What it is made of.
    pub spec: Arc<GuestSpec>,
    /// How it is.
    pub state: State,
    /// When it was created (ms since 1970).
    pub created_ms: u64,
    /// The process of its VMM, while there is one.
    pub pid: Option<u32>,
    /// The exit code of its workload, when the guest told it.
    pub exit_code: Option<i32>,
    /// Its socket device.
    pub vsock: Option<VsockView>,
    /// The steps of its last start, in ms since the request was received.
    pub timeline: Vec<(String, f64)>,
}

/// A guest's socket device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockView {
    /// The guest's context id.
    pub cid: u32,
    /// The Unix socket that leads to the guest.
    pub socket: PathBuf,
}

impl GuestView {
    pub(crate) fn new(r: &Record, dir: &GuestDir) -> Self {
        Self {
            id: r.id.clone(),
            spec: Arc::new(r.spec.clone()),
            state: r.state.clone(),
            created_ms: r.created_ms,
            pid: r.process.as_ref().map(|p| p.pid),
            exit_code: r.exit_code,
            vsock: r.spec.vsock.as_ref().map(|v| VsockView {
                cid: v.cid.unwrap_or(FIRST_CID),
                socket: dir.vsock(),
            }),
            timeline: r.stamps.relative_ms(),
        }
    }
}
