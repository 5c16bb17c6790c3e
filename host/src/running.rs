//! A guest that runs: its process, its control connection, and what can happen to them.

use std::collections::VecDeque;
use std::time::Duration;

use shoal_vmm::protocol::{Event, ExitReason, Message, Request};
use tokio::sync::mpsc;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::disk::DiskUse;
use crate::error::HostError;
use crate::limits;
use crate::link::Link;
use crate::log::LogKeeper;
use crate::process::{Ended, Process};
use crate::state::StopReason;
use crate::vsock::{VsockService, Word};

/// Gets the answer to a request.
pub(crate) type Answer<T> = oneshot::Sender<Result<T, HostError>>;

/// What can happen to a running guest.
#[derive(Debug)]
pub(crate) enum Happened {
    /// Its process has ended.
    Ended(Ended),
    /// Its VMM sent an event.
    Event(Event),
    /// It said something.
    Word(Word),
}

/// How far the end has been forced.
#[derive(Clone, Copy, Debug)]
enum Force {
    No,
    /// At this time the VMM is told to end.
    TellAt(Instant),
    /// At this time the VMM gets SIGKILL.
    KillAt(Instant),
    Killed,
}

/// A guest that runs.
#[derive(Debug)]
pub(crate) struct Running {
    process: Process,
    /// Gone when the VMM hung up; only its end can follow.
    link: Option<Link>,
    /// Who waits for the VMM's answers, in the order of the requests.
    pending: VecDeque<Option<Answer<()>>>,
    vsock: Option<VsockService>,
    words: mpsc::Receiver<Word>,
    _disks: Vec<DiskUse>,
    log: Option<LogKeeper>,
    exit: Option<ExitReason>,
    force: Force,
    kill_grace: Duration,
}

impl Running {
    /// Puts the parts of a running guest together.
    pub fn new(
        process: Process,
        link: Link,
        vsock: Option<(VsockService, mpsc::Receiver<Word>)>,
        disks: Vec<DiskUse>,
        log: Option<LogKeeper>,
        kill_grace: Duration,
    ) -> Self {
        let (vsock, words) = match vsock {
            Some((service, words)) => (Some(service), words),
            None => (None, mpsc::channel(1).1),
        };
        Self {
            process,
            link: Some(link),
            pending: VecDeque::new(),
            vsock,
            words,
            _disks: disks,
            log,
            exit: None,
            force: Force::No,
            kill_grace,
        }
    }

    /// What happens next. Nothing is lost when the future is dropped.
    pub async fn next(&mut self) -> Happened {
        loop {
            let Self {
                process,
                link,
                words,
                log,
                force,
                ..
            } = self;
            let deadline = match *force {
                Force::TellAt(at) | Force::KillAt(at) => Some(at),
                Force::No | Force::Killed => None,
            };
            tokio::select! {
                message = receive(link.as_ref()) => match message {
                    Ok(message) => if let Some(event) = self.take(message) {
                        return Happened::Event(event);
                    },
                    Err(()) => self.lose_link(),
                },
                ended = process.ended() => {
                    self.drain();
                    return Happened::Ended(ended);
                }
                Some(word) = words.recv() => return Happened::Word(word),
                () = keep(log.as_ref()) => {}
                () = sleep_until(deadline) => self.force_on(),
            }
        }
    }

    /// Asks the guest to stop: over its line to the host, and by its power button. When it has not ended after
    /// `deadline`, it is ended. Asking again can only shorten the time.
    pub fn stop(&mut self, deadline: Duration) {
        if let Some(vsock) = &self.vsock {
            vsock.stop_guest();
        }
        self.request(Request::PowerButton, None);
        let at = Instant::now() + deadline;
        match self.force {
            Force::No => self.force = Force::TellAt(at),
            Force::TellAt(earlier) => self.force = Force::TellAt(earlier.min(at)),
            Force::KillAt(_) | Force::Killed => {}
        }
    }

