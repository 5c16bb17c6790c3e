//! The fleet.

use std::collections::{HashMap, HashSet};
use std::fs::{DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use tokio::sync::oneshot;

use crate::actor::{Actor, Call, Handle, Shared};
use crate::config::HostConfig;
use crate::console::{ConsoleChunk, ConsoleReader};
use crate::disk::DiskUsers;
use crate::error::{HostError, OpenError};
use crate::images::Images;
use crate::launcher::Launcher;
use crate::limits::LimitChanges;
use crate::lock::lock_within;
use crate::memory::{self, MemoryFigures};
use crate::paths::{SOCKET_PATH, StateDir};
use crate::running::Answer;
use crate::spec::{GuestSpec, Mac};
use crate::state::State;
use crate::store::{Record, Store};
use crate::timeline::Stamps;
use crate::view::GuestView;
use crate::{adopt, spec};

/// All guests of one state directory. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Host {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    shared: Arc<Shared>,
    state: StateDir,
    fleet: RwLock<Fleet>,
    /// Held as long as this host is open.
    _lock: File,
}

#[derive(Debug, Default)]
struct Fleet {
    guests: HashMap<String, Handle>,
    /// Names and whose they are. A name is taken before its guest is recorded.
    names: HashMap<String, String>,
    closing: bool,
}

impl Host {
    /// Opens a state directory: makes it when it is missing, takes over the guests that live, settles the records of
    /// those that ended meanwhile, and removes what belongs to no guest.
    ///
    /// # Errors
    /// When another daemon serves the directory, when the VMM program, the directory or the store cannot be used, or when
    /// VMMs cannot be jailed.
    pub async fn open(config: HostConfig) -> Result<Self, OpenError> {
        let state = prepare_state_dir(&config.state_dir)?;
        let lock = take_lock(&state, &config.state_dir).await?;
        let launcher = Launcher::new(&config.vmm, &state.guests(), &config.confinement)?;
        launcher.warn();
        let (store, records) = Store::open(&state.database())?;
        let images = Images::new(config.image_cache_bytes);
        let shared = Arc::new(Shared {
            config,
            launcher,
            store,
            images,
            disks: DiskUsers::default(),
        });

        let known: HashSet<_> = records.iter().map(|r| r.id.clone()).collect();
        adopt::remove_orphans(&shared, &state, &known).await?;
        let mut fleet = Fleet::default();
        let mut adoptions = tokio::task::JoinSet::new();
        for record in records {
            if let Some(name) = &record.spec.name {
                fleet.names.insert(name.clone(), record.id.clone());
            }
            let (shared, dir) = (shared.clone(), state.guest(&record.id));
            adoptions.spawn(async move { (record.id.clone(), adopt::guest(shared, dir, record).await) });
        }
        while let Some(adopted) = adoptions.join_next().await {
            if let Ok((id, handle)) = adopted {
                fleet.guests.insert(id, handle);
            }
        }
        Ok(Self {
            inner: Arc::new(Inner {
                shared,
                state,
                fleet: RwLock::new(fleet),
                _lock: lock,
            }),
        })
    }

