//! Builds a machine and runs it.
//!
//! Order matters for speed (KVM waits for a grace period when a memory slot is set soon after the irqchip): VM, **all**
//! memory slots, irqchip, PIT, vCPUs, devices, boot tables. A machine is always built paused; [`Machine::run`] starts
//! the vCPU threads.

use std::fs::File;
use std::io;
use std::os::fd::{IntoRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use shoal_devices::GuestMemory;
use shoal_devices::event::LoopHandle;
use shoal_devices::legacy::serial::Serial;
use shoal_devices::spec::{BuildEnv, BuildError as DeviceError};
use shoal_devices::virtio::mmio::{MmioParts, MmioTransport, NOTIFY_OFFSET};
use shoal_seccomp::{InstallError, Mode, ThreadKind};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::arch::x86_64::layout::{
    GED_GSI, KVM_IDENTITY_MAP, KVM_TSS, SERIAL_GSI, VIRTIO_GSIS, VIRTIO_MMIO, VIRTIO_MMIO_STRIDE,
};
use crate::arch::x86_64::{boot, cpuid, regs};
use crate::bus::{Bus, Window};
use crate::config::ValidConfig;
use crate::console;
use crate::gate::Gate;
use crate::harden;
use crate::memory::{self, MemoryError};
use crate::protocol::{KernelRange, PhysRange, Step};
use crate::shared::Shared;
use crate::vcpu::{self, VcpuThread};

/// A machine could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// KVM refused.
    #[error("{what} failed")]
    Kvm {
        /// What was asked of KVM.
        what: &'static str,
        /// Why it refused.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The host's KVM lacks something.
    #[error("this host's KVM lacks {0}")]
    Missing(&'static str),
    /// The guest's memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Tables could not be written.
    #[error("writing boot tables into guest memory failed")]
    Boot(#[from] vm_memory::GuestMemoryError),
    /// The boot vCPU.
    #[error(transparent)]
    Regs(#[from] regs::RegsError),
    /// A device.
    #[error("devices[{index}]")]
    Device {
        /// Its position in the configuration.
        index: usize,
        /// Why.
        #[source]
        source: DeviceError,
    },
    /// A descriptor of the configuration.
    #[error(transparent)]
    Descriptor(#[from] DeviceError),
    /// An eventfd or a thread could not be made.
    #[error("{what} failed")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A thread has no filter, so no guest may run.
    #[error("confining the VMM's threads failed")]
    Confine(#[from] InstallError),
}

impl BuildError {
    /// The part of the configuration that is to blame, if one is.
    pub fn field(&self) -> Option<String> {
        match self {
            Self::Device { index, .. } => Some(format!("devices[{index}]")),
            Self::Memory(MemoryError::Map(..)) => Some("memory.bytes".into()),
            _ => None,
        }
    }
}

fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> BuildError {
    move |source| BuildError::Kvm { what, source }
}

fn io(what: &'static str) -> impl FnOnce(io::Error) -> BuildError {
    move |source| BuildError::Io { what, source }
}

/// A built machine, not running yet.
pub struct Machine {
    bus: Arc<Bus>,
    vcpus: Vec<VcpuFd>,
    shared: Arc<Shared>,
    rest: Rest,
}

/// What must live as long as the machine and is not touched while it runs.
struct Rest {
    _vm: VmFd,
    _memory: GuestMemory,
    power_button: EventFd,
}

impl Machine {
    /// Builds everything.
    ///
    /// # Errors
    /// The first step that failed; whatever was built before it is released.
    pub fn build(
        valid: &ValidConfig,
        mut env: BuildEnv,
        shared: Arc<Shared>,
        event_loop: &LoopHandle,
    ) -> Result<Self, BuildError> {
        let config = &valid.config;
        let kvm_fd = open_kvm(env.take(config.kvm)?)?;
        let memory = memory::create(&config.memory)?;
        let images = Images::take(valid, &mut env)?;
        let (vm, vcpus) = images.place_while(&memory, || {
            let vm = create_vm(&kvm_fd, &memory)?;
            shared.stamp(Step::VmCreated);
            let vcpus = create_vcpus(&kvm_fd, &vm, config.vcpus)?;
            shared.stamp(Step::VcpusCreated);
            Ok((vm, vcpus))
        })?;
        shared.stamp(Step::MemoryMapped);

        let serial = build_serial(&vm, valid, &mut env, &shared)?;
        let power_button = EventFd::new(EFD_NONBLOCK).map_err(io("making the power button's eventfd"))?;
        vm.register_irqfd(&power_button, GED_GSI)
            .map_err(kvm("wiring the power button's interrupt"))?;
        let windows = build_devices(&vm, valid, &mut env, &memory, &shared, event_loop)?;
        shared.stamp(Step::DevicesCreated);

        boot::write(&memory, valid)?;
        regs::set_up(&vcpus[0], &memory, &config.kernel.layout)?;
        shared.stamp(Step::BootConfigured);
        let bus = Arc::new(Bus::new(serial, windows, shared.clone()));
        Ok(Self {
            bus,
            vcpus,
            shared,
            rest: Rest {
                _vm: vm,
                _memory: memory,
                power_button,
            },
        })
    }

    /// Starts the vCPUs, once each of them and the calling thread, which is the event loop's (of `kind`), are under their
    /// filters.
    ///
    /// # Errors
    /// When a thread cannot be made or confined; no vCPU has entered the guest then.
    pub fn run(self, kind: ThreadKind, seccomp: Mode) -> Result<Running, BuildError> {
        let Self {
            bus,
            vcpus,
            shared,
            rest,
        } = self;
        vcpu::install_kick_handler().map_err(io("installing the vCPUs' signal handler"))?;
        let gate = Arc::new(Gate::new(vcpus.len() + 1));
        let mut running = Running {
            bus,
            shared,
            rest,
            threads: Vec::new(),
            gate,
        };
        for (index, vcpu) in vcpus.into_iter().enumerate() {
            let (bus, shared, gate) = (running.bus.clone(), running.shared.clone(), running.gate.clone());
            let thread = VcpuThread::spawn(index as u8, vcpu, bus, shared, gate, seccomp);
            let thread = thread.inspect_err(|_| running.gate.shut());
            running
                .threads
                .push(thread.map_err(io("starting a vCPU's thread"))?);
        }
        let confined = harden::thread(kind, seccomp);
        let opening = || running.shared.stamp(Step::FirstInstruction);
        running.gate.arrive(confined, opening);
        running.gate.leave();
        match running.gate.take_failure() {
            None => Ok(running),
            Some(error) => Err(error.into()),
        }
    }
}

/// A machine whose vCPUs run.
pub struct Running {
    bus: Arc<Bus>,
    shared: Arc<Shared>,
    rest: Rest,
    threads: Vec<VcpuThread>,
    gate: Arc<Gate>,
}

impl Running {
    /// What the threads share.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Presses the ACPI power button.
    ///
    /// # Errors
    /// When the interrupt cannot be raised.
    pub fn press_power_button(&self) -> io::Result<()> {
        self.rest.power_button.write(1)
    }

    /// Types into the serial console; returns how many bytes it took.
    pub fn type_in(&self, bytes: &[u8]) -> usize {
        self.serial().enqueue_input(bytes)
    }

    /// A descriptor that is readable when [`Running::flush_console`] is due. It lives as long as the machine.
    pub fn console_timer(&self) -> RawFd {
        self.serial().flush_timer()
    }

    /// Writes out what the serial console still holds back.
    pub fn flush_console(&self) {
        self.serial().flush();
    }

    fn serial(&self) -> std::sync::MutexGuard<'_, Serial> {
        self.bus
            .serial
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Stops the vCPUs for good. [`Shared::end`] must have been called. A vCPU may be waiting for the event loop to stop
    /// a device's handler: `serve` is called until all threads have left the guest, and must serve the loop once.
    pub fn stop_vcpus(&mut self, mut serve: impl FnMut()) {
        debug_assert!(self.shared.is_ending());
        self.threads.iter().for_each(VcpuThread::kick);
        while self.shared.vcpus_running() > 0 {
            serve();
        }
        self.gate.wait_empty();
    }
}

fn open_kvm(fd: OwnedFd) -> Result<Kvm, BuildError> {
    use std::os::fd::FromRawFd;
    // SAFETY: the descriptor is owned and given up here; `Kvm` closes it.
    let kvm = unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) };
    match kvm.get_api_version() {
        12 => Ok(kvm),
        _ => Err(BuildError::Missing(
            "API version 12 (is the descriptor /dev/kvm?)",
        )),
    }
}

/// What comes into the guest's memory from files.
struct Images<'a> {
    kernel: File,
    ranges: &'a [KernelRange],
    /// The initial RAM disk, and where it goes.
    initrd: Option<(File, PhysRange)>,
}

/// Less than this (bytes) is copied sooner than a thread is made.
const WORTH_A_THREAD: u64 = 256 << 10;

impl<'a> Images<'a> {
    fn take(valid: &'a ValidConfig, env: &mut BuildEnv) -> Result<Self, BuildError> {
        let kernel = File::from(env.take(valid.config.kernel.fd)?);
        let initrd = match (&valid.config.initrd, valid.initrd_at) {
            (Some(initrd), Some(start)) => {
                let len = initrd.len;
                Some((File::from(env.take(initrd.fd)?), PhysRange { start, len }))
            }
            _ => None,
        };
        Ok(Self {
            kernel,
            ranges: &valid.config.kernel.layout.ranges,
            initrd,
        })
    }

    /// Places the images and does `work`, side by side when there is much to copy: KVM_CREATE_VM sleeps for most of the
    /// time that it takes.
    fn place_while<T>(
        self,
        memory: &GuestMemory,
        work: impl FnOnce() -> Result<T, BuildError>,
    ) -> Result<T, BuildError> {
        let copied: u64 = self.ranges.iter().filter(|r| r.copied).map(|r| r.range.len).sum();
        let initrd = self.initrd.as_ref().map_or(0, |(_, range)| range.len);
        if copied + initrd < WORTH_A_THREAD {
            self.place(memory)?;
            return work();
        }
        std::thread::scope(|scope| {
            let placing = std::thread::Builder::new().name("images".into());
            let placing = placing
                .spawn_scoped(scope, || self.place(memory))
                .map_err(io("starting the thread that places the kernel"))?;
            let done = work()?;
            match placing.join() {
                Ok(placed) => placed.map(|()| done).map_err(BuildError::from),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    fn place(&self, memory: &GuestMemory) -> Result<(), MemoryError> {
        for KernelRange { range, copied } in self.ranges {
            match copied {
                true => memory::copy_file(memory, "the kernel", &self.kernel, range.start, *range)?,
                false => memory::map_file(memory, "the kernel", &self.kernel, *range)?,
            }
        }
        // Copied, not mapped: the guest's kernel unpacks it, overwrites all of it and frees it, so that every mapped page
        // would be copied all the same, one page fault at a time (in the lab 8 ms for 2 MiB).
        match &self.initrd {
            Some((file, range)) => memory::copy_file(memory, "the initial RAM disk", file, 0, *range),
            None => Ok(()),
        }
    }
}

fn create_vm(kvm_fd: &Kvm, memory: &GuestMemory) -> Result<VmFd, BuildError> {
    let vm = kvm_fd.create_vm().map_err(kvm("creating the VM"))?;
    for (slot, region) in memory.iter().enumerate() {
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the region is mapped and stays so while the VM lives: `Rest` keeps both, the VM dropped first.
        unsafe { vm.set_user_memory_region(region) }.map_err(kvm("setting a memory slot"))?;
    }
    vm.set_identity_map_address(KVM_IDENTITY_MAP)
        .map_err(kvm("placing the identity map page"))?;
    vm.set_tss_address(KVM_TSS as usize)
        .map_err(kvm("placing the TSS pages"))?;
    vm.create_irq_chip()
        .map_err(kvm("creating the interrupt controllers"))?;
    let pit = kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    };
    vm.create_pit2(pit).map_err(kvm("creating the interval timer"))?;
    Ok(vm)
}

fn create_vcpus(kvm_fd: &Kvm, vm: &VmFd, count: u8) -> Result<Vec<VcpuFd>, BuildError> {
    let supported: CpuId = kvm_fd
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(kvm("asking for the supported CPUID"))?;
    let mut cpuid = cpuid::common(&supported, count, vm.check_extension(Cap::TscDeadlineTimer));
    (0..count)
        .map(|id| {
            let vcpu = vm.create_vcpu(id.into()).map_err(kvm("creating a vCPU"))?;
            cpuid::set_apic_id(&mut cpuid, id);
            vcpu.set_cpuid2(&cpuid).map_err(kvm("setting a vCPU's CPUID"))?;
            Ok(vcpu)
        })
        .collect()
}

fn build_serial(
    vm: &VmFd,
    valid: &ValidConfig,
    env: &mut BuildEnv,
    shared: &Arc<Shared>,
) -> Result<Serial, BuildError> {
    let irq = EventFd::new(EFD_NONBLOCK).map_err(io("making the serial port's eventfd"))?;
    vm.register_irqfd(&irq, SERIAL_GSI)
        .map_err(kvm("wiring the serial port's interrupt"))?;
    let sink = console::sink(valid.config.console, env, shared.clone())?;
    Serial::new(Arc::new(irq), sink).map_err(io("making the serial port's timer"))
}

fn build_devices(
    vm: &VmFd,
    valid: &ValidConfig,
    env: &mut BuildEnv,
    memory: &GuestMemory,
    shared: &Arc<Shared>,
    event_loop: &LoopHandle,
) -> Result<Vec<Window>, BuildError> {
    let build = |(index, spec): (usize, &shoal_devices::spec::AnyDeviceSpec)| {
        let device = spec
            .build(env, None)
            .map_err(|source| BuildError::Device { index, source })?;
        let irq = EventFd::new(EFD_NONBLOCK).map_err(io("making a device's eventfd"))?;
        vm.register_irqfd(&irq, VIRTIO_GSIS[index])
            .map_err(kvm("wiring a device's interrupt"))?;
        let log = shared.clone();
        let transport = MmioTransport::new(MmioParts {
            device,
            memory: memory.clone(),
            irq: Arc::new(irq),
            event_loop: event_loop.clone(),
            log: Arc::new(move |line: &str| log.log(&format!("devices[{index}] {line}"))),
        })
        .map_err(io("making a device's eventfds"))?;
        let base = VIRTIO_MMIO + index as u64 * VIRTIO_MMIO_STRIDE;
        for (queue, notify) in transport.notify_fds().iter().enumerate() {
            vm.register_ioevent(notify, &IoEventAddress::Mmio(base + NOTIFY_OFFSET), queue as u32)
                .map_err(kvm("wiring a device's notification"))?;
        }
        Ok(Window::new(transport))
    };
    valid.config.devices.iter().enumerate().map(build).collect()
}
