//! Reads a guest's serial console from its ring file, once or as it comes.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use shoal_devices::legacy::console_ring::{ConsoleRingReader, RingError};
use tokio::sync::watch;

use crate::error::HostError;
use crate::view::GuestView;
use crate::watch::Watch;

/// Most bytes of one chunk of the stream.
const CHUNK: usize = 64 << 10;

/// A piece of console output.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConsoleChunk {
    /// Bytes that were asked for but are not kept any more; they come before `bytes`.
    pub lost: u64,
    /// The output.
    pub bytes: Vec<u8>,
    /// Offset of what follows (bytes since the guest's first output).
    pub next: u64,
}

/// Reads a console from some offset on.
#[derive(Debug)]
pub struct ConsoleReader {
    path: PathBuf,
    ring: Option<Ring>,
    offset: u64,
    changes: Watch,
    view: watch::Receiver<Arc<GuestView>>,
}

struct Ring(ConsoleRingReader);

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Ring")
    }
}

impl ConsoleReader {
    pub(crate) fn open(
        path: &Path,
        offset: u64,
        view: watch::Receiver<Arc<GuestView>>,
    ) -> Result<Self, HostError> {
        let dir = path.parent().unwrap_or(path);
        let changes = Watch::new(dir).map_err(HostError::io("watching", dir))?;
        Ok(Self {
            path: path.to_owned(),
            ring: None,
            offset,
            changes,
            view,
        })
    }

    /// The next output; waits for it. `None` when the guest has ended and all was read.
    ///
    /// # Errors
    /// When the ring file cannot be read, or was damaged by its VMM.
    pub async fn next(&mut self) -> Result<Option<ConsoleChunk>, HostError> {
        loop {
            // Asked before the ring is read: what an ended guest wrote is there.
            let live = self.view.borrow_and_update().state.is_live();
            let chunk = self.read()?;
            if chunk.lost > 0 || !chunk.bytes.is_empty() {
                return Ok(Some(chunk));
            }
            if !live {
                return Ok(None);
            }
            tokio::select! {
                changed = self.changes.changed() => changed.map_err(HostError::io("watching", &self.path))?,
                state = self.view.changed() => if state.is_err() { return Ok(None) },
            }
        }
    }

    /// All that is there now.
    pub(crate) fn read_all(&mut self) -> Result<ConsoleChunk, HostError> {
        let mut all = self.read()?;
        let mut next = self.read()?;
        // A ring holds less than what the limits allow; a writer that is faster than this loop is not followed.
        let most = (crate::spec::Limits::CONSOLE_KIB.end() << 10) as usize;
        while !next.bytes.is_empty() && next.lost == 0 && all.bytes.len() < most {
            all.bytes.append(&mut next.bytes);
            all.next = next.next;
            next = self.read()?;
        }
        Ok(all)
    }

    fn read(&mut self) -> Result<ConsoleChunk, HostError> {
        let nothing = ConsoleChunk {
            lost: 0,
            bytes: Vec::new(),
            next: self.offset,
        };
        let failed = |path: &Path, error: RingError| {
            HostError::io("reading the console from", path)(std::io::Error::other(error))
        };
        if self.ring.is_none() {
            // The VMM writes the header when it starts; before that there is no file, or an empty one.
            let Ok(file) = File::open(&self.path) else {
                return Ok(nothing);
            };
            if file.metadata().is_ok_and(|m| m.len() == 0) {
                return Ok(nothing);
            }
            self.ring = Some(Ring(
                ConsoleRingReader::open(file).map_err(|e| failed(&self.path, e))?,
            ));
        }
        let Some(Ring(ring)) = &self.ring else {
            return Ok(nothing);
        };
        let piece = ring
            .read_from(self.offset, CHUNK)
            .map_err(|e| failed(&self.path, e))?;
        // Asked for what is yet to come: then it waits for that.
        if piece.bytes.is_empty() && piece.lost == 0 && piece.next < self.offset {
            return Ok(nothing);
        }
        self.offset = piece.next;
        Ok(ConsoleChunk {
            lost: piece.lost,
            bytes: piece.bytes,
            next: piece.next,
        })
    }
}
