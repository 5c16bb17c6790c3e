//! The two ways to do requests: one after the other with blocking system calls ([`Engine::Sync`]), or many at once
//! through io_uring ([`Engine::Uring`]). Either way data goes straight between the file and guest memory.

use std::io;

use serde::{Deserialize, Serialize};
use vm_memory::GuestMemoryMmap;

use super::super::ring::MAX_SEGMENTS;
use super::job::{Disk, Job, Step};
use super::request::{Request, Status};
use super::uring::Uring;
use crate::sys::{IoVecs, fallocate};

/// How a disk's requests are done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EngineKind {
    /// One after the other, with blocking system calls.
    #[default]
    Sync,
    /// As many at once as the guest asks for, with one system call for all that come together. Needs Linux 5.15 with
    /// io_uring allowed.
    IoUring,
}

/// Does requests.
pub enum Engine {
    /// See [`EngineKind::Sync`].
    Sync(IoVecs),
    /// See [`EngineKind::IoUring`].
    Uring(Box<Uring>),
}

impl Engine {
    /// The engine that needs nothing.
    pub fn sync() -> Self {
        // A buffer can lie in more than one memory region; a few such are no reason to allocate.
        Self::Sync(IoVecs::with_capacity(MAX_SEGMENTS + 16))
    }

    /// Begins `request` of the queue at `queue`. Returns its status and the bytes of data that were written to the guest, if
    /// it is done already; else the request has been exchanged for an unused one and is found among the completed ones
    /// later.
    pub fn begin(
        &mut self,
        disk: &Disk,
        memory: &GuestMemoryMmap,
        queue: usize,
        request: &mut Request,
    ) -> Option<(Status, u32)> {
        let mut job = match disk.plan(memory, request) {
            Ok(job) => job,
            Err(status) => return Some((status, 0)),
        };
        match self {
            Self::Sync(vecs) => Some(match finish(&mut job, disk, memory, request, vecs) {
                Ok(()) => (Status::Ok, job.written()),
                Err(status) => (status, 0),
            }),
            Self::Uring(uring) => uring.begin(memory, queue, request, job),
        }
    }
}

/// Does all steps of a job.
fn finish(
    job: &mut Job,
    disk: &Disk,
    memory: &GuestMemoryMmap,
    request: &Request,
    vecs: &mut IoVecs,
) -> Result<(), Status> {
    while let Some(step) = job.step() {
        let result = perform(step, disk, memory, request, vecs);
        job.advance(step, result)?;
    }
    Ok(())
}

fn perform(
    step: Step,
    disk: &Disk,
    memory: &GuestMemoryMmap,
    request: &Request,
    vecs: &mut IoVecs,
) -> io::Result<usize> {
    let file = &disk.file;
    match step {
        Step::Read { part, offset } => vecs.preadv(file, memory, request.writable(), part, offset),
        Step::Write { part, offset } => vecs.pwritev(file, memory, request.readable(), part, offset),
        Step::Sync => file.sync_data().map(|()| 0),
        Step::Allocate { mode, offset, len } => fallocate(file, mode, offset, len).map(|()| 0),
    }
}