    /// Ends it now.
    pub fn kill(&mut self) {
        self.process.kill();
        self.force = Force::Killed;
    }

    /// Types into the serial console.
    pub fn type_in(&mut self, bytes: Vec<u8>, answer: Answer<()>) {
        self.request(Request::ConsoleInput(bytes), Some(answer));
    }

    /// Has a device limited otherwise.
    pub fn set_limits(&mut self, change: limits::Change, answer: Answer<()>) {
        self.request(change.request(), Some(answer));
    }

    /// What it said and nobody has taken yet.
    pub fn last_words(&mut self) -> Vec<Word> {
        std::iter::from_fn(|| self.words.try_recv().ok()).collect()
    }

    /// Why it ended, when `ended` is how its process did and `record` what the VMM wrote down.
    pub fn reason(&self, ended: Ended, record: Option<ExitReason>) -> StopReason {
        match (self.exit.clone().or(record), ended, self.force) {
            (Some(reason), ..) => reason.into(),
            (None, _, Force::Killed) => StopReason::Killed,
            (None, Ended::Filter(call), _) => StopReason::SeccompKill {
                syscall: call.map(str::to_owned),
            },
            (None, Ended::Signal(signal), _) => StopReason::VmmSignal { signal },
            (None, Ended::Code(code), _) => StopReason::VmmExit { code },
            (None, Ended::Unknown, _) => StopReason::Lost,
        }
    }

    fn request(&mut self, request: Request, answer: Option<Answer<()>>) {
        let sent = match &self.link {
            Some(link) => link.send(&request, &[]),
            None => Err(shoal_vmm::channel::ChannelError::Closed),
        };
        match sent {
            Ok(()) => self.pending.push_back(answer),
            Err(error) => {
                tracing::warn!(pid = self.process.id().pid, %error, "the VMM cannot be asked");
                if let Some(answer) = answer {
                    // Whoever asked may have gone away.
                    let _ = answer.send(Err(error.into()));
                }
            }
        }
    }

    fn force_on(&mut self) {
        match self.force {
            Force::TellAt(_) => {
                self.request(Request::Kill, None);
                self.force = Force::KillAt(Instant::now() + self.kill_grace);
            }
            Force::KillAt(_) => self.kill(),
            Force::No | Force::Killed => {}
        }
    }

    fn take(&mut self, message: Message) -> Option<Event> {
        match message {
            Message::Event(Event::Exited { reason }) => {
                self.exit = Some(reason);
                None
            }
            Message::Event(event) => Some(event),
            Message::Reply(reply) => {
                let result = reply.map(drop).map_err(HostError::Refused);
                match (self.pending.pop_front().flatten(), result) {
                    (Some(answer), result) => drop(answer.send(result)),
                    (None, Err(error)) => tracing::debug!(%error, "the VMM refused"),
                    (None, Ok(())) => {}
                }
                None
            }
        }
    }

    /// Takes what the VMM sent before it ended.
    fn drain(&mut self) {
        while let Some(Ok(message)) = self.link.as_ref().map(Link::try_recv) {
            self.take(message);
        }
    }

    fn lose_link(&mut self) {
        self.link = None;
        for answer in self.pending.drain(..).flatten() {
            // Whoever asked may have gone away.
            let _ = answer.send(Err(shoal_vmm::channel::ChannelError::Closed.into()));
        }
    }
}

async fn receive(link: Option<&Link>) -> Result<Message, ()> {
    match link {
        Some(link) => link.recv().await.map_err(|error| {
            if !matches!(error, shoal_vmm::channel::ChannelError::Closed) {
                tracing::warn!(%error, "the control connection to a VMM is lost");
            }
        }),
        None => std::future::pending().await,
    }
}

async fn keep(log: Option<&LogKeeper>) {
    match log {
        Some(log) => log.keep().await,
        None => std::future::pending().await,
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
