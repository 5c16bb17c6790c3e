//! Where the serial port's bytes go, with a stamp on the first of them.

use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;

use shoal_devices::legacy::ConsoleSink;
use shoal_devices::legacy::console_ring::ConsoleRingWriter;
use shoal_devices::spec::{BuildEnv, BuildError};

use crate::protocol::{ConsoleConfig, Step};
use crate::shared::Shared;

/// Makes the sink that a configuration names.
///
/// # Errors
/// When its descriptor is missing, or a ring file cannot be prepared.
pub fn sink(
    config: ConsoleConfig,
    env: &mut BuildEnv,
    shared: Arc<Shared>,
) -> Result<Box<dyn ConsoleSink>, BuildError> {
    let target = match config {
        ConsoleConfig::Null => Target::Null,
        ConsoleConfig::Stream(fd) => Target::Stream(File::from(env.take(fd)?)),
        ConsoleConfig::Ring { fd, capacity } => {
            let ring = ConsoleRingWriter::open(File::from(env.take(fd)?), capacity).map_err(|source| {
                BuildError::Backend {
                    device: "console",
                    what: "preparing its ring file",
                    source: io::Error::other(source),
                }
            })?;
            Target::Ring(ring)
        }
    };
    Ok(Box::new(Sink {
        target,
        first: Some(shared),
    }))
}

enum Target {
    Null,
    Stream(File),
    Ring(ConsoleRingWriter),
}

struct Sink {
    target: Target,
    /// Taken with the first byte.
    first: Option<Arc<Shared>>,
}

impl ConsoleSink for Sink {
    fn write(&mut self, bytes: &[u8]) {
        if let Some(shared) = self.first.take() {
            shared.stamp_and_tell(Step::FirstOutput);
        }
        // Nobody waits for a console's reader: what does not fit is lost, as on a serial line without flow control.
        match &mut self.target {
            Target::Null => {}
            Target::Stream(file) => drop(file.write(bytes)),
            Target::Ring(ring) => ring.write(bytes),
        }
    }
}
