//! Stands in for the VMM in tests of its confinement: says that the guest runs, and then does what a VMM must not do. The
//! guest's command line says what: `socket` makes a system call that no policy allows, `panic` panics in a vCPU's thread,
//! `grow` writes beyond the limit of file sizes.

#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::event::{PollFd, PollFlags, poll};
use shoal_jailer::seccomp::{Mode, ThreadKind, install};
use shoal_vmm::channel::{ChannelError, VmmChannel};
use shoal_vmm::harden;
use shoal_vmm::protocol::{Message, Reply, Request, Timeline};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    harden::process();
    let connection = VmmChannel::from(accept()?);
    let (Request::Start(config), descriptors) = connection.recv()? else {
        return Err("the first request starts a guest".into());
    };
    let timeline = Timeline::default();
    connection.send(&Message::Reply(Ok(Reply::Started { timeline })), &[])?;
    // When the host asks for something else, it has taken the answer and watches this guest.
    match connection.recv() {
        Ok(_) | Err(ChannelError::Closed) => {}
        Err(error) => return Err(error.into()),
    }
    let slot = config.exit_record.ok_or("the host gives a record")?;
    let record = descriptors
        .into_iter()
        .nth(usize::from(slot.0))
        .ok_or("it is among the descriptors")?;
    misbehave(&config.cmdline, File::from(record))
}

fn misbehave(how: &str, record: File) -> Result<()> {
    match how {
        "socket" => {
            install(ThreadKind::EventLoop, Mode::Kill)?;
            drop(std::os::unix::net::UnixDatagram::unbound());
            Err("the filter let it through".into())
        }
        "panic" => {
            harden::record_panics(&record);
            let vcpu = std::thread::spawn(|| {
                install(ThreadKind::Vcpu, Mode::Kill).expect("the filter is installed");
                panic!("this is the guest's own data");
            });
            Err(format!("the thread ended: {:?}", vcpu.join().is_err()).into())
        }
        "grow" => {
            let written = record.write_at(b"x", 1 << 40);
            Err(format!("writing at 1 TiB: {written:?}").into())
        }
        other => Err(format!("{other:?} is nothing to do").into()),
    }
}

/// The host's connection to the socket that was handed over as standard input.
fn accept() -> Result<OwnedFd> {
    let listener = std::io::stdin();
    // The socket does not block.
    poll(
        &mut [PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN)],
        None,
    )?;
    Ok(rustix::net::accept(listener.as_fd())?)
}
