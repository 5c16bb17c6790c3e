//! The devices that a Shoal guest sees, and the loop that serves them. Nothing in this crate knows KVM: an interrupt is
//! a [`virtio::Interrupt`], a notification is an eventfd, and memory is [`GuestMemory`].
//!
//! What lives here: the virtio core and its MMIO transport, the virtio devices with their back ends, the legacy
//! devices, and the event loop. What does not: boot, KVM, the control socket (all in `shoal-vmm`).

#![deny(missing_docs)]

pub mod event;
pub mod legacy;
pub mod limit;
pub mod log_limit;
pub mod spec;
pub mod sys;
#[cfg(any(test, fuzzing))]
pub mod testing;
pub mod uring;
pub mod virtio;

use std::sync::Arc;

/// The guest's physical memory. Cheap to clone. Reached only through vm-memory's volatile access, never as a slice,
/// since the guest may write to it at any time.
pub type GuestMemory = Arc<vm_memory::GuestMemoryMmap<()>>;

#[cfg(test)]
mod hostile_tests;
