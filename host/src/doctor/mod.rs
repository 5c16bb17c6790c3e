//! What this machine can run, found out by trying.
//!
//! A KVM that opens is not enough: some hosts run guest ring 3 natively and emulate ring 0 with an emulator that lacks
//! instructions which every Linux kernel uses. So a small bare-metal guest is run by the real VMM: it measures the speed
//! of both rings and executes those instructions.
//!
//! As JSON (`shoal doctor --json`):
//!
//! ```json
//! {
//!   "verdict": "bare-metal",
//!   "reason": "guest ring 0 is emulated, …",
//!   "advice": ["…"],
//!   "checks": [{"name": "kvm", "status": "ok", "detail": "…", "advice": null}],
//!   "probe": {"ring3_ips": 6.1e9, "ring0_ips": 1.4e6,
//!             "instructions": [{"name": "cmpxchg16b", "works": false, "detail": "…"}]}
//! }
//! ```

mod checks;
mod probe;
mod production;

use std::path::Path;

use serde::Serialize;

use shoal_jailer::Degradation;

use crate::config::Confinement;
use crate::error::chain;
use crate::launcher::{Launcher, LauncherError};

/// What a machine can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Linux guests.
    Linux,
    /// Only guests that do next to nothing in ring 0.
    BareMetal,
    /// No guests.
    None,
}

impl Verdict {
    /// The exit code of `shoal doctor`: 0, 3 or 4.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Linux => 0,
            Self::BareMetal => 3,
            Self::None => 4,
        }
    }
}

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Something cannot be had, guests run nevertheless.
    Warning,
    /// Guests cannot run because of it.
    Failed,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What.
    pub name: &'static str,
    /// How it came out.
    pub status: Status,
    /// What was found.
    pub detail: String,
    /// What to do about it.
    pub advice: Option<String>,
}

/// An instruction that Linux needs in ring 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Instruction {
    /// Its name.
    pub name: &'static str,
    /// Whether it works, or the processor does not claim to have it.
    pub works: bool,
    /// What happened.
    pub detail: String,
}

/// What the probe guest found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Probe {
    /// Instructions per second in guest ring 3.
    pub ring3_ips: f64,
    /// Instructions per second in guest ring 0.
    pub ring0_ips: f64,
    /// Instructions in ring 0.
    pub instructions: Vec<Instruction>,
}

/// What was found out about a machine.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// What it can run.
    pub verdict: Verdict,
    /// Why.
    pub reason: String,
    /// What to do.
    pub advice: Vec<String>,
    /// What was looked at.
    pub checks: Vec<Check>,
    /// What the probe guest found, when it could be run.
    pub probe: Option<Probe>,
}

/// Ring 0 counts as emulated when it is this many times slower than ring 3.
const EMULATED: f64 = 20.0;

/// Examines this machine with the VMM program `vmm`. Takes less than a second, unless the VMM hangs (10 s).
pub async fn examine(vmm: &Path) -> Report {
    let mut checks = checks::all();
    checks.extend(production::all());
    // The owner chooses the users of its guests: nobody else's guests run as these.
    let launcher = Launcher::new(vmm, Path::new("doctor"), &Confinement::default());
    checks.extend(jail(&launcher));
    let failed = checks.iter().find(|c| c.status == Status::Failed).cloned();
    let probed = match (&failed, &launcher) {
        (None, Ok(launcher)) => run_probe(launcher).await,
        (Some(check), _) => Err(check.detail.clone()),
        (None, Err(error)) => Err(chain(error)),
    };
    let (verdict, reason, mut advice) = judge(&probed, failed.is_some());
    if failed.is_none() {
        checks.push(match &probed {
            Ok(_) => Check {
                name: "probe",
                status: Status::Ok,
                detail: "the probe guest ran".into(),
                advice: None,
            },
            Err(error) => Check {
                name: "probe",
                status: Status::Failed,
                detail: error.clone(),
                advice: None,
            },
        });
    }
    advice.extend(checks.iter().filter_map(|c| c.advice.clone()));
    Report {
        verdict,
        reason,
        advice,
        checks,
        probe: probed.ok(),
    }
}

