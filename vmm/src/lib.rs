//! Shoal's virtual machine monitor, and what its host needs to talk to it.
//!
//! The host uses [`protocol`], [`channel`], [`kernel`] and [`config`]; the rest runs inside of `shoal-vmm`:
//! [`control`] serves the host and owns the event loop, [`machine`] builds and runs the guest, [`vcpu`] and [`bus`]
//! serve its exits, [`arch`] knows the processor; [`harden`] takes from the process and its threads what they do not
//! need, and [`gate`] sees to it that this happens before the guest's first instruction.

#![deny(missing_docs)]

pub mod arch;
pub mod bus;
pub mod channel;
pub mod config;
pub mod console;
pub mod control;
pub mod gate;
pub mod harden;
pub mod kernel;
pub mod machine;
pub mod memory;
pub mod protocol;
pub mod shared;
pub mod sys;
pub mod vcpu;

pub use arch::x86_64::layout;