    fn read<R>(&self, f: impl FnOnce(&Fleet) -> R) -> R {
        // The maps are whole between any two statements of the closures.
        f(&self.inner.fleet.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn write<R>(&self, f: impl FnOnce(&mut Fleet) -> R) -> R {
        f(&mut self.inner.fleet.write().unwrap_or_else(PoisonError::into_inner))
    }

    fn handle(&self, guest: &str) -> Result<Handle, HostError> {
        self.read(|fleet| {
            let id = fleet.names.get(guest).map_or(guest, String::as_str);
            fleet
                .guests
                .get(id)
                .cloned()
                .ok_or_else(|| HostError::NotFound(guest.to_owned()))
        })
    }

    async fn call<T>(&self, guest: &str, call: impl FnOnce(Answer<T>) -> Call) -> Result<T, HostError> {
        let handle = self.handle(guest)?;
        let (answer, wait) = oneshot::channel();
        let gone = || match self.read(|f| f.closing) {
            true => HostError::Closing,
            false => HostError::NotFound(guest.to_owned()),
        };
        handle.calls.send(call(answer)).await.map_err(|_| gone())?;
        wait.await.map_err(|_| gone())?
    }

    /// Describes a new guest. It is recorded, not started.
    ///
    /// # Errors
    /// [`HostError::Invalid`] and [`HostError::NameTaken`] about the description; errors of the store.
    pub async fn create(&self, mut spec: GuestSpec) -> Result<GuestView, HostError> {
        spec.validate()?;
        // In a task of its own: a caller that goes away must not leave half a guest.
        let host = self.clone();
        let task = tokio::spawn(async move {
            let random = *uuid::Uuid::new_v4().as_bytes();
            let id: String = random[..6].iter().map(|b| format!("{b:02x}")).collect();
            fill_in(&mut spec, &random);
            host.take_name(spec.name.as_deref(), &id)?;
            host.record(&id, spec.clone()).await.inspect_err(|_| {
                if let Some(name) = &spec.name {
                    host.write(|fleet| fleet.names.remove(name));
                }
            })
        });
        task.await.map_err(|_| HostError::Closing)?
    }

    fn take_name(&self, name: Option<&str>, id: &str) -> Result<(), HostError> {
        self.write(|fleet| {
            if fleet.closing {
                return Err(HostError::Closing);
            }
            let Some(name) = name else { return Ok(()) };
            match fleet.names.get(name) {
                Some(id) => Err(HostError::NameTaken {
                    name: name.to_owned(),
                    id: id.clone(),
                }),
                None => {
                    fleet.names.insert(name.to_owned(), id.to_owned());
                    Ok(())
                }
            }
        })
    }

    async fn record(&self, id: &str, spec: GuestSpec) -> Result<GuestView, HostError> {
        let dir = self.inner.state.guest(id);
        dir.create().map_err(HostError::io("making", dir.path()))?;
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        let record = Record {
            id: id.to_owned(),
            spec,
            state: State::Created,
            created_ms: now.as_millis() as u64,
            process: None,
            jail: None,
            stamps: Stamps::default(),
            exit_code: None,
        };
        if let Err(error) = self.inner.shared.store.put(&record).await {
            // Nothing was made in it yet.
            let _ = dir.remove();
            return Err(error.into());
        }
        let view = GuestView::new(&record, &dir);
        let handle = Actor::spawn(self.inner.shared.clone(), dir, record, None);
        self.write(|fleet| fleet.guests.insert(id.to_owned(), handle));
        Ok(view)
    }

    /// Starts a guest; returns when its first instruction is about to run. `received_ns` is when this was asked for
    /// ([`crate::now_ns`]), the zero of the guest's timeline. A guest that has ended can be started again.
    ///
    /// # Errors
    /// Whatever is wrong with what the guest needs; the guest is then `failed`, and nothing of the start is left.
    pub async fn start(&self, guest: &str, received_ns: u64) -> Result<GuestView, HostError> {
        self.call(guest, |answer| Call::Start { received_ns, answer })
            .await
    }

    /// Asks a guest to stop, and ends it when it has not done so within `deadline`. Returns when it has ended.
    ///
    /// # Errors
    /// [`HostError::WrongState`] when it does not run.
    pub async fn stop(&self, guest: &str, deadline: Duration) -> Result<GuestView, HostError> {
        self.call(guest, |answer| Call::Stop { deadline, answer }).await
    }

    /// Forgets a guest and removes its files (not its disks). With `force`, a guest that runs is ended first.
    ///
    /// # Errors
    /// [`HostError::WrongState`] when it runs and `force` is false.
    pub async fn delete(&self, guest: &str, force: bool) -> Result<(), HostError> {
        let handle = self.handle(guest)?;
        let (id, name) = {
            let view = handle.view.borrow();
            (view.id.clone(), view.spec.name.clone())
        };
        let host = self.clone();
        // In a task of its own: the maps must follow even when the caller goes away.
        let task = tokio::spawn(async move {
            host.call(&id, |answer| Call::Delete { force, answer }).await?;
            host.write(|fleet| {
                fleet.guests.remove(&id);
                if let Some(name) = name {
                    fleet.names.remove(&name);
                }
            });
            Ok(())
        });
        task.await.map_err(|_| HostError::Closing)?
    }

    /// All guests, the oldest first.
    pub fn list(&self) -> Vec<Arc<GuestView>> {
        let mut views: Vec<_> =
            self.read(|fleet| fleet.guests.values().map(|h| h.view.borrow().clone()).collect());
        views.sort_by(|a, b| (a.created_ms, &a.id).cmp(&(b.created_ms, &b.id)));
        views
    }

    /// One guest, by id or name.
    ///
    /// # Errors
    /// [`HostError::NotFound`].
    pub fn show(&self, guest: &str) -> Result<Arc<GuestView>, HostError> {
        Ok(self.handle(guest)?.view.borrow().clone())
    }

    /// What a guest costs in memory; `None` when it does not run.
    ///
    /// # Errors
    /// [`HostError::NotFound`].
    pub async fn memory(&self, guest: &str) -> Result<Option<MemoryFigures>, HostError> {
        let Some(pid) = self.show(guest)?.pid else {
            return Ok(None);
        };
        let read = tokio::task::spawn_blocking(move || memory::figures(pid).ok());
        Ok(read.await.ok().flatten())
    }

    /// The serial console's output from `offset` on (bytes since the start), as far as it is kept.
    ///
    /// # Errors
    /// [`HostError::NotFound`], or when the ring file cannot be read.
    pub async fn console(&self, guest: &str, offset: u64) -> Result<ConsoleChunk, HostError> {
        let mut reader = self.console_stream(guest, offset)?;
        let read = tokio::task::spawn_blocking(move || reader.read_all());
        read.await.map_err(|_| HostError::Closing)?
    }

    /// The serial console's output from `offset` on, as it comes, until the guest ends.
    ///
    /// # Errors
    /// [`HostError::NotFound`], or when the ring file cannot be opened or watched.
    pub fn console_stream(&self, guest: &str, offset: u64) -> Result<ConsoleReader, HostError> {
        let handle = self.handle(guest)?;
        let id = handle.view.borrow().id.clone();
        ConsoleReader::open(&self.inner.state.guest(&id).console(), offset, handle.view)
    }

    /// Types into a guest's serial console.
    ///
    /// # Errors
    /// [`HostError::WrongState`] when it does not run, [`HostError::Refused`] when the guest does not take it.
    pub async fn console_input(&self, guest: &str, bytes: Vec<u8>) -> Result<(), HostError> {
        self.call(guest, |answer| Call::TypeIn { bytes, answer }).await
    }

    /// Changes limits of a guest's devices, at once if it runs, and for its next starts.
    ///
    /// # Errors
    /// [`HostError::Invalid`] when it has no such device or a number is out of range: nothing is changed then.
    /// [`HostError::NotDone`] when its VMM fails.
    pub async fn set_limits(&self, guest: &str, changes: LimitChanges) -> Result<GuestView, HostError> {
        self.call(guest, |answer| Call::Limit { changes, answer }).await
    }

    /// Closes the host. Guests go on running for the next daemon, unless `stop` gives them a deadline to stop.
    pub async fn close(self, stop: Option<Duration>) {
        let handles: Vec<Handle> = self.write(|fleet| {
            fleet.closing = true;
            fleet.guests.values().cloned().collect()
        });
        let mut tasks = tokio::task::JoinSet::new();
        for handle in handles {
            tasks.spawn(async move {
                // A task that has ended has nothing to be told.
                if let Some(deadline) = stop {
                    let (answer, stopped) = oneshot::channel();
                    let _ = handle.calls.send(Call::Stop { deadline, answer }).await;
                    let _ = stopped.await;
                }
                let (done, let_go) = oneshot::channel();
                let _ = handle.calls.send(Call::LetGo { done }).await;
                let _ = let_go.await;
            });
        }
        while tasks.join_next().await.is_some() {}
    }
}

/// Chooses what the owner left open, so that it stays the same over restarts.
fn fill_in(spec: &mut GuestSpec, random: &[u8; 16]) {
    for (i, network) in spec.networks.iter_mut().enumerate() {
        // 02: locally administered, unicast.
        let mac = Mac([2, random[7], random[9], random[10], random[11], i as u8]);
        network.mac.get_or_insert(mac);
    }
    if let Some(vsock) = &mut spec.vsock {
        vsock.cid.get_or_insert(spec::FIRST_CID);
    }
}

fn prepare_state_dir(path: &Path) -> Result<StateDir, OpenError> {
    let mut builder = DirBuilder::new();
    builder.recursive(true).mode(0o700);
    builder.create(path).map_err(OpenError::io("making", path))?;
    let path = path.canonicalize().map_err(OpenError::io("resolving", path))?;
    let state = StateDir::new(path.clone());
    let needed = state.longest_socket();
    if needed > SOCKET_PATH {
        return Err(OpenError::PathTooLong { path, needed });
    }
    builder
        .create(state.guests())
        .map_err(OpenError::io("making", &state.guests()))?;
    // SQLite gives the files beside the database the same mode.
    let database = state.database();
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&database)
        .map_err(OpenError::io("making", &database))?;
    Ok(state)
}

/// How long another daemon may take to let go of the directory. One that was killed in the middle of starting a VMM
/// holds it until that process has got as far as its exec.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);

async fn take_lock(state: &StateDir, dir: &Path) -> Result<File, OpenError> {
    let path = state.lock();
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&path);
    let file = file.map_err(OpenError::io("opening", &path))?;
    let locked = lock_within(file, LOCK_PATIENCE)
        .await
        .map_err(OpenError::io("locking", &path))?;
    locked.ok_or_else(|| OpenError::Locked(dir.to_owned()))
}
