//! The records of all guests, in SQLite. One thread owns the connection; everyone else sends it jobs.

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::JoinHandle;

use rusqlite::{Connection, params};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::launcher::JailRecord;
use crate::process::ProcessId;
use crate::spec::GuestSpec;
use crate::state::State;
use crate::timeline::Stamps;

/// The layout of the tables. A store with a higher number was written by a newer Shoal and is refused.
const SCHEMA: i64 = 1;

/// The store failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// SQLite failed.
    #[error("{what} in {path:?} failed")]
    Sqlite {
        /// What was tried.
        what: &'static str,
        /// The database.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: rusqlite::Error,
    },
    /// The store was written by a newer version.
    #[error("{path:?} has layout {found}, this program knows {SCHEMA}: use the version that wrote it")]
    Newer {
        /// The database.
        path: PathBuf,
        /// Its layout.
        found: i64,
    },
    /// A record cannot be read.
    #[error("the record of guest {id} in {path:?} cannot be read")]
    Record {
        /// The guest.
        id: String,
        /// The database.
        path: PathBuf,
        /// Why not.
        #[source]
        source: serde_json::Error,
    },
    /// The thread has ended.
    #[error("the store is closed")]
    Closed,
}

/// All that is remembered of a guest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// The id that the host gave it.
    pub id: String,
    /// What it is made of.
    pub spec: GuestSpec,
    /// How it is.
    pub state: State,
    /// When it was created (ms since 1970).
    pub created_ms: u64,
    /// Its VMM, while there is one.
    pub process: Option<ProcessId>,
    /// What its VMM's jail is made of, while there is one.
    #[serde(default)]
    pub jail: Option<JailRecord>,
    /// The steps of its last start.
    pub stamps: Stamps,
    /// The exit code of its workload, when the guest told it.
    pub exit_code: Option<i32>,
}

enum Job {
    Put {
        id: String,
        json: String,
        done: oneshot::Sender<rusqlite::Result<()>>,
    },
    Delete {
        id: String,
        done: oneshot::Sender<rusqlite::Result<()>>,
    },
}

/// A handle to the store.
#[derive(Debug)]
pub(crate) struct Store {
    path: PathBuf,
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Store {
    /// Opens the database, makes the tables if they are missing, and reads all records.
    pub fn open(path: &Path) -> Result<(Self, Vec<Record>), StoreError> {
        let error = |what| {
            move |source| StoreError::Sqlite {
                what,
                path: path.to_owned(),
                source,
            }
        };
        let db = Connection::open(path).map_err(error("opening the database"))?;
        prepare(&db, path)?;
        let records = load(&db, path)?;
        let (jobs, inbox) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("store".into())
            .spawn(move || serve(&db, &inbox))
            .map_err(|_| StoreError::Closed)?;
        Ok((
            Self {
                path: path.to_owned(),
                jobs: Some(jobs),
                thread: Some(thread),
            },
            records,
        ))
    }

    /// Records a guest; returns when it is recorded.
    pub async fn put(&self, record: &Record) -> Result<(), StoreError> {
        let json = serde_json::to_string(record).map_err(|source| StoreError::Record {
            id: record.id.clone(),
            path: self.path.clone(),
            source,
        })?;
        self.run("recording a guest", |done| Job::Put {
            id: record.id.clone(),
            json,
            done,
        })
        .await
    }

    /// Forgets a guest.
    pub async fn delete(&self, id: &str) -> Result<(), StoreError> {
        self.run("forgetting a guest", |done| Job::Delete {
            id: id.to_owned(),
            done,
        })
        .await
    }

    async fn run(
        &self,
        what: &'static str,
        job: impl FnOnce(oneshot::Sender<rusqlite::Result<()>>) -> Job,
    ) -> Result<(), StoreError> {
        let (done, wait) = oneshot::channel();
        let jobs = self.jobs.as_ref().ok_or(StoreError::Closed)?;
        jobs.send(job(done)).map_err(|_| StoreError::Closed)?;
        let result = wait.await.map_err(|_| StoreError::Closed)?;
        result.map_err(|source| StoreError::Sqlite {
            what,
            path: self.path.clone(),
            source,
        })
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // A panic in the thread has been reported by its hook; there is nobody left to tell.
            let _ = thread.join();
        }
    }
}

