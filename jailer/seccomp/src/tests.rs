use super::*;
use crate::policy::{Rule, parse};

fn rules(kind: ThreadKind) -> Vec<Rule> {
    parse(kind.policy()).unwrap()
}

/// Runs a filter as the kernel does (the instructions that seccompiler emits).
fn run(program: &[sock_filter], number: i64, arguments: [u64; 6]) -> u32 {
    let mut data = [0_u32; 16];
    (data[0], data[1]) = (number as u32, 0xc000_003e);
    for (i, argument) in arguments.iter().enumerate() {
        (data[4 + 2 * i], data[5 + 2 * i]) = (*argument as u32, (*argument >> 32) as u32);
    }
    let (mut at, mut a) = (0, 0);
    loop {
        let i = &program[at];
        let branch = |yes: bool| usize::from(if yes { i.jt } else { i.jf });
        at += 1 + match i.code {
            0x20 => {
                a = data[i.k as usize / 4];
                0
            }
            0x15 => branch(a == i.k),
            0x35 => branch(a >= i.k),
            0x25 => branch(a > i.k),
            0x54 => {
                a &= i.k;
                0
            }
            0x05 => i.k as usize,
            0x06 => return i.k,
            other => panic!("instruction {other:#x}"),
        };
    }
}

const ALLOW: u32 = 0x7fff_0000;
const KILL: u32 = 0x8000_0000;

#[test]
fn filters_do_what_the_policies_say() {
    let interesting = [0, 1, 2, 4, 7, 0xae80, 0x8000_0000, 0xffff_ffff, 0x10_0000_0002];
    for kind in ThreadKind::ALL {
        let rules = rules(kind);
        for (number, name) in syscalls::SYSCALLS {
            for argument in interesting
                .into_iter()
                .chain(constants::CONSTANTS.iter().map(|c| c.1))
            {
                let arguments = [argument; 6];
                let allowed = rules.iter().any(|rule| rule.allows(*number, &arguments));
                let wanted = if allowed { ALLOW } else { KILL };
                assert_eq!(
                    run(program(kind, Mode::Kill), *number, arguments),
                    wanted,
                    "{kind:?} {name} {argument:#x}"
                );
            }
        }
    }
}

#[test]
fn the_32_bit_and_x32_entries_are_closed() {
    for kind in ThreadKind::ALL {
        let read_by_x32 = 0x4000_0000;
        assert_eq!(run(program(kind, Mode::Kill), read_by_x32, [0; 6]), KILL);
    }
}

#[test]
fn no_policy_allows_executable_memory_or_new_processes() {
    let exec = u64::from(libc::PROT_EXEC as u32);
    for rule in ThreadKind::ALL.into_iter().flat_map(rules) {
        let with_exec = [0, 4096, exec | 3, 0x22, u64::MAX, 0];
        let memory = matches!(rule.name.as_str(), "mmap" | "mprotect" | "pkey_mprotect");
        assert!(
            !(memory && rule.allows(rule.number, &with_exec)),
            "line {}",
            rule.line
        );
        for refused in [
            "execve",
            "execveat",
            "fork",
            "vfork",
            "clone3",
            "ptrace",
            "openat",
            "open",
            "socket",
            "io_uring_setup",
            "io_uring_register",
        ] {
            assert_ne!(rule.name, refused);
        }
        if matches!(
            rule.name.as_str(),
            "ioctl"
                | "fcntl"
                | "mmap"
                | "mprotect"
                | "clone"
                | "socket"
                | "prctl"
                | "futex"
                | "fallocate"
                | "tgkill"
        ) {
            assert!(
                !rule.conditions.is_empty(),
                "{} on line {} checks no argument",
                rule.name,
                rule.line
            );
        }
    }
}

#[test]
fn policies_stay_short() {
    let distinct = |kind| {
        rules(kind)
            .iter()
            .map(|rule| rule.number)
            .collect::<std::collections::BTreeSet<_>>()
            .len()
    };
    assert!(
        distinct(ThreadKind::EventLoop) < 30,
        "{}",
        distinct(ThreadKind::EventLoop)
    );
    assert!(
        distinct(ThreadKind::EventLoopUring) < 30,
        "{}",
        distinct(ThreadKind::EventLoopUring)
    );
    assert!(distinct(ThreadKind::Vcpu) < 15, "{}", distinct(ThreadKind::Vcpu));
}

#[test]
fn wrong_policies_are_refused_with_their_line() {
    for (text, word) in [
        ("raed # x", "no system call"),
        ("read", "no reason"),
        ("read arg9 == 1 # x", "no condition"),
        ("read arg0 == FOO # x", "no known name"),
        ("read arg0 & 1 == 2 # x", "never holds"),
        ("read arg0 in # x", "no condition"),
        ("read # x\n\nread arg0 == 1 # y", "line 3"),
    ] {
        let error = parse(text).unwrap_err().to_string();
        assert!(error.contains(word), "{text:?}: {error}");
    }
}

#[test]
fn conditions_compare_the_lower_half() {
    let rules = parse("ioctl arg1 in KVM_RUN 7, arg0 & 0x4|2 == 4 # x").unwrap();
    assert!(rules[0].allows(16, &[0xff_0000_0005, 0xae80, 0, 0, 0, 0]));
    assert!(!rules[0].allows(16, &[6, 7, 0, 0, 0, 0]));
    assert!(!rules[0].allows(17, &[4, 7, 0, 0, 0, 0]));
}

#[test]
fn trace_data_names_the_kind() {
    for kind in ThreadKind::ALL {
        assert_eq!(traced_kind(u64::from(TRACE_MARK | kind as u16)), Some(kind));
    }
    assert_eq!(traced_kind(0), None);
    assert_eq!(traced_kind(0x5aff), None);
    assert_eq!(traced_kind(0x1_5a00), None);
}

#[test]
fn only_a_vmm_with_a_ring_may_enter_it() {
    for kind in ThreadKind::ALL {
        let enters = rules(kind).iter().any(|rule| rule.name == "io_uring_enter");
        assert_eq!(enters, kind == ThreadKind::EventLoopUring, "{kind:?}");
    }
    let base = rules(ThreadKind::EventLoop);
    assert_eq!(rules(ThreadKind::EventLoopUring)[..base.len()], base);
}
