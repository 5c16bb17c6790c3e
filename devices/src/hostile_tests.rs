//! Every device meets the same hostile guest. A new device gets a line in `devices!`.

use std::os::fd::OwnedFd;

use crate::spec::{AnyDeviceSpec, BuildEnv, FdSlot};
use crate::testing::{Bench, MmioBench, hostile, sockets};
use crate::virtio::VirtioDevice;
use crate::virtio::block::BlockSpec;
use crate::virtio::mmio::MmioTransport;
use crate::virtio::rng::RngSpec;
use crate::virtio::vsock::VsockSpec;

fn build(
    spec: &AnyDeviceSpec,
    fds: Vec<OwnedFd>,
    saved: Option<&crate::spec::Section>,
) -> Box<dyn VirtioDevice> {
    spec.build(&mut BuildEnv::new(fds), saved)
        .expect("the device can be built")
}

fn rng() -> (AnyDeviceSpec, Vec<OwnedFd>) {
    (AnyDeviceSpec::Rng(RngSpec {}), Vec::new())
}

fn block() -> (AnyDeviceSpec, Vec<OwnedFd>) {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let spec = BlockSpec {
        id: "hostile".into(),
        fd: FdSlot(0),
        read_only: false,
    };
    (AnyDeviceSpec::Block(spec), vec![file.into()])
}

fn vsock() -> (AnyDeviceSpec, Vec<OwnedFd>) {
    let spec = VsockSpec {
        cid: 3,
        listener: FdSlot(0),
        broker: FdSlot(1),
    };
    let fds = [libc::SOCK_STREAM, libc::SOCK_SEQPACKET].map(sockets::listener);
    (AnyDeviceSpec::Vsock(spec), fds.into())
}

fn fresh(make: fn() -> (AnyDeviceSpec, Vec<OwnedFd>)) -> Box<dyn VirtioDevice> {
    let (spec, fds) = make();
    let device = build(&spec, fds, None);
    assert_eq!(device.kind(), spec.kind());
    device
}

macro_rules! devices {
    ($($name:ident),+ $(,)?) => {$(
        mod $name {
            use super::*;

            #[test]
            fn survives_rubbish_in_its_rings() {
                for seed in 1..=40 {
                    hostile::rings(fresh(super::$name), seed * 7919, 12);
                }
            }

            #[test]
            fn survives_rubbish_in_its_registers() {
                for seed in 1..=10 {
                    hostile::registers(fresh(super::$name), seed * 104_729, 1500);
                }
            }

            #[test]
            fn can_be_stopped_and_started_over_and_over() {
                let mut bench = Bench::new(fresh(super::$name));
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
                let (spec, fds) = super::$name();
                let again = fds.iter().map(|f| f.try_clone().unwrap()).collect();
                let mut b = MmioBench::new(build(&spec, fds, None));
                b.drive();
                let state = b.transport.save().unwrap();
                let device = build(&spec, again, Some(&state.device));
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

devices!(rng, block, vsock);
