//! One task per guest: it alone changes the guest. Calls come through its inbox and are served in order; what it knows
//! is published for everyone to read without asking.

use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use shoal_vmm::protocol::{Event, ExitReason, Failure, Message, Reply, Request};
use tokio::sync::{mpsc, oneshot, watch};

use crate::config::HostConfig;
use crate::disk::{DiskUse, DiskUsers};
use crate::error::{HostError, chain};
use crate::images::Images;
use crate::launcher::{self, Launch, Launcher};
use crate::limits::{self, LimitChanges};
use crate::link::Link;
use crate::log::{LogKeeper, tail};
use crate::paths::GuestDir;
use crate::process::{Ended, Process};
use crate::resources::{self, Prepared};
use crate::running::{Answer, Happened, Running};
use crate::state::{Change, StopReason};
use crate::store::{Record, Store};
use crate::timeline::Stamps;
use crate::view::GuestView;
use crate::vsock::Word;

/// How long a VMM may take to answer what it does at once. One that does not is broken, or in hostile hands.
const ANSWER_PATIENCE: Duration = Duration::from_secs(2);

/// What all guests share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub config: HostConfig,
    pub launcher: Launcher,
    pub store: Store,
    pub images: Images,
    pub disks: DiskUsers,
}

/// A call on a guest.
#[derive(Debug)]
pub(crate) enum Call {
    Start {
        received_ns: u64,
        answer: Answer<GuestView>,
    },
    Stop {
        deadline: Duration,
        answer: Answer<GuestView>,
    },
    Delete {
        force: bool,
        answer: Answer<()>,
    },
    Limit {
        changes: LimitChanges,
        answer: Answer<GuestView>,
    },
    TypeIn {
        bytes: Vec<u8>,
        answer: Answer<()>,
    },
    /// The daemon ends: let go of the guest without touching it.
    LetGo {
        done: oneshot::Sender<()>,
    },
}

/// How others reach a guest.
#[derive(Clone, Debug)]
pub(crate) struct Handle {
    pub calls: mpsc::Sender<Call>,
    pub view: watch::Receiver<Arc<GuestView>>,
}

/// The one owner of a guest.
pub(crate) struct Actor {
    shared: Arc<Shared>,
    dir: GuestDir,
    record: Record,
    running: Option<Running>,
    view: watch::Sender<Arc<GuestView>>,
    /// Who waits until the guest has ended.
    stops: Vec<Answer<GuestView>>,
    /// Who waits until the guest has ended and is forgotten.
    delete: Option<Answer<()>>,
    over: bool,
}

impl Actor {
    /// Starts the task of a guest.
    pub fn spawn(shared: Arc<Shared>, dir: GuestDir, record: Record, running: Option<Running>) -> Handle {
        let (calls, inbox) = mpsc::channel(64);
        let (view, receiver) = watch::channel(Arc::new(GuestView::new(&record, &dir)));
        let actor = Self {
            shared,
            dir,
            record,
            running,
            view,
            stops: Vec::new(),
            delete: None,
            over: false,
        };
        tokio::spawn(actor.serve(inbox));
        Handle {
            calls,
            view: receiver,
        }
    }

    async fn serve(mut self, mut inbox: mpsc::Receiver<Call>) {
        while !self.over {
            tokio::select! {
                call = inbox.recv() => match call {
                    Some(call) => self.call(call).await,
                    None => return,
                },
                happened = next(&mut self.running) => self.happened(happened).await,
            }
        }
    }

    async fn call(&mut self, call: Call) {
        // Whoever asked may have gone away: an answer that nobody takes is dropped.
        match call {
            Call::Start { received_ns, answer } => {
                let result = self.start(received_ns).await;
                let _ = answer.send(result.map(|()| self.snapshot()));
            }
            Call::Stop { deadline, answer } => self.stop(deadline, answer).await,
            Call::Delete { force, answer } => self.delete(force, answer).await,
            Call::Limit { changes, answer } => {
                let result = self.limit(&changes).await;
                let _ = answer.send(result.map(|()| self.snapshot()));
            }
            Call::TypeIn { bytes, answer } => match &mut self.running {
                Some(running) => running.type_in(bytes, answer),
                None => drop(answer.send(Err(self.wrong_state("type into")))),
            },
            Call::LetGo { done } => {
                self.running = None;
                self.over = true;
                let _ = done.send(());
            }
        }
    }

