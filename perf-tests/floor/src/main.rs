//! The floor under every start-up figure: the fewest raw KVM calls that bring a bare-metal guest to its first output,
//! with nothing of a VMM around them. One vCPU, 128 MiB, an interrupt controller, the 64-bit entry; the guest writes
//! one byte to COM1, which goes to standard output, and halts.
//!
//! Figures of `shoal-vmm` are given as a ratio to this program's, taken in turns in one run.

use std::ffi::c_ulong;
use std::io;

const MEMORY: usize = 128 << 20;
const ENTRY: u64 = 0x100_0000;
const PAGE_TABLES: u64 = 0x9000;

// ioctl numbers and structures of the KVM API (linux/kvm.h).
const KVM_CREATE_VM: c_ulong = 0xae01;
const KVM_GET_VCPU_MMAP_SIZE: c_ulong = 0xae04;
const KVM_CREATE_VCPU: c_ulong = 0xae41;
const KVM_SET_TSS_ADDR: c_ulong = 0xae47;
const KVM_CREATE_IRQCHIP: c_ulong = 0xae60;
const KVM_RUN: c_ulong = 0xae80;
const KVM_GET_SUPPORTED_CPUID: c_ulong = 0xc008_ae05;
const KVM_SET_USER_MEMORY_REGION: c_ulong = 0x4020_ae46;
const KVM_SET_REGS: c_ulong = 0x4090_ae82;
const KVM_GET_SREGS: c_ulong = 0x8138_ae83;
const KVM_SET_SREGS: c_ulong = 0x4138_ae84;
const KVM_SET_CPUID2: c_ulong = 0x4008_ae90;

/// What the guest executes: `mov dx, 0x3f8; mov al, 'R'; out dx, al; hlt`.
const GUEST: [u8; 8] = [0x66, 0xba, 0xf8, 0x03, 0xb0, b'R', 0xee, 0xf4];

#[repr(C)]
struct CpuidTable {
    header: kvm_bindings::kvm_cpuid2,
    entries: [kvm_bindings::kvm_cpuid_entry2; 256],
}

fn ioctl(fd: i32, request: c_ulong, argument: usize) -> io::Result<i32> {
    // SAFETY: every caller passes an integer or the address of a live structure of the request's type.
    let r = unsafe { libc::ioctl(fd, request as _, argument) };
    if r < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(r)
    }
}

fn map(len: usize, flags: i32, fd: i32) -> io::Result<*mut u8> {
    // SAFETY: a new mapping at an address of the kernel's choice.
    let p = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
            fd,
            0,
        )
    };
    if p == libc::MAP_FAILED {
        Err(io::Error::last_os_error())
    } else {
        Ok(p.cast())
    }
}

fn main() -> io::Result<()> {
    // SAFETY: the path is a C string.
    let kvm = unsafe { libc::open(c"/dev/kvm".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
    if kvm < 0 {
        return Err(io::Error::last_os_error());
    }
    let vm = ioctl(kvm, KVM_CREATE_VM, 0)?;
    let memory = map(
        MEMORY,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        -1,
    )?;
    let region = kvm_bindings::kvm_userspace_memory_region {
        memory_size: MEMORY as u64,
        userspace_addr: memory as u64,
        ..Default::default()
    };
    ioctl(vm, KVM_SET_USER_MEMORY_REGION, &raw const region as usize)?;
    ioctl(vm, KVM_SET_TSS_ADDR, 0xfffb_d000)?;
    ioctl(vm, KVM_CREATE_IRQCHIP, 0)?;
    let vcpu = ioctl(vm, KVM_CREATE_VCPU, 0)?;
    let mut cpuid = CpuidTable {
        header: Default::default(),
        entries: [Default::default(); 256],
    };
    cpuid.header.nent = 256;
    ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &raw mut cpuid as usize)?;
    ioctl(vcpu, KVM_SET_CPUID2, &raw const cpuid as usize)?;
    set_registers(vcpu, memory)?;
    run(kvm, vcpu)
}

fn set_registers(vcpu: i32, memory: *mut u8) -> io::Result<()> {
    let put = |at: u64, bytes: &[u8]| {
        // SAFETY: all addresses are constants inside of the guest's 128 MiB; the vCPU does not run yet.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), memory.add(at as usize), bytes.len()) }
    };
    put(PAGE_TABLES, &(PAGE_TABLES + 0x1003).to_le_bytes());
    put(PAGE_TABLES + 0x1000, &(PAGE_TABLES + 0x2003).to_le_bytes());
    for i in 0..512_u64 {
        put(PAGE_TABLES + 0x2000 + i * 8, &(i << 21 | 0x83).to_le_bytes());
    }
    put(ENTRY, &GUEST);
    let mut s = kvm_bindings::kvm_sregs::default();
    ioctl(vcpu, KVM_GET_SREGS, &raw mut s as usize)?;
    (s.cr3, s.cr4, s.cr0, s.efer) = (PAGE_TABLES, 0x20, 0x8000_0031, 0x500);
    let code = kvm_bindings::kvm_segment {
        limit: u32::MAX,
        selector: 0x10,
        type_: 11,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_bindings::kvm_segment {
        selector: 0x18,
        type_: 3,
        l: 0,
        db: 1,
        ..code
    };
    s.cs = code;
    (s.ds, s.es, s.fs, s.gs, s.ss) = (data, data, data, data, data);
    ioctl(vcpu, KVM_SET_SREGS, &raw const s as usize)?;
    let regs = kvm_bindings::kvm_regs {
        rip: ENTRY,
        rflags: 2,
        ..Default::default()
    };
    ioctl(vcpu, KVM_SET_REGS, &raw const regs as usize).map(drop)
}

fn run(kvm: i32, vcpu: i32) -> io::Result<()> {
    let len = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0)? as usize;
    let shared = map(len, libc::MAP_SHARED, vcpu)?;
    loop {
        ioctl(vcpu, KVM_RUN, 0)?;
        // SAFETY: the mapping begins with the vCPU's kvm_run, which KVM filled; `io` is valid on KVM_EXIT_IO, and its
        // data lies `data_offset` bytes into the mapping.
        unsafe {
            let run = &*shared.cast::<kvm_bindings::kvm_run>();
            let io = run.__bindgen_anon_1.io;
            if run.exit_reason != kvm_bindings::KVM_EXIT_IO || io.port != 0x3f8 {
                return Err(io::Error::other(format!("unexpected exit {}", run.exit_reason)));
            }
            libc::write(1, shared.add(io.data_offset as usize).cast(), 1);
        }
    }
}