async fn run_probe(launcher: &Launcher) -> Result<Probe, String> {
    probe::run(launcher).await.map_err(|e| chain(&e))
}

/// What the jails of this machine and this user lack.
fn jail(launcher: &Result<Launcher, LauncherError>) -> Vec<Check> {
    let launcher = match launcher {
        Ok(launcher) => launcher,
        Err(error) => {
            return vec![Check {
                name: "jail",
                status: Status::Failed,
                detail: chain(error),
                advice: None,
            }];
        }
    };
    let lacks = launcher.degradations();
    if lacks.is_empty() {
        return vec![Check {
            name: "jail",
            status: Status::Ok,
            detail: "every layer of docs/security.md can be had".into(),
            advice: None,
        }];
    }
    let check = |lack: &Degradation| Check {
        name: "jail",
        status: Status::Warning,
        detail: format!("no {}: {}; {}", lack.what, lack.because, lack.consequence),
        advice: Some(format!("for {}: {}", lack.what, lack.remedy)),
    };
    lacks.iter().map(check).collect()
}

const SLOW: &str = "use a machine with hardware virtualization (on a cloud machine: bare metal, or nested \
                    virtualization switched on), or run Linux guests in the emulated lab: shoal-lab run -- COMMAND";

fn judge(probed: &Result<Probe, String>, check_failed: bool) -> (Verdict, String, Vec<String>) {
    let probe = match probed {
        Ok(probe) => probe,
        Err(error) if check_failed => return (Verdict::None, error.clone(), vec![]),
        Err(error) => {
            let advice = "the VMM and KVM do not get along; its message may tell why".into();
            return (
                Verdict::None,
                format!("the probe guest did not run: {error}"),
                vec![advice],
            );
        }
    };
    let broken: Vec<_> = probe
        .instructions
        .iter()
        .filter(|i| !i.works)
        .map(|i| i.name)
        .collect();
    let slow = probe.ring0_ips * EMULATED < probe.ring3_ips;
    let speed = format!("{:.1} million instructions/s in ring 0", probe.ring0_ips / 1e6);
    match (slow, broken.is_empty()) {
        (false, true) => (
            Verdict::Linux,
            format!("the probe guest ran at full speed in both rings ({speed})"),
            vec![],
        ),
        (_, false) => {
            let what = broken.join(", ");
            let reason = format!("KVM cannot execute {what} in guest ring 0, which Linux needs ({speed})");
            (Verdict::BareMetal, reason, vec![SLOW.into()])
        }
        (true, true) => (
            Verdict::BareMetal,
            format!("KVM emulates guest ring 0 in software ({speed})"),
            vec![SLOW.into()],
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probe(ring0_ips: f64, works: bool) -> Result<Probe, String> {
        let instructions = vec![Instruction {
            name: "int3",
            works,
            detail: String::new(),
        }];
        Ok(Probe {
            ring3_ips: 4e9,
            ring0_ips,
            instructions,
        })
    }

    #[test]
    fn judges_by_what_works() {
        assert_eq!(judge(&probe(4e9, true), false).0, Verdict::Linux);
        assert_eq!(judge(&probe(4e9, false), false).0, Verdict::BareMetal);
        assert_eq!(judge(&probe(1e6, true), false).0, Verdict::BareMetal);
        assert_eq!(judge(&probe(1e6, false), false).0, Verdict::BareMetal);
        assert_eq!(judge(&Err("e".into()), false).0, Verdict::None);
        let (verdict, reason, _) = judge(&Err("no /dev/kvm".into()), true);
        assert_eq!((verdict, reason.as_str()), (Verdict::None, "no /dev/kvm"));
    }
}
