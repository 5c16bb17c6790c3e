//! The states of a guest, and the one place that changes them.
//!
//! ```text
//!            Start            Started           StopAsked
//!  created ────────▶ starting ────────▶ running ────────▶ stopping
//!                     ▲    │               │                 │
//!               Start │    │ StartFailed   │ Ended           │ Ended
//!                     │    ▼               ▼                 │
//!                     ├─ failed         stopped ◀────────────┘
//!                     └────────────────────┘
//! ```
//!
//! `Start` is allowed in created, stopped and failed; `StopAsked` in running and (again) in stopping. Deleting is no
//! state: the record goes away, and is allowed where no VMM runs.

use serde::{Deserialize, Serialize};
use shoal_vmm::protocol::ExitReason;

/// How a guest is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum State {
    /// Described, never started.
    Created,
    /// Its VMM is being started.
    Starting,
    /// It runs.
    Running,
    /// It runs and was asked to stop.
    Stopping,
    /// It ran and has ended.
    Stopped {
        /// Why.
        reason: StopReason,
    },
    /// It could not be started.
    Failed {
        /// What was tried and why it failed.
        error: String,
    },
}

/// Why a guest ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reason", rename_all = "kebab-case")]
pub enum StopReason {
    /// The guest powered off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// A vCPU met a triple fault.
    TripleFault,
    /// KVM could not go on.
    KvmError {
        /// What KVM said.
        detail: String,
    },
    /// The host ended it: it did not stop before the deadline, or was deleted by force.
    Killed,
    /// The VMM was ended for a system call that its seccomp filter forbids: by a bug of the VMM, or by a guest that took
    /// it over.
    SeccompKill {
        /// The system call's name, where the kernel tells it.
        syscall: Option<String>,
    },
    /// The VMM met a bug of its own (a panic) and ended itself.
    VmmBug {
        /// Where in its source.
        place: String,
    },
    /// The VMM was ended by a signal that the host did not send.
    VmmSignal {
        /// The signal's number.
        signal: i32,
    },
    /// The VMM ended by itself without saying why.
    VmmExit {
        /// Its exit code.
        code: i32,
    },
    /// The VMM is gone and left no record; it ended while no daemon watched, or the host was restarted.
    Lost,
}

impl From<ExitReason> for StopReason {
    fn from(reason: ExitReason) -> Self {
        match reason {
            ExitReason::PowerOff => Self::PowerOff,
            ExitReason::Reset => Self::Reset,
            ExitReason::TripleFault => Self::TripleFault,
            ExitReason::KvmError { detail } => Self::KvmError { detail },
            ExitReason::Killed => Self::Killed,
            ExitReason::Bug { place } => Self::VmmBug { place },
        }
    }
}

/// What changes a state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// A start was asked for.
    Start,
    /// The VMM says that the guest runs.
    Started,
    /// The start failed and was undone.
    StartFailed(String),
    /// A stop was asked for.
    StopAsked,
    /// The VMM has ended.
    Ended(StopReason),
}

impl State {
    /// The state's name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Stopping => "stopping",
            Self::Stopped { .. } => "stopped",
            Self::Failed { .. } => "failed",
        }
    }

    /// Whether there is a VMM, or may be one.
    pub fn is_live(&self) -> bool {
        matches!(self, Self::Starting | Self::Running | Self::Stopping)
    }

    /// The state after `change`; `None` when the change does not fit.
    pub(crate) fn after(&self, change: Change) -> Option<State> {
        Some(match (self, change) {
            (Self::Created | Self::Stopped { .. } | Self::Failed { .. }, Change::Start) => Self::Starting,
            (Self::Starting, Change::Started) => Self::Running,
            (Self::Starting, Change::StartFailed(error)) => Self::Failed { error },
            (Self::Running | Self::Stopping, Change::StopAsked) => Self::Stopping,
            (Self::Running | Self::Stopping, Change::Ended(reason)) => Self::Stopped { reason },
            _ => return None,
        })
    }
}

impl State {
    /// The state of a guest whose VMM turned out to be gone, or was put down in the middle of its start, when a daemon
    /// took over. A guest without a VMM stays as it is.
    pub(crate) fn settled(&self, reason: StopReason) -> State {
        let interrupted = "the daemon ended while the guest was being started; the start was undone";
        let change = match self {
            Self::Starting => Change::StartFailed(interrupted.into()),
            _ => Change::Ended(reason),
        };
        self.after(change).unwrap_or_else(|| self.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_the_ways_of_the_diagram_and_no_other() {
        let stopped = State::Stopped {
            reason: StopReason::PowerOff,
        };
        let failed = State::Failed { error: "e".into() };
        let states = [
            State::Created,
            State::Starting,
            State::Running,
            State::Stopping,
            stopped.clone(),
            failed.clone(),
        ];
        let changes = [
            Change::Start,
            Change::Started,
            Change::StartFailed("e".into()),
            Change::StopAsked,
            Change::Ended(StopReason::PowerOff),
        ];
        let want = [
            [Some(State::Starting), None, None, None, None],
            [None, Some(State::Running), Some(failed), None, None],
            [None, None, None, Some(State::Stopping), Some(stopped.clone())],
            [None, None, None, Some(State::Stopping), Some(stopped)],
            [Some(State::Starting), None, None, None, None],
            [Some(State::Starting), None, None, None, None],
        ];
        for (state, row) in states.iter().zip(want) {
            for (change, want) in changes.iter().zip(row) {
                assert_eq!(state.after(change.clone()), want, "{state:?} after {change:?}");
            }
        }
    }

    #[test]
    fn settles_what_a_daemon_left_half_done() {
        let ended = State::Stopped {
            reason: StopReason::Lost,
        };
        assert_eq!(State::Running.settled(StopReason::Lost), ended);
        assert_eq!(State::Stopping.settled(StopReason::Lost), ended);
        assert_eq!(State::Created.settled(StopReason::Lost), State::Created);
        assert!(matches!(
            State::Starting.settled(StopReason::Lost),
            State::Failed { .. }
        ));
    }

    #[test]
    fn is_stored_by_name() {
        let state = State::Stopped {
            reason: StopReason::VmmSignal { signal: 9 },
        };
        let json = serde_json::to_string(&state).unwrap();
        assert_eq!(
            json,
            r#"{"state":"stopped","reason":{"reason":"vmm-signal","signal":9}}"#
        );
        assert_eq!(serde_json::from_str::<State>(&json).unwrap(), state);
    }
}
