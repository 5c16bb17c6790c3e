//! A vCPU and its thread.
//!
//! ```text
//!   spawn ──▶ filter ──▶ gate ──▶ entering ──KVM_RUN──▶ guest ──exit──▶ serving ──▶ entering …
//!                          │         │                                     │
//!                          └─ shut ──┴───────── Shared::is_ending ─────────┴──▶ parked
//! ```
//!
//! A parked thread stays until the process ends, which is soon: the end of a thread takes system calls that its filter
//! would have to allow all the time.
//!
//! To stop one, another thread sets `immediate_exit` in its `kvm_run` and then signals it. Either order of events ends
//! KVM_RUN: outside of it the flag makes the next one return at once, inside of it the signal does.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU8, Ordering};

use kvm_ioctls::{VcpuExit, VcpuFd};
use shoal_seccomp::{Mode, ThreadKind};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::bus::Bus;
use crate::gate::Gate;
use crate::harden;
use crate::protocol::{ExitReason, Step};
use crate::shared::Shared;

/// A vCPU's thread. It lives as long as the process, and the vCPU with it.
pub struct VcpuThread {
    process: libc::pid_t,
    /// Zero until it has begun.
    thread: Arc<AtomicI32>,
    immediate_exit: *mut u8,
}

// SAFETY: the pointer is only used to store one byte, atomically, into a page that lives as long as the process.
unsafe impl Send for VcpuThread {}

extern "C" fn kicked(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Installs the handler of the signal that interrupts KVM_RUN. Once per process.
///
/// # Errors
/// When the kernel refuses the handler.
pub fn install_kick_handler() -> io::Result<()> {
    register_signal_handler(SIGRTMIN(), kicked).map_err(|e| io::Error::from_raw_os_error(e.errno()))
}

impl VcpuThread {
    /// Starts the thread of vCPU `index`: it puts itself under its filter, waits at the gate, and runs the guest.
    ///
    /// # Errors
    /// When no thread can be made; it will not arrive at the gate then.
    pub fn spawn(
        index: u8,
        mut vcpu: VcpuFd,
        bus: Arc<Bus>,
        shared: Arc<Shared>,
        gate: Arc<Gate>,
        seccomp: Mode,
    ) -> io::Result<Self> {
        let immediate_exit = &raw mut vcpu.get_kvm_run().immediate_exit;
        let thread = Arc::new(AtomicI32::new(0));
        let id = thread.clone();
        std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .spawn(move || {
                // SAFETY: takes nothing and cannot fail.
                id.store(unsafe { libc::gettid() }, Ordering::Release);
                let confined = harden::thread(ThreadKind::Vcpu, seccomp);
                if gate.arrive(confined, || shared.stamp(Step::FirstInstruction)) {
                    run(&mut vcpu, &bus, &shared);
                }
                gate.leave();
                loop {
                    std::thread::park();
                }
            })?;
        Ok(Self {
            // SAFETY: takes nothing and cannot fail.
            process: unsafe { libc::getpid() },
            thread,
            immediate_exit,
        })
    }

    /// Makes the thread leave the guest soon. It leaves the gate within one exit of the guest, once the machine is
    /// ending.
    pub fn kick(&self) {
        // SAFETY: the page is mapped as long as the process lives. The kernel and this thread are the only ones to
        // touch the byte.
        unsafe { AtomicU8::from_ptr(self.immediate_exit) }.store(1, Ordering::SeqCst);
        let thread = self.thread.load(Ordering::Acquire);
        if thread != 0 {
            // SAFETY: numbers only. The system call itself, since pthread_kill needs three more.
            unsafe { libc::syscall(libc::SYS_tgkill, self.process, thread, SIGRTMIN()) };
        }
    }
}

/// Runs the guest until it ends or the machine is ending.
fn run(vcpu: &mut VcpuFd, bus: &Bus, shared: &Shared) {
    while !shared.is_ending() {
        let ended = match vcpu.run() {
            Ok(VcpuExit::MmioWrite(address, data)) => bus.mmio_write(address, data),
            Ok(VcpuExit::MmioRead(address, data)) => bus.mmio_read(address, data),
            Ok(VcpuExit::IoOut(port, data)) => bus.port_write(port, data),
            Ok(VcpuExit::IoIn(port, data)) => bus.port_read(port, data),
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt) => None,
            Ok(VcpuExit::Shutdown) => Some(ExitReason::TripleFault),
            Ok(VcpuExit::SystemEvent(kind, _)) => Some(system_event(kind)),
            Ok(VcpuExit::InternalError) => Some(internal_error(vcpu)),
            Ok(VcpuExit::FailEntry(reason, cpu)) => Some(kvm_error(format!(
                "entering the guest failed: hardware reason {reason:#x} on cpu {cpu}"
            ))),
            Ok(other) => Some(kvm_error(format!(
                "KVM gave an exit that this VMM does not know: {other:?}"
            ))),
            // A signal, or a vCPU that has not been started by another one.
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => None,
            Err(e) => Some(kvm_error(format!("KVM_RUN failed: {e}"))),
        };
        if let Some(reason) = ended {
            shared.end(reason);
        }
    }
}

fn kvm_error(detail: String) -> ExitReason {
    ExitReason::KvmError { detail }
}

/// KVM_EXIT_SYSTEM_EVENT (KVM API §5).
fn system_event(kind: u32) -> ExitReason {
    match kind {
        kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN => ExitReason::PowerOff,
        kvm_bindings::KVM_SYSTEM_EVENT_RESET => ExitReason::Reset,
        kvm_bindings::KVM_SYSTEM_EVENT_CRASH => ExitReason::TripleFault,
        other => kvm_error(format!("system event {other}")),
    }
}

/// What KVM_EXIT_INTERNAL_ERROR means, with the instruction that could not be emulated when KVM tells it.
fn internal_error(vcpu: &mut VcpuFd) -> ExitReason {
    // SAFETY: KVM fills `internal` on KVM_EXIT_INTERNAL_ERROR, which was the exit just taken; all bit patterns of its
    // integers are valid.
    let (suberror, ndata, data) = unsafe {
        let i = &vcpu.get_kvm_run().__bindgen_anon_1.internal;
        (i.suberror, i.ndata, i.data)
    };
    let what = match suberror {
        1 => "an instruction could not be emulated",
        2 => "an exception came while another was delivered",
        3 => "the exit came while an event was delivered",
        4 => "an exit with an unexpected reason",
        _ => "no further explanation",
    };
    let rip = vcpu
        .get_regs()
        .map_or_else(|_| "unknown".into(), |r| format!("{:#x}", r.rip));
    let mut detail = format!("KVM internal error {suberror} ({what}) at rip {rip}");
    if suberror == 1 && ndata >= 4 && data[0] & 1 != 0 {
        // KVM API: data[0] flags, then one byte of length and 15 of instruction.
        let bytes: Vec<u8> = data[1..4].iter().flat_map(|d| d.to_le_bytes()).collect();
        let len = usize::from(bytes[0]).min(15);
        detail.push_str(&format!(", instruction bytes {:02x?}", &bytes[1..=len]));
    }
    kvm_error(detail)
}
