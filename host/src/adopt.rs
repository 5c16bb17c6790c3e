//! At the daemon's start: what became of the guests since the one before it ended.

use std::collections::HashSet;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use shoal_vmm::protocol::Reply;

use crate::actor::{Actor, Handle, Shared, exit_record};
use crate::error::{OpenError, chain};
use crate::link::{Link, connect_to, put_down};
use crate::log::{self, LogKeeper};
use crate::paths::{GuestDir, StateDir};
use crate::process::{Ended, Process};
use crate::resources;
use crate::running::Running;
use crate::state::{State, StopReason};
use crate::store::Record;

/// How long a VMM may take to answer or to end.
const PATIENCE: Duration = Duration::from_secs(10);

/// Takes over one guest: its VMM if it lives, else the record of its end.
pub(crate) async fn guest(shared: Arc<Shared>, dir: GuestDir, mut record: Record) -> Handle {
    let mut running = None;
    if record.state.is_live() {
        running = adopt(&shared, &dir, &mut record).await;
        if running.is_none() {
            bury(&shared, &dir, &mut record).await;
        }
        if let Err(error) = shared.store.put(&record).await {
            tracing::error!(guest = %record.id, error = %chain(&error), "an adoption could not be recorded");
        }
        tracing::info!(guest = %record.id, state = record.state.name(), "taken over");
    }
    Actor::spawn(shared, dir, record, running)
}

async fn adopt(shared: &Arc<Shared>, dir: &GuestDir, record: &mut Record) -> Option<Running> {
    if record.state == State::Starting {
        return None;
    }
    let lease = || shared.launcher.adopt(&record.id, record.jail.as_ref());
    let mut process = Process::adopt(record.process.as_ref()?, lease).ok().flatten()?;
    let link = connect_to(&dir.control()).and_then(Link::new);
    let answer = match &link {
        Ok(link) => link.status(PATIENCE).await.map_err(|e| chain(&e)),
        Err(error) => Err(error.to_string()),
    };
    match (answer, link) {
        (
            Ok(Reply::Status {
                running: true,
                timeline,
            }),
            Ok(link),
        ) => {
            timeline
                .stamps
                .iter()
                .for_each(|s| record.stamps.vmm(s.step, s.at_ns));
            let vsock = resources::reopen_vsock(&record.spec, dir);
            let disks = resources::note_disks(&record.id, &record.spec, shared);
            let mut running = Running::new(
                process,
                link,
                vsock,
                disks,
                LogKeeper::of(dir),
                shared.config.kill_grace,
            );
            if record.state == State::Stopping {
                // How much of the deadline was left is not known.
                running.stop(PATIENCE);
            }
            Some(running)
        }
        (answer, _) => {
            tracing::error!(guest = %record.id, ?answer, "its VMM lives but cannot be talked to; it is ended");
            process.kill();
            let _: Ended = process.ended().await;
            None
        }
    }
}

/// The VMM is gone or never came to run the guest.
async fn bury(shared: &Arc<Shared>, dir: &GuestDir, record: &mut Record) {
    let told = put_down(&dir.control(), shared.config.kill_grace).await;
    if !(told && log::await_end(&dir.log(), PATIENCE).await) {
        tracing::error!(guest = %record.id, "a VMM without a record does not end");
    }
    dir.remove_sockets();
    shared.launcher.clean_up(&record.id, record.jail.as_ref());
    record.process = None;
    record.jail = None;
    let reason = exit_record(&dir.exit_record()).map_or(StopReason::Lost, StopReason::from);
    record.state = record.state.settled(reason);
}

/// Removes the directories of guests that nobody remembers, and ends VMMs that may still be there.
pub(crate) async fn remove_orphans(
    shared: &Shared,
    state: &StateDir,
    known: &HashSet<String>,
) -> Result<(), OpenError> {
    let guests = state.guests();
    for entry in fs::read_dir(&guests).map_err(OpenError::io("reading", &guests))? {
        let entry = entry.map_err(OpenError::io("reading", &guests))?;
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        if known.contains(&name) || !crate::spec::is_id(&name) {
            continue;
        }
        let dir = state.guest(&name);
        tracing::warn!(path = ?dir.path(), "removing what belongs to no guest");
        put_down(&dir.control(), PATIENCE).await;
        log::await_end(&dir.log(), PATIENCE).await;
        shared.launcher.clean_up(&name, None);
        dir.remove().map_err(OpenError::io("removing", dir.path()))?;
    }
    Ok(())
}
