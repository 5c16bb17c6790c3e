//! Block device (virtio 1.2 §5.2) over a file or block device that the host opened.

mod config;
mod engine;
mod handler;
mod job;
mod request;
mod uring;

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;

use serde::{Deserialize, Serialize};

use super::core::RING_FEATURES;
use super::{ActivateError, Activation, DeviceKind, MAX_QUEUES, QueueHandler, Stopped, VirtioDevice};
use crate::limit::{DeviceLimits, Limiter, Limits, Path};
use crate::spec::{BuildEnv, BuildError, DeviceSpec, FdSlot, SaveError, Section, Versioned};
use crate::sys::{open_flags, set_blocking};
use crate::uring::Ring;
use engine::Engine;
pub use engine::EngineKind;
use handler::BlockHandler;
use uring::Uring;

/// The unit of sectors and capacity (bytes, virtio 1.2 §5.2.4), whatever the block size.
pub const SECTOR: u64 = 512;
/// Length of the identity that GET_ID returns (bytes).
pub const ID_LEN: usize = 20;
const QUEUE_SIZE: u16 = 256;
const NAME: &str = "block device";

/// Feature bits (virtio 1.2 §5.2.3).
mod feature {
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockSpec {
    /// What GET_ID returns: at most [`ID_LEN`] bytes of printable ASCII.
    pub id: String,
    /// A regular file or block device, opened for reading, and for writing unless `read_only`. Its size must be a
    /// positive multiple of [`SECTOR`].
    pub fd: FdSlot,
    /// The guest may not write.
    pub read_only: bool,
    /// How requests are done.
    pub engine: EngineKind,
    /// How many requests are done, and how much data they move.
    pub limits: Limits,
    /// Number of request queues, 1 to [`MAX_QUEUES`]: one for each vCPU spares the guest locks.
    pub queues: u8,
}

impl Default for BlockSpec {
    fn default() -> Self {
        Self {
            id: String::new(),
            fd: FdSlot::default(),
            read_only: false,
            engine: EngineKind::default(),
            limits: Limits::default(),
            queues: 1,
        }
    }
}

/// The device's saved state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// Capacity (sectors); the disk that is given at restore must have the same.
    pub sectors: u64,
}

impl Versioned for BlockState {
    const NAME: &'static str = "virtio-block";
    const VERSION: u32 = 1;
}

impl DeviceSpec for BlockSpec {
    type State = BlockState;

    fn build(
        &self,
        env: &mut BuildEnv,
        saved: Option<BlockState>,
    ) -> Result<Box<dyn VirtioDevice>, BuildError> {
        let id = self.identity()?;
        if !(1..=MAX_QUEUES).contains(&self.queues) {
            return Err(invalid(format!("{} queues, not 1 to {MAX_QUEUES}", self.queues)));
        }
        let file = File::from(env.take(self.fd)?);
        let sectors = sectors(&file)?;
        if let Some(BlockState { sectors: was }) = saved
            && was != sectors
        {
            return Err(invalid(format!(
                "disk {:?} has {sectors} sectors, it had {was} when it was saved; give the disk of that time",
                self.id
            )));
        }
        self.check_access(&file)?;
        let engine = self.engine(&file)?;
        let cell = env.limit(NAME, DeviceLimits::All(self.limits))?;
        let limiter = Limiter::new(cell, Path::First);
        Ok(Box::new(Block {
            id,
            sectors,
            read_only: self.read_only,
            queue_sizes: vec![QUEUE_SIZE; usize::from(self.queues)],
            backend: Some(Backend {
                file,
                engine,
                limiter,
            }),
        }))
    }
}

impl BlockSpec {
    fn identity(&self) -> Result<[u8; ID_LEN], BuildError> {
        let bytes = self.id.as_bytes();
        if bytes.len() > ID_LEN || !bytes.iter().all(|b| b.is_ascii_graphic()) {
            return Err(invalid(format!(
                "id {:?} is not {ID_LEN} or fewer printable ASCII characters",
                self.id.chars().take(64).collect::<String>()
            )));
        }
        let mut id = [0; ID_LEN];
        id[..bytes.len()].copy_from_slice(bytes);
        Ok(id)
    }

