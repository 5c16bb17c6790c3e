//! The VMM's event loop: serves the host's requests and the devices until the guest ends.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use shoal_devices::event::{EventLoop, Readiness, Token};
use shoal_devices::limit::LimitBoard;
use shoal_devices::spec::BuildEnv;
use shoal_seccomp::Mode;

use crate::channel::{ChannelError, VmmChannel};
use crate::machine::{Machine, Running};
use crate::protocol::{
    Event, ExitReason, Failure, MAX_CONSOLE_INPUT, Message, Reply, Request, Stamp, Step, Timeline, VmConfig,
};
use crate::shared::{Shared, log};
use crate::sys::{check, monotonic_ns};

const LISTENER: Token = Token(1);
const CONNECTION: Token = Token(2);
const CONSOLE_TIMER: Token = Token(3);

/// The VMM cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The event loop failed.
    #[error("{what} failed")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The descriptor cannot be used.
    #[error(
        "descriptor {fd} is no control socket: it must be a Unix seqpacket socket, listening or connected"
    )]
    NotASocket {
        /// Which.
        fd: i32,
    },
}

fn io(what: &'static str) -> impl FnOnce(io::Error) -> ControlError {
    move |source| ControlError::Io { what, source }
}

/// The one process of a guest.
pub struct Vmm {
    guest_id: String,
    event_loop: EventLoop,
    listener: Option<OwnedFd>,
    connection: Option<VmmChannel>,
    timeline: Timeline,
    machine: Option<Running>,
    exit_record: Option<File>,
    limits: LimitBoard,
    seccomp: Mode,
    /// The host has asked for the end before there was a machine.
    killed: bool,
}

impl Vmm {
    /// Takes the control socket: a listening one is accepted from, again and again; the end of a connected one ends the
    /// guest. `seccomp` says what becomes of system calls that the threads' filters do not allow.
    ///
    /// # Errors
    /// When the descriptor is no such socket, or the event loop cannot be made.
    pub fn new(guest_id: String, control: OwnedFd, seccomp: Mode) -> Result<Self, ControlError> {
        let fd = control.as_raw_fd();
        let stamp = Stamp {
            step: Step::ProcessStarted,
            at_ns: monotonic_ns(),
        };
        let mut vmm = Self {
            guest_id,
            event_loop: EventLoop::new().map_err(io("making the event loop"))?,
            listener: None,
            connection: None,
            timeline: Timeline { stamps: vec![stamp] },
            machine: None,
            exit_record: None,
            limits: LimitBoard::default(),
            seccomp,
            killed: false,
        };
        let not_a_socket = |_| ControlError::NotASocket { fd };
        if socket_option(fd, libc::SO_TYPE).map_err(not_a_socket)? != libc::SOCK_SEQPACKET {
            return Err(ControlError::NotASocket { fd });
        }
        if socket_option(fd, libc::SO_ACCEPTCONN).map_err(not_a_socket)? != 0 {
            set_nonblocking(fd).map_err(io("preparing the control socket"))?;
            let mut owner = vmm.event_loop.owner();
            owner
                .add(&control, LISTENER, Readiness::IN)
                .map_err(io("watching the control socket"))?;
            vmm.listener = Some(control);
        } else {
            set_nonblocking(fd).map_err(io("preparing the control connection"))?;
            vmm.connect(control)?;
        }
        Ok(vmm)
    }

    /// Serves until the guest has ended; returns why it did.
    ///
    /// # Errors
    /// When the event loop fails.
    pub fn serve(mut self) -> Result<ExitReason, ControlError> {
        let mut ready = Vec::new();
        loop {
            self.event_loop
                .run_once(-1, &mut ready)
                .map_err(io("waiting for events"))?;
            for (token, _) in &ready {
                match *token {
                    LISTENER => self.accept()?,
                    CONNECTION => self.serve_connection(),
                    CONSOLE_TIMER => self.machine.iter().for_each(Running::flush_console),
                    _ => {}
                }
            }
            self.tell_stamps();
            if let Some(reason) = self.ended() {
                self.finish(&reason);
                return Ok(reason);
            }
        }
    }