    fn wrong_state(&self, action: &'static str) -> HostError {
        HostError::WrongState {
            id: self.record.id.clone(),
            action,
            state: self.record.state.name(),
        }
    }

    /// The one place that changes the state: in memory, in the store, then for everyone to see.
    async fn change(&mut self, action: &'static str, change: Change) -> Result<(), HostError> {
        let state = self
            .record
            .state
            .after(change)
            .ok_or_else(|| self.wrong_state(action))?;
        tracing::info!(guest = %self.record.id, from = self.record.state.name(), to = state.name(), "state");
        self.record.state = state;
        let stored = self.shared.store.put(&self.record).await;
        self.publish();
        Ok(stored?)
    }

    fn snapshot(&self) -> GuestView {
        GuestView::new(&self.record, &self.dir)
    }

    fn publish(&self) {
        self.view.send_replace(Arc::new(self.snapshot()));
    }

    async fn start(&mut self, received_ns: u64) -> Result<(), HostError> {
        if self.record.state.after(Change::Start).is_none() {
            return Err(self.wrong_state("start"));
        }
        self.record.stamps = Stamps::begin("request-received", received_ns);
        self.record.stamps.now("admitted");
        self.record.exit_code = None;
        if let Err(error) = self.change("start", Change::Start).await {
            return self.undo(None, error).await;
        }
        let mut process = None;
        match self.launch(&mut process).await {
            Ok((link, vsock, disks)) => {
                if let Some(process) = process {
                    self.record.process = Some(process.id().clone());
                    self.record.jail = Some(process.jail().clone());
                    let log = LogKeeper::of(&self.dir);
                    let grace = self.shared.config.kill_grace;
                    self.running = Some(Running::new(process, link, vsock, disks, log, grace));
                }
                self.change("start", Change::Started).await.inspect_err(|_| {
                    // Nobody would know of it after a restart of the daemon.
                    if let Some(running) = &mut self.running {
                        running.kill();
                    }
                })
            }
            Err(error) => self.undo(process, error).await,
        }
    }

    /// Takes back what a failed start has done, and remembers why.
    async fn undo(&mut self, process: Option<Process>, error: HostError) -> Result<(), HostError> {
        if let Some(mut process) = process {
            process.kill();
            process.ended().await;
        }
        self.dir.remove_sockets();
        if let Err(e) = self.change("start", Change::StartFailed(chain(&error))).await {
            tracing::error!(guest = %self.record.id, error = %chain(&e), "a failed start could not be recorded");
        }
        Err(error)
    }

    async fn launch(
        &mut self,
        process: &mut Option<Process>,
    ) -> Result<(Link, resources::VsockParts, Vec<DiskUse>), HostError> {
        let (shared, dir) = (self.shared.clone(), self.dir.clone());
        let (id, spec) = (self.record.id.clone(), self.record.spec.clone());
        let opened = tokio::task::spawn_blocking(move || resources::prepare(&id, &spec, &dir, &shared));
        let Prepared {
            config,
            handed,
            control,
            log,
            vsock,
            disks,
        } = opened.await.map_err(|_| HostError::Closing)??;
        self.record.stamps.now("resources-opened");

        let shared = self.shared.clone();
        let launch = Launch {
            guest_id: self.record.id.clone(),
            control,
            log,
            memory_bytes: self.record.spec.memory_mib << 20,
            vcpus: self.record.spec.vcpus,
            largest_file: launcher::largest_file(&handed),
        };
        let spawned = tokio::task::spawn_blocking(move || shared.launcher.spawn(launch)).await;
        let spawned = spawned
            .map_err(|_| HostError::Closing)?
            .map_err(HostError::Jail)?;
        self.record.stamps.add("process-begun", spawned.begun_ns);
        self.record.stamps.add("jailed", spawned.jailed_ns);
        let watched = Process::of_child(spawned.pid, spawned.pidfd, spawned.lease);
        let vmm = self.shared.config.vmm.clone();
        let process = process.insert(watched.map_err(HostError::io("watching", &vmm))?);
        self.record.stamps.now("process-spawned");

        let control = self.dir.control();
        let link = crate::link::connect_to(&control).and_then(Link::new);
        let link = link.map_err(HostError::io("connecting to", &control))?;
        let fds: Vec<_> = handed.iter().map(std::os::fd::AsFd::as_fd).collect();
        link.send(&Request::Start(Box::new(config)), &fds)?;
        self.record.stamps.now("start-sent");
        self.await_start(&link, process).await?;
        Ok((link, vsock, disks))
    }

