//! PID 1 of Shoal's guests: mounts, network, workload, reaping, and an orderly end of the machine.
//!
//! It is configured by the kernel command line (see `guest-images/README.md`) and needs no other program. A step that
//! fails is told on the console and left out; nothing ends init but the end of the machine.
//!
//! There is no `fn main`: the Rust runtime's own start aborts when descriptors 0 to 2 are closed and `/dev/null` is
//! missing, which is what an initramfs without device nodes gives to its init.
#![cfg_attr(not(test), no_main)]
#![cfg_attr(test, allow(dead_code))]

mod button;
mod cmdline;
mod console;
mod host;
mod mounts;
mod net;
mod supervise;
mod sys;
mod workload;

use cmdline::{Config, OnExit};
use console::{report, say};
use host::Host;
use std::io::Read;

/// The VMM stamps its timeline when a byte is written here (`shoal_vmm::layout::MARK_PORT`).
const MARK_PORT: u16 = 0xf8e;
const MARK_STARTED: u8 = 1;
const MARK_READY: u8 = 2;
const MARK_EXITED: u8 = 3;
/// The sleep control register of Shoal's machine and "power off" in it, for a kernel that runs without ACPI.
const SLEEP_CONTROL_PORT: u16 = 0x600;
const SLEEP_CONTROL_S5: u8 = (5 << 2) | 0x20;

/// What the kernel calls.
#[cfg(not(test))]
#[unsafe(no_mangle)]
pub extern "C" fn main() -> libc::c_int {
    start();
    1
}

fn start() {
    sys::write_port(MARK_PORT, MARK_STARTED);
    if std::process::id() != 1 {
        sys::repair_standard_descriptors();
        say("this is a guest's PID 1 and runs as nothing else");
        return;
    }
    std::panic::set_hook(Box::new(|panic| {
        say(&format!("this is a bug in init, the machine stops: {panic}"));
        end(&[], OnExit::PowerOff);
    }));
    let line = mounts::proc().and_then(|()| read_cmdline());
    let config = Config::parse(line.as_deref().unwrap_or_default());
    mounts::system();
    sys::repair_standard_descriptors();
    report("read /proc/cmdline, all defaults are taken", line.map(drop));
    for problem in &config.problems {
        say(problem);
    }
    sys::take_ctrl_alt_del();
    let name = config.hostname.as_deref().map_or(Ok(()), sys::set_hostname);
    report("set the host name", name);
    net::configure(&config);
    mounts::requested(&config);
    run(&config);
    end(&config.mounts, config.on_exit);
}

fn read_cmdline() -> std::io::Result<String> {
    let mut bytes = Vec::new();
    std::fs::File::open("/proc/cmdline")?
        .take(cmdline::MAX_CMDLINE as u64)
        .read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Runs the workload to its end and tells its exit code.
fn run(config: &Config) {
    let signals = match sys::signal_fd(&supervise::SIGNALS) {
        Ok(signals) => signals,
        Err(e) => {
            return say(&format!(
                "could not take signals: {e}; there is nothing that init can do"
            ));
        }
    };
    let workload = match workload::start(config) {
        Ok(workload) => workload,
        Err((program, e)) => {
            say(&format!("cannot run {program}: {e}"));
            return say("workload exited with code 127");
        }
    };
    sys::write_port(MARK_PORT, MARK_READY);
    // Opened before the guest says that it is ready: a press that nobody listens for is lost.
    let buttons = button::open();
    let ready_at = sys::uptime_ns();
    say("ready");
    let mut host = Host::call();
    let code = supervise::until_exit(&workload, config, &signals, &mut host, buttons, ready_at);
    sys::write_port(MARK_PORT, MARK_EXITED);
    supervise::end_stragglers(&signals);
    say(&format!("workload exited with code {code}"));
    host.farewell(code);
}

/// Ends the machine.
fn end(mounts: &[cmdline::Mount], how: OnExit) {
    sys::sync();
    mounts::release(mounts);
    if how == OnExit::PowerOff {
        if !std::path::Path::new("/sys/firmware/acpi").exists() {
            sys::write_port(SLEEP_CONTROL_PORT, SLEEP_CONTROL_S5);
        } else {
            sys::reboot(libc::RB_POWER_OFF);
        }
    }
    sys::reboot(libc::RB_AUTOBOOT);
}
