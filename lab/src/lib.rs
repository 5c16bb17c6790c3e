//! The lab: a software-emulated machine with KVM in it, to run Shoal where the real one cannot run Linux guests.
//!
//! QEMU's software CPU emulates AMD SVM with nested paging; Debian's cloud kernel, booted in it, loads `kvm-amd` and
//! offers a `/dev/kvm` that runs unmodified Linux guests. This crate is both sides of it: [`host`] builds an
//! initramfs, starts QEMU and relays streams; [`guest`] is what the same binary does as process 1 in that machine.
//! [`tally`] adds up the results of libtest harnesses, in the lab or not.

pub mod cpio;
pub mod guest;
pub mod host;
pub mod job;
pub mod modules;
pub mod tally;
