//! Keeping other guests off the other half of a core (Documentation/admin-guide/hw-vuln/core-scheduling.rst).
//!
//! Two processors that share a core share its caches and buffers, and what one computes leaks to the other (L1TF, MDS and
//! their kin). With a cookie of its own (PR_SCHED_CORE, Linux 5.14) a guest's threads share a core with each other only.
//! That costs throughput where guests have fewer threads to run than cores have halves, and it does not keep the host's
//! own kernel off the other half: turning SMT off does.

use std::fmt;
use std::io;
use std::str::FromStr;

use crate::error::{Degradation, JailError};
use crate::sys::{self, Errno};

/// Whether a guest's threads share a core with nobody else's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CoreScheduling {
    /// Where processors share cores and the kernel can keep guests apart there.
    #[default]
    Auto,
    /// Always: no guest is started where it cannot be had.
    On,
    /// Never.
    Off,
}

impl FromStr for CoreScheduling {
    type Err = String;

    fn from_str(text: &str) -> Result<CoreScheduling, String> {
        match text {
            "auto" => Ok(CoreScheduling::Auto),
            "on" => Ok(CoreScheduling::On),
            "off" => Ok(CoreScheduling::Off),
            _ => Err(format!(
                "{text:?} is no way of core scheduling; use auto, on or off"
            )),
        }
    }
}

impl fmt::Display for CoreScheduling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            CoreScheduling::Auto => "auto",
            CoreScheduling::On => "on",
            CoreScheduling::Off => "off",
        })
    }
}

impl CoreScheduling {
    /// Whether to ask for it on this machine ([`crate::JailSpec::core_scheduling`]), and what is lacking when not.
    ///
    /// # Errors
    /// [`JailError::System`] for [`CoreScheduling::On`] where it cannot be had.
    pub fn decide(self) -> Result<(bool, Option<Degradation>), JailError> {
        self.given(smt_is_active(), core_scheduling_works())
    }

    fn given(
        self,
        smt: bool,
        works: Result<(), io::Error>,
    ) -> Result<(bool, Option<Degradation>), JailError> {
        let lack = |because: String, remedy| {
            Some(Degradation {
                what: "core scheduling",
                because,
                consequence: "processors share cores here, and what a guest computes can be guessed from the other half of its core",
                remedy,
            })
        };
        match (self, works) {
            (CoreScheduling::Off, _) if smt => Ok((
                false,
                lack("it was turned off".to_owned(), "leave --core-scheduling at auto"),
            )),
            (CoreScheduling::Off, _) => Ok((false, None)),
            (CoreScheduling::Auto, _) if !smt => Ok((false, None)),
            (CoreScheduling::Auto | CoreScheduling::On, Ok(())) => Ok((true, None)),
            (CoreScheduling::Auto, Err(error)) => Ok((
                false,
                lack(
                    format!("the kernel refuses it: {error}"),
                    advice(error.raw_os_error()),
                ),
            )),
            (CoreScheduling::On, Err(source)) => Err(JailError::System {
                attempt: "asking for core scheduling (prctl PR_SCHED_CORE)",
                advice: advice(source.raw_os_error()),
                source,
            }),
        }
    }
}

/// What to do when the kernel refuses it with this error number.
pub(crate) fn advice(errno: Option<Errno>) -> &'static str {
    match errno {
        Some(libc::ENODEV) => {
            "no two processors of this machine share a core, so there is nothing to keep apart: leave it at auto"
        }
        _ => "use a kernel with CONFIG_SCHED_CORE (Linux 5.14), or turn SMT off and leave it at auto",
    }
}

/// Whether processors of this machine share cores (Documentation/admin-guide/hw-vuln/l1tf.rst).
pub fn smt_is_active() -> bool {
    std::fs::read("/sys/devices/system/cpu/smt/active").is_ok_and(|text| text.starts_with(b"1"))
}

/// Whether the kernel would keep a guest's threads to themselves.
///
/// # Errors
/// `ENODEV` where no two processors share a core, `EINVAL` from a kernel without CONFIG_SCHED_CORE.
pub fn core_scheduling_works() -> io::Result<()> {
    cookie(0).map(|_| ())
}

/// The cookie of a thread (0 is this one): the kernel lets threads with the same cookie share a core. 0 is that of all who
/// have not asked.
///
/// # Errors
/// As [`core_scheduling_works`]; `EPERM` and `ESRCH` of the thread.
pub fn cookie(thread: i32) -> io::Result<u64> {
    const GET: usize = 0;
    const THREAD: usize = 0;
    let mut cookie = 0_u64;
    let place = &raw mut cookie as usize;
    // SAFETY: PR_SCHED_CORE_GET writes a cookie of 8 bytes to its last argument, which is alive and aligned.
    let got = unsafe {
        sys::raw(
            libc::SYS_prctl,
            [
                libc::PR_SCHED_CORE as usize,
                GET,
                thread as usize,
                THREAD,
                place,
                0,
            ],
        )
    };
    got.map(|_| cookie).map_err(io::Error::from_raw_os_error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(errno: Errno) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(errno))
    }

    #[test]
    fn auto_asks_only_where_cores_are_shared() {
        let auto = CoreScheduling::Auto;
        assert_eq!(auto.given(true, Ok(())).unwrap(), (true, None));
        assert_eq!(auto.given(false, refused(libc::ENODEV)).unwrap(), (false, None));
        // Turned off at run time: the kernel would still take the request.
        assert_eq!(auto.given(false, Ok(())).unwrap(), (false, None));
        let (ask, lack) = auto.given(true, refused(libc::EINVAL)).unwrap();
        let lack = lack.expect("it says what is lacking").to_string();
        assert!(!ask && lack.contains("CONFIG_SCHED_CORE"), "{lack}");
    }

    #[test]
    fn on_is_an_error_where_it_cannot_be_had() {
        let on = CoreScheduling::On;
        assert_eq!(on.given(true, Ok(())).unwrap(), (true, None));
        for (errno, word) in [
            (libc::ENODEV, "share a core"),
            (libc::EINVAL, "CONFIG_SCHED_CORE"),
        ] {
            let text = on.given(false, refused(errno)).unwrap_err().to_string();
            assert!(text.contains("PR_SCHED_CORE") && text.contains(word), "{text}");
        }
    }

    #[test]
    fn off_says_what_it_means_where_cores_are_shared() {
        let off = CoreScheduling::Off;
        assert_eq!(off.given(false, Ok(())).unwrap(), (false, None));
        let (ask, lack) = off.given(true, Ok(())).unwrap();
        assert!(!ask && lack.is_some());
    }

    #[test]
    fn words_are_read_and_others_refused() {
        for word in ["auto", "on", "off"] {
            assert_eq!(word.parse::<CoreScheduling>().unwrap().to_string(), word);
        }
        assert!("always".parse::<CoreScheduling>().unwrap_err().contains("auto"));
    }
}
