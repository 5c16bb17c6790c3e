//! Every device meets the same hostile guest, and is saved and restored. A new device gets a line in `devices!` and a
//! function that makes one, fresh or from a saved section.

use std::os::fd::OwnedFd;

use crate::spec::{AnyDeviceSpec, BuildEnv, FdSlot, Section};
use crate::testing::{Bench, MmioBench, hostile, sockets};
use crate::virtio::VirtioDevice;
use crate::virtio::block::{BlockSpec, EngineKind};
use crate::virtio::mmio::MmioTransport;
use crate::virtio::net::NetSpec;
use crate::virtio::rng::RngSpec;
use crate::virtio::vsock::VsockSpec;

fn build(spec: AnyDeviceSpec, fds: Vec<OwnedFd>, saved: Option<&Section>) -> Box<dyn VirtioDevice> {
    let device = spec
        .build(&mut BuildEnv::new(fds), saved)
        .expect("the device can be built");
    assert_eq!(device.kind(), spec.kind());
    device
}

fn rng(saved: Option<&Section>) -> Box<dyn VirtioDevice> {
    build(AnyDeviceSpec::Rng(RngSpec::default()), Vec::new(), saved)
}

fn block(saved: Option<&Section>) -> Box<dyn VirtioDevice> {
    disk(EngineKind::Sync, saved)
}

/// Where there is no io_uring, what its tests are about is said to be skipped by the block device's own tests.
fn block_uring(saved: Option<&Section>) -> Box<dyn VirtioDevice> {
    let there = crate::uring::Ring::new(tempfile::tempfile().unwrap(), 1).is_ok();
    disk(
        if there {
            EngineKind::IoUring
        } else {
            EngineKind::Sync
        },
        saved,
    )
}

fn disk(engine: EngineKind, saved: Option<&Section>) -> Box<dyn VirtioDevice> {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let spec = BlockSpec {
        id: "hostile".into(),
        fd: FdSlot(0),
        engine,
        // Rings of either kind of several queues.
        queues: 3,
        ..BlockSpec::default()
    };
    build(AnyDeviceSpec::Block(spec), vec![file.into()], saved)
}

fn vsock(saved: Option<&Section>) -> Box<dyn VirtioDevice> {
    let spec = VsockSpec {
        cid: 3,
        listener: FdSlot(0),
        broker: FdSlot(1),
        ..VsockSpec::default()
    };
    let fds = [libc::SOCK_STREAM, libc::SOCK_SEQPACKET].map(sockets::listener);
    build(AnyDeviceSpec::Vsock(spec), fds.into(), saved)
}

/// A TAP needs rights that a test may not have; what the device does with its rings is the same over a socket.
fn net(saved: Option<&Section>) -> Box<dyn VirtioDevice> {
    network(1, saved)
}

/// The same with several pairs of queues, and a control queue.
fn net_pairs(saved: Option<&Section>) -> Box<dyn VirtioDevice> {
    network(3, saved)
}

fn network(pairs: usize, saved: Option<&Section>) -> Box<dyn VirtioDevice> {
    let near = (0..pairs).map(|_| {
        let listener = sockets::listener(libc::SOCK_SEQPACKET);
        let far = sockets::connect(&listener, libc::SOCK_SEQPACKET);
        // What the guest sends fills the socket; the far end has something to say first.
        (0..20).for_each(|_| _ = std::io::Write::write(&mut &far, &[1; 3000]).unwrap());
        std::mem::forget(far);
        let listener = std::os::unix::net::UnixListener::from(listener);
        listener.accept().unwrap().0.into()
    });
    let spec = NetSpec {
        fds: vec![FdSlot(0)],
        mac: [2; 6],
        ..NetSpec::default()
    };
    let saved = saved.map(|s| s.decode().unwrap());
    spec.over_sockets(near.collect(), &mut BuildEnv::new(Vec::new()), saved)
        .unwrap()
}

macro_rules! devices {
    ($($name:ident),+ $(,)?) => {$(
        mod $name {
            use super::*;

            #[test]
            fn survives_rubbish_in_its_rings() {
                for seed in 1..=40 {
                    hostile::rings(super::$name(None), seed * 7919, 12);
                }
            }

            #[test]
            fn survives_rubbish_in_its_registers() {
                for seed in 1..=10 {
                    hostile::registers(super::$name(None), seed * 104_729, 1500);
                }
            }

            #[test]
            fn can_be_stopped_and_started_over_and_over() {
                let mut bench = Bench::new(super::$name(None));
                for _ in 0..20 {
                    bench.pause_and_resume();
                    bench.deactivate();
                    bench.activate();
                    bench.turn();
                }
                assert!(!bench.needs_reset());
            }

            #[test]
            fn is_restored_as_it_was_saved() {
                let mut b = MmioBench::new(super::$name(None));
                b.drive();
                let state = b.transport.save().unwrap();
                let device = super::$name(Some(&state.device));
                let parts = MmioBench::parts(device, b.memory.clone(), &b.event_loop);
                let mut restored = MmioTransport::restore(parts, &state).unwrap();
                assert_eq!(restored.save().unwrap(), state);
                restored.resume();
                assert_eq!(restored.status(), 0xf);
                assert_eq!(restored.save().unwrap().device, state.device);
            }
        }
    )+};
}

devices!(rng, block, block_uring, net, net_pairs, vsock);
