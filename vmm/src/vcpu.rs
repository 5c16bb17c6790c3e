//! A vCPU and its thread.
//!
//! ```text
//!   spawn ──▶ entering ──KVM_RUN──▶ guest ──exit──▶ serving ──▶ entering …
//!                │                                     │
//!                └────────── Shared::is_ending ────────┴──▶ thread ends, gives the vCPU back
//! ```
//!
//! To stop one, another thread sets `immediate_exit` in its `kvm_run` and then signals it. Either order of events ends
//! KVM_RUN: outside of it the flag makes the next one return at once, inside of it the signal does.

use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::thread::JoinHandle;

use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::bus::Bus;
use crate::protocol::{ExitReason, Step};
use crate::shared::Shared;

/// A running vCPU thread.
pub struct VcpuThread {
    /// Ends with the vCPU itself, so that `immediate_exit` stays mapped until the thread has been joined.
    thread: JoinHandle<VcpuFd>,
    immediate_exit: *mut u8,
}

// SAFETY: the pointer is only used to store one byte, atomically, into a page that lives as long as `thread`'s vCPU.
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
    /// Starts the thread of vCPU `index`.
    ///
    /// # Errors
    /// When no thread can be made.
    pub fn spawn(index: u8, mut vcpu: VcpuFd, bus: Arc<Bus>, shared: Arc<Shared>) -> io::Result<Self> {
        let immediate_exit = &raw mut vcpu.get_kvm_run().immediate_exit;
        shared.vcpu_starts();
        let of_thread = shared.clone();
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .spawn(move || {
                if index == 0 {
                    of_thread.stamp(Step::FirstInstruction);
                }
                run(&mut vcpu, &bus, &of_thread);
                of_thread.vcpu_ended();
                vcpu
            });
        let thread = thread.inspect_err(|_| shared.vcpu_ended())?;
        Ok(Self {
            thread,
            immediate_exit,
        })
    }

    /// Makes the thread leave the guest soon.
    pub fn kick(&self) {
        // SAFETY: the page is mapped until the thread is joined, which takes `self`. The kernel and this thread are
        // the only ones to touch the byte.
        unsafe { std::sync::atomic::AtomicU8::from_ptr(self.immediate_exit) }
            .store(1, std::sync::atomic::Ordering::SeqCst);
        // SAFETY: the thread has not been joined, so its id is valid even if it has ended.
        unsafe { libc::pthread_kill(self.thread.as_pthread_t(), SIGRTMIN()) };
    }

    /// Waits for the thread's end. It comes within one exit of the guest, once the machine is ending and it is kicked.
    pub fn join(self) {
        // Panics abort the process, so there is no error to see here.
        let _ = self.thread.join();
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
