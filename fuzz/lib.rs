//! What the fuzz targets share: devices over back ends that need no rights, and rings made of the fuzzer's bytes.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};

use shoal_devices::spec::{AnyDeviceSpec, BuildEnv, FdSlot};
use shoal_devices::testing::{Bench, DATA, FakeQueue, SEAM, sockets};
use shoal_devices::virtio::VirtioDevice;
use shoal_devices::virtio::block::BlockSpec;
use shoal_devices::virtio::net::NetSpec;
use shoal_devices::virtio::rng::RngSpec;
use shoal_devices::virtio::vsock::VsockSpec;

fn build(spec: AnyDeviceSpec, fds: Vec<OwnedFd>) -> Box<dyn VirtioDevice> {
    spec.build(&mut BuildEnv::new(fds), None)
        .expect("the device can be built")
}

/// A disk of 64 KiB that is written to for real.
pub fn block() -> Box<dyn VirtioDevice> {
    let file: File = tempfile::tempfile().expect("a temporary file");
    file.set_len(64 << 10).expect("a size");
    let spec = BlockSpec {
        id: "fuzz".into(),
        fd: FdSlot(0),
        ..BlockSpec::default()
    };
    build(AnyDeviceSpec::Block(spec), vec![file.into()])
}

/// An entropy device.
pub fn rng() -> Box<dyn VirtioDevice> {
    build(AnyDeviceSpec::Rng(RngSpec::default()), Vec::new())
}

/// A network device, and the other end of its wire.
pub fn net() -> (Box<dyn VirtioDevice>, UnixStream) {
    let listener = sockets::listener(libc::SOCK_SEQPACKET);
    let far = sockets::connect(&listener, libc::SOCK_SEQPACKET);
    let near = UnixListener::from(listener).accept().expect("a connection").0;
    let spec = NetSpec {
        fds: vec![FdSlot(0)],
        mac: [2; 6],
        ..NetSpec::default()
    };
    (spec.over_socket(near.into()).expect("a device"), far)
}

/// A socket device with its two listeners.
pub fn vsock() -> (Box<dyn VirtioDevice>, [OwnedFd; 2]) {
    let listeners = [libc::SOCK_STREAM, libc::SOCK_SEQPACKET].map(sockets::listener);
    let fds = listeners
        .iter()
        .map(|l| l.try_clone().expect("a descriptor"))
        .collect();
    let spec = VsockSpec {
        cid: 3,
        listener: FdSlot(0),
        broker: FdSlot(1),
        ..VsockSpec::default()
    };
    (build(AnyDeviceSpec::Vsock(spec), fds), listeners)
}

/// Takes values from the fuzzer's bytes; zero when there are no more.
pub struct Bytes<'a>(pub &'a [u8]);

impl<'a> Bytes<'a> {
    /// One byte.
    pub fn u8(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    /// Two bytes.
    pub fn u16(&mut self) -> u16 {
        u16::from(self.u8()) | u16::from(self.u8()) << 8
    }

    /// Four bytes.
    pub fn u32(&mut self) -> u32 {
        u32::from(self.u16()) | u32::from(self.u16()) << 16
    }

    /// Eight bytes.
    pub fn u64(&mut self) -> u64 {
        u64::from(self.u32()) | u64::from(self.u32()) << 32
    }

    /// Up to `n` bytes.
    pub fn take(&mut self, n: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(n.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// There are no more.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// An address: mostly one that is fit for a buffer.
fn address(b: &mut Bytes<'_>) -> u64 {
    match b.u8() {
        0 => b.u64(),
        1 => SEAM - u64::from(b.u8()),
        n => DATA + u64::from(n) * 64,
    }
}

/// Writes descriptors and data as the bytes say, and publishes some heads.
pub fn fill_ring(q: &mut FakeQueue, b: &mut Bytes<'_>) {
    for n in 0..u16::from(b.u8() % 16) {
        let addr = address(b);
        let len = if b.u8() == 0 { b.u32() } else { u32::from(b.u16()) };
        let (flags, next) = (b.u8(), b.u8());
        q.write_desc(q.desc, n, addr, len, u16::from(flags & 7), u16::from(next % 20));
    }
    let len = usize::from(b.u8()) * 2;
    let data = b.take(len);
    shoal_devices::testing::write(&q.memory, DATA + 128, data);
    for _ in 0..b.u8() % 16 {
        let head = u16::from(b.u8());
        q.publish(head);
    }
}

/// Fills and notifies rings of a device, over and over, until the bytes are used up.
pub fn drive_rings(bench: &mut Bench, bytes: &[u8]) {
    let mut b = Bytes(bytes);
    for _ in 0..8 {
        if b.is_empty() {
            break;
        }
        let at = usize::from(b.u8()) % bench.queues.len();
        fill_ring(&mut bench.queues[at], &mut b);
        bench.kick(at);
        if bench.needs_reset() {
            bench.deactivate();
            bench.activate();
        }
    }
    bench.turn();
}
