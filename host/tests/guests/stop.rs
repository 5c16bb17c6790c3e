//! The ways in which a guest ends. Each has its own reason.

use std::time::Duration;

use shoal_host::{GuestSpec, StopReason};

use crate::fleet::{Fleet, PATIENCE, jeos, kvm_opens, linux_runs};

const SLEEP: &str = "exec sleep 100000";
const TERMINATED: i32 = 128 + 15;

#[test]
fn stops_when_told_over_vsock() {
    if !linux_runs("stops_when_told_over_vsock") {
        return;
    }
    let fleet = Fleet::new();
    // What is mounted over the input devices hides the power button from init.
    let guest = fleet.start(jeos(
        "shoal.mount=none:/dev/input:tmpfs",
        &["ls /dev/input", SLEEP],
    ));
    guest.await_output("shoal-init: ready");
    let end = guest.stop(PATIENCE);
    end.assert_is(StopReason::PowerOff, Some(TERMINATED));
    assert!(
        end.console.contains("shoal-init: asked to stop"),
        "{}",
        end.console
    );
    assert!(
        !end.console.contains("event0"),
        "the button was not hidden: {}",
        end.console
    );
}

#[test]
fn a_new_daemon_hears_the_guests_of_the_one_before() {
    if !linux_runs("a_new_daemon_hears_the_guests_of_the_one_before") {
        return;
    }
    let mut fleet = Fleet::new();
    // Without the button, the guest hears of the stop only when it calls the new daemon.
    let guest = fleet.start(jeos("shoal.mount=none:/dev/input:tmpfs", &[SLEEP]));
    guest.await_output("shoal-init: ready");
    let (id, pid) = (guest.id.clone(), guest.pid());
    fleet.reopen();
    let guest = fleet.guest(&id);
    assert_eq!(guest.pid(), pid, "it was adopted");
    let end = guest.stop(PATIENCE);
    end.assert_is(StopReason::PowerOff, Some(TERMINATED));
}

#[test]
fn stops_at_the_power_button_alone() {
    if !linux_runs("stops_at_the_power_button_alone") {
        return;
    }
    let fleet = Fleet::new();
    let mut spec = jeos("", &[SLEEP]);
    spec.vsock = None;
    let guest = fleet.start(spec);
    guest.await_output("shoal-init: ready");
    let end = guest.stop(PATIENCE);
    end.assert_is(StopReason::PowerOff, None);
    assert!(
        end.console.contains("shoal-init: asked to stop"),
        "{}",
        end.console
    );
}

#[test]
fn is_killed_at_the_deadline() {
    if !linux_runs("is_killed_at_the_deadline") {
        return;
    }
    let fleet = Fleet::new();
    let deaf = "trap '' TERM; echo deaf; while :; do sleep 100000; done";
    let guest = fleet.start(jeos("shoal.grace=3600", &[deaf]));
    guest.await_output("deaf");
    let end = guest.stop(Duration::from_millis(500));
    end.assert_is(StopReason::Killed, None);
}

#[test]
fn linux_ends_by_a_triple_fault() {
    if !linux_runs("linux_ends_by_a_triple_fault") {
        return;
    }
    let fleet = Fleet::new();
    // reboot=t: the kernel resets the machine by a triple fault.
    let end = fleet
        .start(jeos("reboot=t shoal.on_exit=reboot", &["exit 5"]))
        .end();
    end.assert_is(StopReason::TripleFault, Some(5));
}

#[test]
fn each_end_of_a_bare_metal_guest_has_its_reason() {
    if !kvm_opens("each_end_of_a_bare_metal_guest_has_its_reason") {
        return;
    }
    let fleet = Fleet::new();
    for (exit, reason) in [
        ("reset", StopReason::Reset),
        ("poweroff", StopReason::PowerOff),
        ("triple", StopReason::TripleFault),
    ] {
        let mut spec = GuestSpec::new(fleet.probe(), 1, 16);
        spec.cmdline = format!("exit={exit}");
        assert_eq!(fleet.start(spec).end().reason, reason, "exit={exit}");
    }
    let mut spec = GuestSpec::new(fleet.probe(), 1, 16);
    spec.cmdline = "exit=nowhere".into();
    match fleet.start(spec).end().reason {
        StopReason::KvmError { detail } => assert!(detail.contains("at rip 0x"), "{detail}"),
        reason => panic!("exit=nowhere: {reason:?}"),
    }
}