    fn ended(&self) -> Option<ExitReason> {
        let of_machine = self.machine.as_ref().and_then(|m| m.shared().reason());
        of_machine.or_else(|| self.killed.then_some(ExitReason::Killed))
    }

    /// Stops vCPUs first, so that nothing new comes, then lets the devices drain, then tells.
    fn finish(&mut self, reason: &ExitReason) {
        if let Some(machine) = &mut self.machine {
            let (event_loop, mut ignored) = (&mut self.event_loop, Vec::new());
            machine.stop_vcpus(|| {
                // Requests and connections can wait; a loop that fails here fails for the handlers, too.
                let _ = event_loop.run_once(-1, &mut ignored);
            });
            machine.flush_console();
        }
        // What the devices held goes with the process: to release some of it, as mappings, no filter allows.
        std::mem::forget(self.event_loop.stop_all());
        if let Some(record) = &self.exit_record
            && let Err(e) = record.write_all_at(&reason.to_record(), 0)
        {
            log(&self.guest_id, &format!("writing the exit record failed: {e}"));
        }
        self.send(Message::Event(Event::Exited {
            reason: reason.clone(),
        }));
    }

    fn accept(&mut self) -> Result<(), ControlError> {
        let Some(listener) = &self.listener else {
            return Ok(());
        };
        // SAFETY: null addresses are allowed; the call touches no other memory.
        let fd = unsafe {
            libc::accept4(
                listener.as_raw_fd(),
                std::ptr::null_mut(),
                std::ptr::null_mut(),
                libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
            )
        };
        match check(fd) {
            // SAFETY: the descriptor is new and owned by nobody else.
            // A second connection replaces the first: it comes from a daemon that was started anew.
            Ok(fd) => self.connect(unsafe { OwnedFd::from_raw_fd(fd) }),
            Err(e)
                if matches!(
                    e.raw_os_error(),
                    Some(libc::EAGAIN | libc::ECONNABORTED | libc::EINTR)
                ) =>
            {
                Ok(())
            }
            Err(e) => Err(io("accepting a control connection")(e)),
        }
    }

    /// Serves a connection, which does not block.
    fn connect(&mut self, fd: OwnedFd) -> Result<(), ControlError> {
        self.disconnect();
        let mut owner = self.event_loop.owner();
        owner
            .add(&fd, CONNECTION, Readiness::IN)
            .map_err(io("watching the control connection"))?;
        self.connection = Some(fd.into());
        Ok(())
    }

    fn disconnect(&mut self) {
        // Closing a socket takes it out of the epoll set.
        self.connection = None;
    }

    fn serve_connection(&mut self) {
        let Some(connection) = &self.connection else {
            return;
        };
        match connection.recv() {
            Ok((request, fds)) => {
                let answer = self.serve_request(request, fds);
                self.send(Message::Reply(answer));
            }
            Err(ChannelError::WouldBlock) => {}
            Err(e) => {
                if !matches!(e, ChannelError::Closed) {
                    log(
                        &self.guest_id,
                        &format!("dropping the control connection: {}", chain(&e)),
                    );
                }
                self.disconnect();
                if self.listener.is_none() {
                    self.kill();
                }
            }
        }
    }

    fn serve_request(&mut self, request: Request, fds: Vec<OwnedFd>) -> Result<Reply, Failure> {
        match request {
            Request::Start(config) => self.start(*config, fds),
            Request::Status => Ok(Reply::Status {
                running: self.machine.is_some(),
                timeline: self
                    .machine
                    .as_ref()
                    .map_or_else(|| self.timeline.clone(), |m| m.shared().timeline()),
            }),
            Request::PowerButton => {
                let pressed = self.machine()?.press_power_button();
                pressed
                    .map_err(|e| failure(format!("pressing the power button failed: {e}")))
                    .map(|()| Reply::Done)
            }
            Request::ConsoleInput(bytes) if bytes.len() > MAX_CONSOLE_INPUT => Err(failure(format!(
                "{} bytes of console input, the limit is {MAX_CONSOLE_INPUT}",
                bytes.len()
            ))),
            Request::ConsoleInput(bytes) => match self.machine()?.type_in(&bytes) {
                n if n == bytes.len() => Ok(Reply::Done),
                n => Err(failure(format!(
                    "the guest's serial port took {n} of {} bytes",
                    bytes.len()
                ))),
            },
            Request::Kill => {
                self.kill();
                Ok(Reply::Done)
            }
            Request::SetLimits { device, limits } => {
                self.machine()?;
                self.limits.set(device.into(), limits).map_err(|e| Failure {
                    field: Some(format!("devices[{device}]")),
                    message: chain(&e),
                })?;
                self.event_loop.tell(Token::LIMITS);
                Ok(Reply::Done)
            }
        }
    }

