//! iperf3 and ping through a TAP in a network namespace of this benchmark's own.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use shoal_devices::spec::AnyDeviceSpec;
use shoal_devices::virtio::net::NetSpec;
use shoal_devices::virtio::net::open::open_tap;

use super::super::net::{NetArgs, TAP, Traffic, in_namespace};
use super::super::results::{IoPart, IoResult};
use super::super::watch::Vmm;
use super::super::{Contender, qemu, result, shoal, sys};
use super::guest::Tool;
use super::iperf3::{self, Iperf3, Stream};
use super::ping::{self, Ping};
use super::{Files, MEMORY_MIB, check, image, in_lab, lab, part, value_name};
use crate::driver::on_path;
use crate::libraries::libraries;
use crate::peers::usable;

/// How it is measured with --here, and with --lab.
pub const HERE: &str = "Linux guest with iperf3 on /dev/kvm; in turns";
pub const LAB: &str = "Linux guest with iperf3 in the lab, time counted in instructions";

/// The host's address (RFC 5737: for examples, so that nobody has it), and the words that give the guest its own.
pub const HOST: &str = "192.0.2.1";
pub const ADDRESSES: &str = "shoal.ip=192.0.2.2/24";

const VHOST: &str = "/dev/vhost-net";

/// Runs the patterns one after the other.
pub fn measure(args: &NetArgs) -> Result<IoResult> {
    let in_lab = args.guest.in_lab();
    check(&args.io, in_lab)?;
    let files = Files::find(&args.guest, iperf3::PROGRAM, iperf3::PATH)?;
    match in_lab {
        true => lab(lab_words(args), &args.io, &files, &server()?),
        false => in_namespace(|| here(args, &files)),
    }
}

/// What the program in the lab is asked for.
fn lab_words(args: &NetArgs) -> Vec<OsString> {
    let mut words: Vec<OsString> = vec!["net".into(), "--iperf3".into()];
    for traffic in chosen(args) {
        words.extend(["--pattern".into(), value_name(traffic)]);
    }
    words
}

fn chosen(args: &NetArgs) -> &[Traffic] {
    match &args.patterns[..] {
        [] => &[Traffic::ToHost, Traffic::ToGuest, Traffic::Ping],
        patterns => patterns,
    }
}

/// The host's program and its libraries, which the lab has to have.
fn server() -> Result<Vec<PathBuf>> {
    let program = find_server()?;
    let mut all = libraries(&program)?;
    all.push(program);
    Ok(all)
}

fn find_server() -> Result<PathBuf> {
    on_path(iperf3::PROGRAM).with_context(|| image::missing(iperf3::PROGRAM).unwrap_or_default())
}

fn here(args: &NetArgs, files: &Files) -> Result<IoResult> {
    sys::set_address(TAP, HOST.parse()?).with_context(|| format!("giving {TAP} the address {HOST}"))?;
    let starter = shoal::Starter::with(files.guest()?)?;
    let qemus = usable(&args.io.peers, |arg| {
        qemu::Starter::linux(arg, &files.kernel, MEMORY_MIB)
    });
    let server = find_server()?;
    let streams = chosen(args).iter().flat_map(|traffic| match traffic {
        Traffic::ToHost => &[Some(Stream::TcpToHost), Some(Stream::UdpToHost)][..],
        Traffic::ToGuest => &[Some(Stream::TcpToGuest)],
        Traffic::Ping => &[None],
    });
    let parts = streams.map(|&stream| -> Result<Option<IoPart>> {
        let mut all = vec![ours(&starter, files)];
        all.extend(qemus.iter().map(|q| theirs(q, files, false)));
        if Path::new(VHOST).exists() {
            all.extend(qemus.iter().map(|q| theirs(q, files, true)));
        }
        let tool: Box<dyn Tool> = match stream {
            Some(stream) => Box::new(Iperf3 {
                stream,
                server: server.clone(),
            }),
            None => Box::new(Ping),
        };
        let (name, bytes, ops) = describe(stream);
        part(&args.io, name, bytes, args.io.ops.unwrap_or(ops), &*tool, all)
    });
    result("net", parts)
}

/// What people call it, bytes of each operation, and how many take a second, or what the lab does in some.
fn describe(stream: Option<Stream>) -> (&'static str, u64, u64) {
    let (name, bytes, here, lab) = match stream {
        Some(Stream::TcpToHost) => ("TCP to the host, 128 KiB at a time", iperf3::BLOCK, 20_000, 500),
        Some(Stream::TcpToGuest) => ("TCP to the guest, 128 KiB at a time", iperf3::BLOCK, 20_000, 500),
        Some(Stream::UdpToHost) => (
            "UDP to the host, packets of 64 bytes",
            iperf3::PACKET,
            300_000,
            3000,
        ),
        None => (
            "packets of 64 bytes there and back, one at a time",
            ping::PACKET,
            2000,
            200,
        ),
    };
    (name, bytes, if in_lab() { lab } else { here })
}

fn ours<'a>(starter: &'a shoal::Starter, files: &'a Files) -> Contender<'a> {
    Contender::new("shoal", "", move |words| {
        let net = NetSpec {
            fds: vec![shoal::slot(1)],
            mac: [2, 0, 0, 0, 0, 1],
            ..NetSpec::default()
        };
        let mut fds = vec![files.open_root()?.into()];
        fds.extend(open_tap(TAP, 1)?);
        let vmm = starter.start(words, vec![super::root(), AnyDeviceSpec::Net(net)], &fds)?;
        Ok(Box::new(vmm) as Box<dyn Vmm>)
    })
}

/// As in `net`: a TAP that exists, without scripts.
fn theirs<'a>(qemu: &'a qemu::Starter, files: &'a Files, vhost: bool) -> Contender<'a> {
    let (name, vhost) = match vhost {
        true => ("qemu microvm, vhost", "on"),
        false => ("qemu microvm", "off"),
    };
    Contender::new(name, qemu.version(), move |words| {
        let mut arguments = files.qemu_root();
        arguments.extend([
            "-netdev".into(),
            format!("tap,id=net0,ifname={TAP},script=no,downscript=no,vhost={vhost}").into(),
            "-device".into(),
            "virtio-net-device,netdev=net0,bus=virtio-mmio-bus.1".into(),
        ]);
        Ok(Box::new(qemu.start(words, &arguments)?) as Box<dyn Vmm>)
    })
}
