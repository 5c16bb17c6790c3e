//! A machine of raw KVM for the guests.
//!
//! Both entries are set up as the specifications say (PVH: 32-bit protected mode, paging off, %ebx; Linux: long mode,
//! one-to-one tables, %rsi), so the guests are tested apart from Shoal's own VMM.

#![allow(dead_code)] // each of the tests uses a part

use kvm_bindings::{kvm_pit_config, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use shoal_probe as probe;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

const MEMORY: usize = 32 << 20;
const START_INFO: u64 = 0x1000;
const BOOT_PARAMS: u64 = 0x2000;
const CMDLINE: u64 = 0x4000;
const TABLES: u64 = 0x9000;
/// Seconds after which a guest that neither exits nor ends is called stuck.
const MAX_SECONDS: i64 = 20;
/// Exits after which a guest that has not ended is called stuck.
const MAX_EXITS: usize = 2_000_000;

/// How a run ended.
#[derive(Debug, PartialEq)]
pub enum End {
    Reset,
    PowerOff,
    Shutdown,
    Internal,
}

pub struct Run {
    pub output: String,
    pub end: End,
    pub marks: Vec<u8>,
    pub mmio_writes: usize,
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Entry {
    Pvh,
    Long,
}

/// `/dev/kvm`, or the end of the test, said aloud.
pub fn kvm() -> Option<Kvm> {
    match Kvm::new() {
        Ok(kvm) => Some(kvm),
        Err(e) => {
            eprintln!("SKIPPED: cannot open /dev/kvm: {e}");
            None
        }
    }
}

fn word(elf: &[u8], at: usize, bytes: usize) -> u64 {
    let mut value = [0; 8];
    value[..bytes].copy_from_slice(&elf[at..at + bytes]);
    u64::from_le_bytes(value)
}

/// Copies PT_LOAD into memory; gives the entry of the ELF header and that of the PVH note.
fn load(memory: &GuestMemoryMmap, elf: &[u8]) -> (u64, Option<u64>) {
    let headers = word(elf, 32, 8) as usize;
    let mut pvh = None;
    for i in 0..word(elf, 56, 2) as usize {
        let h = headers + 56 * i;
        let (offset, size) = (word(elf, h + 8, 8) as usize, word(elf, h + 32, 8) as usize);
        let bytes = &elf[offset..offset + size];
        match word(elf, h, 4) {
            1 => memory
                .write_slice(bytes, GuestAddress(word(elf, h + 24, 8)))
                .unwrap(),
            4 => {
                assert_eq!(bytes[..12], [4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0], "a PVH note");
                assert_eq!(&bytes[12..16], b"Xen\0");
                pvh = Some(word(bytes, 16, 4));
            }
            _ => {}
        }
    }
    (word(elf, 24, 8), pvh)
}

fn segment(selector: u16, type_: u8, l: u8, db: u8) -> kvm_segment {
    kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db,
        s: 1,
        l,
        g: 1,
        ..Default::default()
    }
}

fn enter(vcpu: &VcpuFd, memory: &GuestMemoryMmap, entry: Entry, rip: u64) {
    let mut sregs = vcpu.get_sregs().unwrap();
    let mut regs = kvm_bindings::kvm_regs {
        rip,
        rflags: 2,
        ..Default::default()
    };
    let data = segment(0x18, 3, 0, 1);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    match entry {
        Entry::Pvh => {
            sregs.cs = segment(0x10, 11, 0, 1);
            (sregs.cr0, sregs.cr4, sregs.efer) = (0x11, 0, 0);
            regs.rbx = START_INFO;
        }
        Entry::Long => {
            memory
                .write_obj((TABLES + 0x1000) | 3, GuestAddress(TABLES))
                .unwrap();
            memory
                .write_obj((TABLES + 0x2000) | 3, GuestAddress(TABLES + 0x1000))
                .unwrap();
            for i in 0..512u64 {
                memory
                    .write_obj((i << 21) | 0x83, GuestAddress(TABLES + 0x2000 + 8 * i))
                    .unwrap();
            }
            sregs.cs = segment(0x10, 11, 1, 0);
            (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8000_0011, TABLES, 0x20, 0x500);
            regs.rsi = BOOT_PARAMS;
        }
    }
    vcpu.set_sregs(&sregs).unwrap();
    vcpu.set_regs(&regs).unwrap();
}

fn machine(kvm: &Kvm, memory: &GuestMemoryMmap) -> (VmFd, VcpuFd) {
    let vm = kvm.create_vm().unwrap();
    let region = memory.iter().next().unwrap();
    let slot = kvm_userspace_memory_region {
        slot: 0,
        guest_phys_addr: region.start_addr().raw_value(),
        memory_size: region.len(),
        userspace_addr: memory.get_host_address(GuestAddress(0)).unwrap() as u64,
        flags: 0,
    };
    // SAFETY: the mapping is `memory`'s, which the callers keep until the VM is gone.
    unsafe { vm.set_user_memory_region(slot) }.unwrap();
    vm.set_tss_address(0xfffb_d000).unwrap();
    vm.create_irq_chip().unwrap();
    vm.create_pit2(kvm_pit_config::default()).unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(256).unwrap()).unwrap();
    (vm, vcpu)
}

