//! Runs the guests on `/dev/kvm` with raw KVM and checks what they print and how they end.

mod machine;

use machine::{End, Entry, kvm, run};
use shoal_probe as probe;

#[test]
fn the_minimal_guests_write_one_byte_and_reset() {
    let Some(kvm) = kvm() else { return };
    for (elf, entry) in [(probe::MINIMAL_PVH, Entry::Pvh), (probe::MINIMAL_64, Entry::Long)] {
        let run = run(&kvm, elf, entry, "");
        assert_eq!((run.output.as_str(), run.end), ("R", End::Reset), "{entry:?}");
    }
}

#[test]
fn the_probe_reaches_ring_3_by_both_entries_and_reads_its_command_line() {
    let Some(kvm) = kvm() else { return };
    for (elf, entry) in [
        (probe::PROBE, Entry::Pvh),
        (probe::PROBE, Entry::Long),
        (probe::PROBE_64, Entry::Long),
    ] {
        let run = run(
            &kvm,
            elf,
            entry,
            "console=ttyS0 print=hello mark=7 mark=0x2a echo=7 exit=poweroff",
        );
        assert_eq!(run.output, "probe: ready\nhello\nechoed!", "{entry:?}");
        assert_eq!((run.end, run.marks), (End::PowerOff, vec![7, 42]));
    }
}

#[test]
fn a_command_line_without_an_exit_ends_in_a_reset() {
    let Some(kvm) = kvm() else { return };
    let run = run(&kvm, probe::PROBE, Entry::Pvh, "");
    assert_eq!(
        (run.output.as_str(), run.end),
        ("probe: ready\nprobe: done\n", End::Reset)
    );
}

#[test]
fn a_triple_fault_shuts_the_machine_down() {
    let Some(kvm) = kvm() else { return };
    let run = run(&kvm, probe::PROBE, Entry::Long, "exit=triple");
    assert!(matches!(run.end, End::Shutdown | End::Internal), "{:?}", run.end);
    assert_eq!(run.output, "probe: ready\n");
}

#[test]
fn an_instruction_from_nowhere_is_an_internal_error_of_kvm() {
    let Some(kvm) = kvm() else { return };
    let run = run(&kvm, probe::PROBE, Entry::Pvh, "exit=nowhere");
    assert!(matches!(run.end, End::Internal), "{:?}", run.end);
    assert_eq!(run.output, "probe: ready\n");
}

#[test]
fn work_is_counted_in_cycles() {
    let Some(kvm) = kvm() else { return };
    let run = run(
        &kvm,
        probe::PROBE,
        Entry::Pvh,
        "spin=1000000 ring0=1000 io=100 port=0x81 io=3 touch=8",
    );
    let words: Vec<Vec<&str>> = run.output.lines().map(|l| l.split(' ').collect()).collect();
    for (line, name, count) in [
        (1, "spin", "1000000"),
        (2, "ring0", "1000"),
        (3, "io", "100"),
        (4, "io", "3"),
        (5, "touch", "2048"),
    ] {
        assert_eq!(words[line][..3], ["probe:", name, count], "{}", run.output);
        assert!(words[line][4].parse::<u64>().unwrap() > 0, "{}", run.output);
    }
}

#[test]
fn an_exception_is_told() {
    let Some(kvm) = kvm() else { return };
    let run = run(&kvm, probe::PROBE, Entry::Pvh, "peek=0x100000000 exit=halt");
    let (head, tail) = run
        .output
        .split_once(" at ")
        .unwrap_or_else(|| panic!("{}", run.output));
    assert_eq!(head, "probe: ready\nprobe: exception 14 error 0x4");
    assert!(tail.ends_with(" address 0x100000000\n"), "{tail}");
    assert_eq!(run.end, End::Reset);
}

#[test]
fn each_instruction_works_or_is_an_internal_error() {
    let Some(kvm) = kvm() else { return };
    for name in ["cmpxchg16b", "xrstor", "int3"] {
        let run = run(&kvm, probe::PROBE, Entry::Pvh, &format!("insn={name} exit=reset"));
        match run.end {
            End::Reset => assert!(
                run.output.ends_with(&format!("probe: insn {name} ok\n"))
                    || run.output.ends_with(&format!("probe: insn {name} absent\n")),
                "{}",
                run.output
            ),
            End::Internal => assert_eq!(run.output, format!("probe: ready\nprobe: insn {name}")),
            other => panic!("{name}: {other:?} {}", run.output),
        }
        eprintln!("{name}: {:?}", run.output);
    }
}

#[test]
fn garbage_stays_in_the_windows_and_ends() {
    let Some(kvm) = kvm() else { return };
    let run = run(&kvm, probe::PROBE, Entry::Pvh, "seed=5 garbage=2000 exit=reset");
    assert_eq!(run.output, "probe: ready\nprobe: garbage done\n");
    assert!(run.mmio_writes > 1000, "{}", run.mmio_writes);
}
