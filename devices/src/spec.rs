//! How a device is described, built and saved. A device's own file holds its spec and its state; this file names them
//! all in [`AnyDeviceSpec`].

use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::limit::{self, DeviceLimits, LimitBoard, LimitCell};
use crate::virtio::block::BlockSpec;
use crate::virtio::net::NetSpec;
use crate::virtio::rng::RngSpec;
use crate::virtio::vsock::VsockSpec;
use crate::virtio::{DeviceKind, VirtioDevice};

/// Saved state with a name and a version of its own, so that a reader can refuse what it does not know before it
/// looks at any of it.
pub trait Versioned: Serialize + DeserializeOwned {
    /// The section's name.
    const NAME: &'static str;
    /// The version of this state's layout.
    const VERSION: u32;
}

/// One saved state: its name and version stand outside of the bytes they describe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Section {
    /// [`Versioned::NAME`].
    pub name: String,
    /// [`Versioned::VERSION`].
    pub version: u32,
    /// The state, encoded with postcard.
    pub bytes: Vec<u8>,
}

/// The largest section that is read (bytes).
pub const MAX_SECTION: usize = 1 << 20;

/// A state could not be saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The state could not be encoded.
    #[error("encoding the state of {name} failed")]
    Encode {
        /// The section.
        name: &'static str,
        /// Why.
        #[source]
        source: postcard::Error,
    },
}

/// A saved state was refused.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The section is another one than was expected.
    #[error("expected saved state of {expected}, found {found:?}")]
    Name {
        /// What was expected.
        expected: &'static str,
        /// What was found.
        found: String,
    },
    /// The section was written by a version that this one cannot read.
    #[error("saved state of {name} has version {found}, this program reads version {known}")]
    Version {
        /// The section.
        name: &'static str,
        /// The version found.
        found: u32,
        /// The version known.
        known: u32,
    },
    /// The section is larger than any valid one.
    #[error("saved state of {name} is {len} bytes long, the limit is {MAX_SECTION}")]
    TooLong {
        /// The section.
        name: &'static str,
        /// Its length in bytes.
        len: usize,
    },
    /// The bytes are no valid state.
    #[error("saved state of {name} is damaged")]
    Decode {
        /// The section.
        name: &'static str,
        /// Why.
        #[source]
        source: postcard::Error,
    },
}

impl Section {
    /// Encodes a state.
    pub fn encode<T: Versioned>(state: &T) -> Result<Self, SaveError> {
        let bytes = postcard::to_stdvec(state).map_err(|source| SaveError::Encode {
            name: T::NAME,
            source,
        })?;
        Ok(Self {
            name: T::NAME.to_owned(),
            version: T::VERSION,
            bytes,
        })
    }

    /// Decodes a state, after its name, version and length have been checked.
    pub fn decode<T: Versioned>(&self) -> Result<T, LoadError> {
        if self.name != T::NAME {
            return Err(LoadError::Name {
                expected: T::NAME,
                found: self.name.chars().take(64).collect(),
            });
        }
        if self.version != T::VERSION {
            return Err(LoadError::Version {
                name: T::NAME,
                found: self.version,
                known: T::VERSION,
            });
        }
        if self.bytes.len() > MAX_SECTION {
            return Err(LoadError::TooLong {
                name: T::NAME,
                len: self.bytes.len(),
            });
        }
        postcard::from_bytes(&self.bytes).map_err(|source| LoadError::Decode {
            name: T::NAME,
            source,
        })
    }
}

/// Position of a descriptor in the list that was handed over with the configuration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FdSlot(pub u16);

/// What a device is built from besides its spec: the descriptors that the host opened.
pub struct BuildEnv {
    fds: Vec<Option<OwnedFd>>,
    limits: LimitBoard,
}

impl BuildEnv {
    /// Takes the descriptors in the order in which they were handed over.
    pub fn new(fds: Vec<OwnedFd>) -> Self {
        Self {
            fds: fds.into_iter().map(Some).collect(),
            limits: LimitBoard::default(),
        }
    }

    /// Where the limits of the devices that are built from this can be changed.
    pub fn limits(&self) -> LimitBoard {
        self.limits.clone()
    }

    /// Puts a device's limits into force, and where they can be changed. Every device does it, once.
    pub(crate) fn limit(
        &mut self,
        device: &'static str,
        limits: DeviceLimits,
    ) -> Result<Arc<LimitCell>, BuildError> {
        limit::check(&limits).map_err(|e| BuildError::Invalid {
            device,
            what: e.to_string(),
        })?;
        let cell = LimitCell::new(limits).map_err(|source| BuildError::Backend {
            device,
            what: "making a timer for its limits",
            source,
        })?;
        let cell = Arc::new(cell);
        self.limits.add(cell.clone());
        Ok(cell)
    }

    /// Takes one descriptor; each can be taken once.
    pub fn take(&mut self, slot: FdSlot) -> Result<OwnedFd, BuildError> {
        self.fds
            .get_mut(usize::from(slot.0))
            .and_then(Option::take)
            .ok_or(BuildError::MissingFd(slot.0))
    }
}

/// A device (or another part of a machine) could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The configuration names a descriptor that was not handed over, or one twice.
    #[error("descriptor {0} of the configuration was not handed over or is used twice")]
    MissingFd(u16),
    /// The back end refused.
    #[error("{device}: {what}")]
    Backend {
        /// Which device.
        device: &'static str,
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// The spec asks for something that the device does not do.
    #[error("{device}: {what}")]
    Invalid {
        /// Which device.
        device: &'static str,
        /// What is wrong, and what would be right.
        what: String,
    },
    /// The saved state was refused.
    #[error(transparent)]
    Load(#[from] LoadError),
}

/// A device's configuration, and the way to build the device from it.
pub trait DeviceSpec {
    /// The device's saved state.
    type State: Versioned;
    /// Builds the device, fresh or from a saved state.
    fn build(
        &self,
        env: &mut BuildEnv,
        saved: Option<Self::State>,
    ) -> Result<Box<dyn VirtioDevice>, BuildError>;
}

/// Any device: the one place that names them all.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AnyDeviceSpec {
    /// A disk.
    Block(BlockSpec),
    /// A network interface.
    Net(NetSpec),
    /// An entropy source.
    Rng(RngSpec),
    /// Sockets between guest and host.
    Vsock(VsockSpec),
}

impl AnyDeviceSpec {
    /// Which device it describes.
    pub fn kind(&self) -> DeviceKind {
        match self {
            Self::Block(_) => DeviceKind::Block,
            Self::Net(_) => DeviceKind::Net,
            Self::Rng(_) => DeviceKind::Rng,
            Self::Vsock(_) => DeviceKind::Vsock,
        }
    }

    /// Builds the device, fresh or from a saved section.
    pub fn build(
        &self,
        env: &mut BuildEnv,
        saved: Option<&Section>,
    ) -> Result<Box<dyn VirtioDevice>, BuildError> {
        match self {
            Self::Block(spec) => build(spec, env, saved),
            Self::Net(spec) => build(spec, env, saved),
            Self::Rng(spec) => build(spec, env, saved),
            Self::Vsock(spec) => build(spec, env, saved),
        }
    }
}

fn build<S: DeviceSpec>(
    spec: &S,
    env: &mut BuildEnv,
    saved: Option<&Section>,
) -> Result<Box<dyn VirtioDevice>, BuildError> {
    let state = saved.map(Section::decode).transpose()?;
    spec.build(env, state)
}