    fn machine(&self) -> Result<&Running, Failure> {
        self.machine
            .as_ref()
            .ok_or_else(|| failure("the guest has not been started".into()))
    }

    fn kill(&mut self) {
        match &self.machine {
            Some(machine) => machine.shared().end(ExitReason::Killed),
            None => self.killed = true,
        }
    }

    fn start(&mut self, config: VmConfig, fds: Vec<OwnedFd>) -> Result<Reply, Failure> {
        if self.machine.is_some() {
            return Err(failure("the guest has been started already".into()));
        }
        self.timeline.push(Stamp {
            step: Step::ConfigReceived,
            at_ns: monotonic_ns(),
        });
        let valid = config.validate()?;
        self.guest_id.clone_from(&valid.config.guest_id);
        let mut env = BuildEnv::new(fds);
        self.limits = env.limits();
        if let Some(slot) = valid.config.exit_record {
            let record: File = env.take(slot).map_err(|e| failure(chain(&e)))?.into();
            crate::harden::record_panics(&record);
            self.exit_record = Some(record);
        }
        let handle = self.event_loop.handle();
        let shared = Arc::new(Shared::new(
            self.guest_id.clone(),
            self.timeline.clone(),
            handle.clone(),
        ));
        let machine = Machine::build(&valid, env, shared.clone(), &handle)
            .and_then(|machine| machine.run(valid.config.event_loop_kind(), self.seccomp))
            .map_err(|e| Failure {
                field: e.field(),
                message: chain(&e),
            })?;
        let watched = self
            .event_loop
            .owner()
            .add(&machine.console_timer(), CONSOLE_TIMER, Readiness::IN);
        self.machine = Some(machine);
        watched.map_err(|e| failure(format!("watching the console's timer failed: {e}")))?;
        Ok(Reply::Started {
            timeline: shared.timeline(),
        })
    }

    fn tell_stamps(&mut self) {
        let Some(machine) = &self.machine else { return };
        if self.connection.is_none() {
            return;
        }
        for stamp in machine.shared().untold() {
            self.send(Message::Event(Event::Stamped(stamp)));
        }
    }

    /// A host that does not take its messages is treated as gone; when it comes back it asks for the status.
    fn send(&mut self, message: Message) {
        let Some(connection) = &self.connection else {
            return;
        };
        if let Err(e) = connection.send(&message, &[]) {
            log(
                &self.guest_id,
                &format!("dropping the control connection: {}", chain(&e)),
            );
            self.disconnect();
            if self.listener.is_none() {
                self.kill();
            }
        }
    }
}

fn failure(message: String) -> Failure {
    Failure { field: None, message }
}

/// An error with all its causes, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(e) = next {
        text.push_str(": ");
        text.push_str(&e.to_string());
        next = e.source();
    }
    text
}

fn socket_option(fd: i32, option: i32) -> io::Result<i32> {
    let (mut value, mut len) = (0_i32, size_of::<i32>() as libc::socklen_t);
    // SAFETY: the kernel writes at most `len` bytes into `value`.
    check(unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, option, (&raw mut value).cast(), &mut len) })?;
    Ok(value)
}

fn set_nonblocking(fd: i32) -> io::Result<()> {
    // SAFETY: fcntl with integer arguments touches no memory of this process.
    let flags = check(unsafe { libc::fcntl(fd, libc::F_GETFL) })?;
    // SAFETY: as above.
    check(unsafe { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) }).map(drop)
}
