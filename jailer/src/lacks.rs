//! What a jail may lack, in words.

use crate::error::{Degradation, Step};

/// Steps that were passed over, in words.
pub(crate) fn skipped(bits: u32) -> Vec<Degradation> {
    let all = [
        (
            Step::OomScore,
            Degradation {
                what: "oom_score_adj",
                because: "/proc/self/oom_score_adj could not be written".to_owned(),
                consequence: "the host's own processes may be killed for a guest's memory",
                remedy: "mount /proc on the host",
            },
        ),
        (
            Step::Keyring,
            Degradation {
                what: "session keyring",
                because: "the kernel has no keys, or the user's quota of them is used up".to_owned(),
                consequence: "keys of the daemon's session are kept from the VMM by seccomp only",
                remedy: "raise kernel.keys.maxkeys",
            },
        ),
    ];
    all.into_iter()
        .filter(|(step, _)| bits & (1 << *step as u32) != 0)
        .map(|(_, lack)| lack)
        .collect()
}

/// No cgroup.
pub(crate) fn no_cgroup() -> Degradation {
    Degradation {
        what: "cgroup",
        because: "no cgroup of version 2 was given for the guests".to_owned(),
        consequence: "a VMM that was taken over can use up the host's memory, processors and disks",
        remedy: "give a cgroup of version 2 that is delegated to this user (shoald --cgroup, shoal-jailer run --cgroup-parent)",
    }
}

/// No jail at all.
pub(crate) fn no_jail() -> Degradation {
    Degradation {
        what: "jail",
        because: "it is turned off".to_owned(),
        consequence: "a VMM that was taken over has everything that this user has",
        remedy: "leave --no-jail away",
    }
}

/// No user of its own.
pub(crate) fn one_user(uid: u32) -> Degradation {
    Degradation {
        what: "a user per guest",
        because: "without root, all guests run as the one user that started them".to_owned()
            + &format!(" ({uid})"),
        consequence: "between guests and that user's files and processes stand the namespaces, landlock and seccomp, but not the uid",
        remedy: "run as root",
    }
}