    async fn await_start(&mut self, link: &Link, process: &mut Process) -> Result<(), HostError> {
        let spec = &self.record.spec;
        let stamps = &mut self.record.stamps;
        let answer = async {
            loop {
                match link.recv().await? {
                    Message::Reply(Ok(Reply::Started { timeline })) => {
                        timeline.stamps.iter().for_each(|s| stamps.vmm(s.step, s.at_ns));
                        stamps.now("start-answered");
                        return Ok(());
                    }
                    Message::Reply(Ok(_)) => {}
                    Message::Reply(Err(failure)) => {
                        return Err(HostError::Refused(resources::of_the_guest(failure, spec)));
                    }
                    Message::Event(Event::Stamped(s)) => stamps.vmm(s.step, s.at_ns),
                    Message::Event(Event::Exited { .. }) => {}
                }
            }
        };
        let timeout = self.shared.config.start_timeout;
        let log = self.dir.log();
        let failed = |how: String| HostError::StartFailed { how, log: tail(&log) };
        match tokio::time::timeout(timeout, answer).await {
            Ok(Err(HostError::Link(_))) => {
                // It has hung up, so it is about to end, or gets no time to think about it.
                let ended = tokio::time::timeout(self.shared.config.kill_grace, process.ended()).await;
                Err(failed(match ended {
                    Ok(Ended::Signal(signal)) => format!("was ended by signal {signal}"),
                    Ok(Ended::Code(code)) => format!("exited with code {code}"),
                    Ok(Ended::Filter(call)) => format!(
                        "was ended by its seccomp filter for the system call {}",
                        call.unwrap_or("(name not known)")
                    ),
                    Ok(Ended::Unknown) | Err(_) => "hung up".into(),
                }))
            }
            Ok(result) => result,
            Err(_) => Err(failed(format!("did not answer within {timeout:?}"))),
        }
    }

    async fn stop(&mut self, deadline: Duration, answer: Answer<GuestView>) {
        let asked = match self.running {
            Some(_) => self.change("stop", Change::StopAsked).await,
            None => Err(self.wrong_state("stop")),
        };
        match (asked, &mut self.running) {
            (Ok(()), Some(running)) => {
                running.stop(deadline);
                self.stops.push(answer);
            }
            (Ok(()), None) => drop(answer.send(Err(self.wrong_state("stop")))),
            (Err(error), _) => drop(answer.send(Err(error))),
        }
    }

    /// Changes limits: of the running guest first, then in its description. When the VMM fails at one device, those before
    /// it stay changed, in both.
    async fn limit(&mut self, changes: &LimitChanges) -> Result<(), HostError> {
        let mut result = Ok(());
        for change in changes.of(&self.record.spec)? {
            result = self.limit_running(change).await;
            if result.is_err() {
                break;
            }
            change.apply(&mut self.record.spec);
        }
        if self.over {
            // Deleted meanwhile, which must not bring its record back.
            return Err(HostError::NotFound(self.record.id.clone()));
        }
        let stored = self.shared.store.put(&self.record).await;
        self.publish();
        result.and(Ok(stored?))
    }

