#![forbid(unsafe_code)]
//! Bare-metal guests that measure and test a VMM on `/dev/kvm` itself.
//!
//! They run where Linux cannot (hosts that emulate ring 0), because they need only a few instructions of ring 0. Each is
//! a static ELF image at guest-physical 2 MiB, made by this crate's build script from `guest/`, and is used like a kernel.
//! What the command line of [`PROBE`] can ask for is described in `guest-images/README.md`.

mod layout;
pub use layout::*;

/// Writes `R` to COM1 and resets the machine; entered by PVH (32-bit protected mode).
pub const MINIMAL_PVH: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/minimal-pvh.elf"));
/// The same, entered in long mode.
pub const MINIMAL_64: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/minimal-64.elf"));
/// Writes `R` to COM1 and halts for good; entered by PVH. For the cost of an idle guest.
pub const HALT_PVH: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/halt-pvh.elf"));
/// The same, entered in long mode.
pub const HALT_64: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/halt-64.elf"));
/// Goes to ring 3, prints [`READY`] and obeys its command line. It has a PVH note, and its ELF entry is the 64-bit one.
pub const PROBE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/probe.elf"));
/// The same without the note, for the 64-bit entry of a loader that prefers PVH.
pub const PROBE_64: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/probe-64.elf"));

/// The first line of [`PROBE`], written from ring 3.
pub const READY: &str = "probe: ready";

/// All images with their file names, in the order of the constants above.
pub const FILES: [(&str, &[u8]); 6] = [
    ("minimal-pvh.elf", MINIMAL_PVH),
    ("minimal-64.elf", MINIMAL_64),
    ("halt-pvh.elf", HALT_PVH),
    ("halt-64.elf", HALT_64),
    ("probe-pvh.elf", PROBE),
    ("probe-64.elf", PROBE_64),
];
