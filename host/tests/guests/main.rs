//! Linux guests under the whole of Shoal: kernels, disks, networks, sockets, the ways to end, memory. They run where
//! Linux guests can, which is the lab on most machines (`shoal-lab test build/tests/guests`); elsewhere each test says
//! that it was skipped. The hostile guest is a bare-metal one and runs wherever `/dev/kvm` opens.
//!
//! Programs and images are taken from `SHOAL_BIN_DIR` and `SHOAL_IMAGES`, else from the build directory that this program
//! lies in, else from the workspace's; `scripts/test-images.sh` and `scripts/build-tests.sh` fill it.

#![forbid(unsafe_code)]

mod block;
mod boot;
mod engines;
mod fleet;
mod hostile;
mod memory;
mod net;
mod pattern;
mod rng;
mod stock;
mod stop;
mod vsock;