    /// Asks the VMM, if there is one; what happens meanwhile happens.
    async fn limit_running(&mut self, change: limits::Change) -> Result<(), HostError> {
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        let (answer, mut answered) = oneshot::channel();
        running.set_limits(change, answer);
        let failed = |failure| HostError::NotDone {
            action: "change the limits",
            failure,
        };
        let too_late = tokio::time::sleep(ANSWER_PATIENCE);
        tokio::pin!(too_late);
        loop {
            tokio::select! {
                answer = &mut answered => return match answer {
                    Ok(Err(HostError::Refused(failure))) => {
                        Err(failed(resources::of_the_guest(failure, &self.record.spec)))
                    }
                    Ok(result) => result,
                    // It has ended meanwhile; its next start has the new limits.
                    Err(_) => Ok(()),
                },
                happened = next(&mut self.running) => self.happened(happened).await,
                () = &mut too_late => return Err(failed(Failure {
                    field: None,
                    message: format!("it did not answer within {ANSWER_PATIENCE:?}"),
                })),
            }
        }
    }

    async fn delete(&mut self, force: bool, answer: Answer<()>) {
        match &mut self.running {
            Some(running) if force && self.delete.is_none() => {
                running.kill();
                self.delete = Some(answer);
            }
            Some(_) => drop(answer.send(Err(self.wrong_state("delete")))),
            None => self.forget(answer).await,
        }
    }

    async fn forget(&mut self, answer: Answer<()>) {
        // The record goes first: a directory without a record is removed at the next start of the daemon, a record
        // without a directory would be a guest that cannot start.
        let result = async {
            self.shared.store.delete(&self.record.id).await?;
            self.dir
                .remove()
                .map_err(HostError::io("removing", self.dir.path()))
        };
        let result = result.await;
        self.over = result.is_ok();
        let _ = answer.send(result);
    }

    async fn happened(&mut self, happened: Happened) {
        match happened {
            Happened::Ended(ended) => self.ended(ended).await,
            Happened::Event(Event::Stamped(stamp)) => {
                self.record.stamps.vmm(stamp.step, stamp.at_ns);
                self.publish();
            }
            Happened::Event(Event::Exited { .. }) => {}
            Happened::Word(Word::Ready) => {
                self.record.stamps.now("guest-ready");
                self.publish();
            }
            Happened::Word(Word::Exit(code)) => {
                self.record.exit_code = Some(code);
                self.publish();
            }
        }
    }

    async fn ended(&mut self, ended: Ended) {
        let record = exit_record(&self.dir.exit_record());
        let reason = match self.running.take() {
            Some(mut running) => {
                for word in running.last_words() {
                    if let Word::Exit(code) = word {
                        self.record.exit_code = Some(code);
                    }
                }
                running.reason(ended, record)
            }
            None => StopReason::Lost,
        };
        self.dir.remove_sockets();
        self.record.process = None;
        self.record.jail = None;
        if let Err(error) = self.change("end", Change::Ended(reason)).await {
            tracing::error!(guest = %self.record.id, error = %chain(&error), "an end could not be recorded");
        }
        for answer in std::mem::take(&mut self.stops) {
            let _ = answer.send(Ok(self.snapshot()));
        }
        if let Some(answer) = self.delete.take() {
            self.forget(answer).await;
        }
    }
}

async fn next(running: &mut Option<Running>) -> Happened {
    match running {
        Some(running) => running.next().await,
        None => std::future::pending().await,
    }
}

/// What a VMM wrote down about its guest's end.
pub(crate) fn exit_record(path: &Path) -> Option<ExitReason> {
    const MOST: u64 = 4096;
    let mut bytes = Vec::new();
    // A VMM that was taken over may have made it as long as a disk.
    let file = std::fs::File::open(path).ok()?;
    file.take(MOST).read_to_end(&mut bytes).ok()?;
    ExitReason::from_record(&bytes)
}