    fn engine(&self, file: &File) -> Result<Engine, BuildError> {
        match self.engine {
            EngineKind::Sync => Ok(Engine::sync()),
            EngineKind::IoUring => {
                // io_uring would fail what it cannot do at once.
                set_blocking(file).map_err(|source| backend("preparing the disk for io_uring", source))?;
                let ring = Ring::new(file, u32::from(QUEUE_SIZE)).map_err(|e| {
                    invalid(format!(
                        "disk {:?} cannot use the engine io_uring: {e}; remedy that, or set the disk's engine to sync",
                        self.id
                    ))
                })?;
                Ok(Engine::Uring(Box::new(Uring::new(ring))))
            }
        }
    }

    fn check_access(&self, file: &File) -> Result<(), BuildError> {
        let flags = open_flags(file).map_err(|source| backend("reading the disk's open flags", source))?;
        let (readable, writable) = match flags & libc::O_ACCMODE {
            libc::O_RDONLY => (true, false),
            libc::O_RDWR => (true, true),
            _ => (false, true),
        };
        if !readable {
            return Err(invalid(format!("disk {:?} was not opened for reading", self.id)));
        }
        if !self.read_only && !writable {
            return Err(invalid(format!(
                "disk {:?} was opened for reading only; open it for writing or set read_only",
                self.id
            )));
        }
        Ok(())
    }
}

fn sectors(mut file: &File) -> Result<u64, BuildError> {
    let meta = file
        .metadata()
        .map_err(|source| backend("reading the disk's metadata", source))?;
    let kind = meta.file_type();
    let len = if kind.is_file() {
        meta.len()
    } else if kind.is_block_device() {
        file.seek(SeekFrom::End(0))
            .map_err(|source| backend("finding the disk's size", source))?
    } else {
        let what = if kind.is_dir() {
            "a directory"
        } else {
            "something else"
        };
        return Err(invalid(format!(
            "the disk is {what}, not a regular file or block device"
        )));
    };
    if len == 0 || !len.is_multiple_of(SECTOR) {
        return Err(invalid(format!(
            "the disk is {len} bytes long, it has to be a positive multiple of {SECTOR}"
        )));
    }
    Ok(len / SECTOR)
}

fn invalid(what: String) -> BuildError {
    BuildError::Invalid { device: NAME, what }
}

fn backend(what: &'static str, source: std::io::Error) -> BuildError {
    BuildError::Backend {
        device: NAME,
        what,
        source,
    }
}

struct Block {
    id: [u8; ID_LEN],
    sectors: u64,
    read_only: bool,
    queue_sizes: Vec<u16>,
    /// With the handler while the device is active.
    backend: Option<Backend>,
}

/// The disk's file, and what does its requests.
struct Backend {
    file: File,
    engine: Engine,
    limiter: Limiter,
}

impl VirtioDevice for Block {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        let access = if self.read_only {
            feature::RO
        } else {
            feature::DISCARD | feature::WRITE_ZEROES
        };
        let queues = if self.queue_sizes.len() > 1 {
            feature::MQ
        } else {
            0
        };
        RING_FEATURES | feature::SEG_MAX | feature::BLK_SIZE | feature::FLUSH | access | queues
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // At most MAX_QUEUES.
        config::read(self.sectors, self.queue_sizes.len() as u16, offset, data);
    }

    fn activate(&mut self, a: Activation) -> Result<Box<dyn QueueHandler>, ActivateError> {
        if a.queues.is_empty() {
            return Err(ActivateError::MissingQueue { needed: 1, got: 0 });
        }
        let Backend {
            file,
            engine,
            limiter,
        } = self.backend.take().ok_or(ActivateError::BackendGone)?;
        let disk = job::Disk {
            file,
            sectors: self.sectors,
            read_only: self.read_only,
            // A driver without FLUSH takes every completed write for durable (§5.2.6.2).
            write_through: a.features & feature::FLUSH == 0,
            id: self.id,
        };
        Ok(Box::new(BlockHandler::new(a, disk, engine, limiter)))
    }

    fn deactivate(&mut self, stopped: Stopped) {
        if let Ok(backend) = stopped.backend.downcast::<Backend>() {
            self.backend = Some(*backend);
        }
    }

    fn save(&self) -> Result<Section, SaveError> {
        Section::encode(&BlockState {
            sectors: self.sectors,
        })
    }
}

#[cfg(test)]
mod tests;