extern "C" fn ignore(_signal: libc::c_int) {}

/// Sends this thread a signal after [`MAX_SECONDS`], so that KVM_RUN of a guest that never exits returns.
struct Alarm(libc::timer_t);

impl Alarm {
    fn set() -> Alarm {
        // SAFETY: all-zero is a valid value of these plain C structures, the handler does nothing, and every pointer is
        // to a live local.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = ignore as *const () as usize;
            assert_eq!(
                libc::sigaction(libc::SIGRTMIN(), &action, std::ptr::null_mut()),
                0
            );
            let mut event: libc::sigevent = std::mem::zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = libc::SIGRTMIN();
            event.sigev_notify_thread_id = libc::gettid();
            let mut timer = std::ptr::null_mut();
            assert_eq!(
                libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer),
                0
            );
            let mut when: libc::itimerspec = std::mem::zeroed();
            when.it_value.tv_sec = MAX_SECONDS;
            assert_eq!(libc::timer_settime(timer, 0, &when, std::ptr::null_mut()), 0);
            Alarm(timer)
        }
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        // SAFETY: the timer was made by `set` and is deleted once.
        unsafe { libc::timer_delete(self.0) };
    }
}

/// What answers to addresses without memory.
pub trait Mmio {
    /// The guest reads.
    fn read(&mut self, address: u64, data: &mut [u8]);
    /// The guest writes.
    fn write(&mut self, memory: &GuestMemoryMmap, address: u64, data: &[u8]);
}

/// Nothing there, and nobody may write outside of the windows.
struct Nothing;

impl Mmio for Nothing {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0x11);
    }

    fn write(&mut self, _: &GuestMemoryMmap, address: u64, _: &[u8]) {
        assert!((probe::MMIO_BASE..probe::MMIO_BASE + 32 * probe::MMIO_WINDOW).contains(&address));
    }
}

pub fn run(kvm: &Kvm, elf: &[u8], entry: Entry, cmdline: &str) -> Run {
    run_with(kvm, elf, entry, cmdline, &mut Nothing)
}

pub fn run_with(kvm: &Kvm, elf: &[u8], entry: Entry, cmdline: &str, mmio: &mut dyn Mmio) -> Run {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
    let (_vm, mut vcpu) = machine(kvm, &memory);
    let (long, pvh) = load(&memory, elf);
    memory
        .write_slice(cmdline.as_bytes(), GuestAddress(CMDLINE))
        .unwrap();
    memory
        .write_obj(0x336e_c578_u32, GuestAddress(START_INFO))
        .unwrap();
    memory.write_obj(CMDLINE, GuestAddress(START_INFO + 24)).unwrap();
    memory
        .write_obj(CMDLINE as u32, GuestAddress(BOOT_PARAMS + 0x228))
        .unwrap();
    let rip = if entry == Entry::Pvh {
        pvh.expect("a PVH note")
    } else {
        long
    };
    enter(&vcpu, &memory, entry, rip);

    let mut output = Vec::new();
    let (mut marks, mut mmio_writes) = (Vec::new(), 0);
    let mut input = b"echoed!".iter().copied();
    let mut end = None;
    let _alarm = Alarm::set();
    for _ in 0..MAX_EXITS {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(0x3f8, data)) => output.extend_from_slice(data),
            Ok(VcpuExit::IoIn(0x3fd, data)) => data.fill(0x61),
            Ok(VcpuExit::IoIn(0x3f8, data)) => data.fill(input.next().unwrap_or(b'.')),
            Ok(VcpuExit::IoOut(0x64, [0xfe])) => end = Some(End::Reset),
            Ok(VcpuExit::IoOut(port, data)) if port == probe::SLEEP_CONTROL_PORT => {
                assert_eq!(data, [probe::SLEEP_CONTROL_S5]);
                end = Some(End::PowerOff);
            }
            Ok(VcpuExit::IoOut(port, data)) if port == probe::MARK_PORT => marks.extend_from_slice(data),
            Ok(VcpuExit::MmioRead(address, data)) => mmio.read(address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => {
                mmio.write(&memory, address, data);
                mmio_writes += 1;
            }
            Ok(VcpuExit::IoOut(..) | VcpuExit::IoIn(..)) => {}
            Ok(VcpuExit::Shutdown) => end = Some(End::Shutdown),
            Ok(VcpuExit::InternalError) => end = Some(End::Internal),
            other => {
                let problem = format!("{other:?}");
                let registers = vcpu.get_regs();
                panic!(
                    "{problem} after {:?} with {registers:x?}",
                    String::from_utf8_lossy(&output)
                );
            }
        }
        if end.is_some() {
            break;
        }
    }
    let output = String::from_utf8_lossy(&output).into_owned();
    let end = end.unwrap_or_else(|| panic!("{cmdline}: no end after {MAX_EXITS} exits: {output:?}"));
    Run {
        output,
        end,
        marks,
        mmio_writes,
    }
}