fn prepare(db: &Connection, path: &Path) -> Result<(), StoreError> {
    let error = |what| {
        move |source| StoreError::Sqlite {
            what,
            path: path.to_owned(),
            source,
        }
    };
    let found: i64 = db
        .query_row("PRAGMA user_version", [], |r| r.get(0))
        .map_err(error("reading the layout"))?;
    if found > SCHEMA {
        return Err(StoreError::Newer {
            path: path.to_owned(),
            found,
        });
    }
    // NORMAL: a commit survives the daemon's death at once, and the machine's after the next checkpoint. The
    // machine's death ends all guests anyway.
    db.execute_batch(
        "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; PRAGMA busy_timeout = 5000;
         CREATE TABLE IF NOT EXISTS guests (id TEXT PRIMARY KEY, record TEXT NOT NULL) STRICT;
         PRAGMA user_version = 1;",
    )
    .map_err(error("preparing the tables"))
}

fn load(db: &Connection, path: &Path) -> Result<Vec<Record>, StoreError> {
    let error = |source| StoreError::Sqlite {
        what: "reading the guests",
        path: path.to_owned(),
        source,
    };
    let mut query = db
        .prepare("SELECT id, record FROM guests ORDER BY rowid")
        .map_err(error)?;
    let rows = query
        .query_map([], |r| Ok((r.get::<_, String>(0)?, r.get::<_, String>(1)?)))
        .map_err(error)?;
    rows.map(|row| {
        let (id, json) = row.map_err(error)?;
        serde_json::from_str(&json).map_err(|source| StoreError::Record {
            id,
            path: path.to_owned(),
            source,
        })
    })
    .collect()
}

fn serve(db: &Connection, inbox: &mpsc::Receiver<Job>) {
    while let Ok(job) = inbox.recv() {
        // Whoever asked may have gone away; the record counts, not the answer.
        match job {
            Job::Put { id, json, done } => {
                let put = "INSERT INTO guests VALUES (?1, ?2) ON CONFLICT (id) DO UPDATE SET record = ?2";
                let _ = done.send(
                    db.prepare_cached(put)
                        .and_then(|mut s| s.execute(params![id, json]))
                        .map(drop),
                );
            }
            Job::Delete { id, done } => {
                let _ = done.send(db.execute("DELETE FROM guests WHERE id = ?1", [id]).map(drop));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(id: &str) -> Record {
        Record {
            id: id.into(),
            spec: GuestSpec::new("/k", 1, 64),
            state: State::Created,
            created_ms: 1,
            process: None,
            jail: None,
            stamps: Stamps::default(),
            exit_code: None,
        }
    }

    #[tokio::test]
    async fn remembers_across_openings() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shoal.db");
        let (store, records) = Store::open(&path).unwrap();
        assert!(records.is_empty());
        let (mut a, b) = (record("a"), record("b"));
        store.put(&a).await.unwrap();
        store.put(&b).await.unwrap();
        a.state = State::Failed { error: "e".into() };
        store.put(&a).await.unwrap();
        store.delete("b").await.unwrap();
        drop(store);
        assert_eq!(Store::open(&path).unwrap().1, vec![a]);
    }

    #[test]
    fn refuses_what_it_does_not_know() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shoal.db");
        let db = Connection::open(&path).unwrap();
        db.execute_batch("PRAGMA user_version = 2").unwrap();
        assert!(matches!(
            Store::open(&path),
            Err(StoreError::Newer { found: 2, .. })
        ));
        std::fs::write(&path, [7; 4096]).unwrap();
        assert!(matches!(Store::open(&path), Err(StoreError::Sqlite { .. })));
    }
}
