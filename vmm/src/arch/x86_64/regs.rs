//! The boot vCPU's registers, for either way into a kernel.

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use super::layout::{BOOT_PARAMS, BOOT_STACK, GDT, PAGE, PAGE_TABLES, PVH_INFO};
use crate::protocol::{KernelEntry, KernelLayout};
use shoal_devices::GuestMemory;

/// A vCPU could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum RegsError {
    /// KVM refused.
    #[error("{0} of the boot vCPU failed")]
    Kvm(&'static str, #[source] kvm_ioctls::Error),
    /// More MSRs than one call takes.
    #[error("the boot vCPU's MSRs do not fit one call")]
    TooManyMsrs,
    /// Tables could not be written into guest memory.
    #[error("writing the boot vCPU's tables into guest memory failed")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const PRESENT_WRITABLE: u64 = 0x3;
const LARGE_PAGE: u64 = 1 << 7;
const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, default type write-back: without them Linux takes all RAM for uncached.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;
const BOOT_TR: u16 = 0x20;

/// Sets registers and MSRs of the boot vCPU; the others wait for their start-up message.
///
/// # Errors
/// When KVM refuses a value or guest memory cannot be written.
pub fn set_up(vcpu: &VcpuFd, memory: &GuestMemory, kernel: &KernelLayout) -> Result<(), RegsError> {
    let mut sregs = vcpu
        .get_sregs()
        .map_err(|e| RegsError::Kvm("reading the system registers", e))?;
    let regs = match kernel.entry {
        KernelEntry::Pvh { entry } => {
            pvh_sregs(&mut sregs);
            kvm_regs {
                rip: entry.into(),
                rbx: PVH_INFO,
                rflags: 2,
                ..Default::default()
            }
        }
        KernelEntry::Linux64 { entry } => {
            long_mode_sregs(&mut sregs, memory, kernel.end)?;
            kvm_regs {
                rip: entry,
                rsi: BOOT_PARAMS,
                rsp: BOOT_STACK,
                rbp: BOOT_STACK,
                rflags: 2,
                ..Default::default()
            }
        }
    };
    vcpu.set_sregs(&sregs)
        .map_err(|e| RegsError::Kvm("setting the system registers", e))?;
    vcpu.set_regs(&regs)
        .map_err(|e| RegsError::Kvm("setting the registers", e))?;
    set_msrs(vcpu)
}

fn set_msrs(vcpu: &VcpuFd) -> Result<(), RegsError> {
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let entries = [
        entry(MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        entry(MSR_MTRR_DEF_TYPE, MTRR_WRITE_BACK),
    ];
    let msrs = Msrs::from_entries(&entries).map_err(|_| RegsError::TooManyMsrs)?;
    // KVM sets as many as it knows and tells how many; both are optimisations that a KVM may lack.
    vcpu.set_msrs(&msrs)
        .map(drop)
        .map_err(|e| RegsError::Kvm("setting the MSRs", e))
}

fn segment(selector: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        s: 1,
        l: u8::from(long),
        db: u8::from(!long),
        g: 1,
        ..Default::default()
    }
}

fn set_segments(sregs: &mut kvm_sregs, long: bool) {
    sregs.cs = segment(BOOT_CS, 11, long);
    let data = segment(BOOT_DS, 3, false);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    // A busy 32-bit (in long mode: 64-bit) task segment, as VMX demands of every entry.
    sregs.tr = kvm_segment {
        limit: 0x67,
        s: 0,
        g: 0,
        db: 0,
        ..segment(BOOT_TR, 11, false)
    };
}

/// PVH (Xen's x86/HVM direct boot ABI): flat 32-bit protected mode, paging off. The kernel loads its own GDT.
fn pvh_sregs(sregs: &mut kvm_sregs) {
    set_segments(sregs, false);
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    sregs.efer = 0;
}

/// Linux boot protocol, 64-bit entry: long mode, as many GiB mapped one to one as reach the kernel's end, a GDT with
/// `__BOOT_CS` and `__BOOT_DS`.
fn long_mode_sregs(sregs: &mut kvm_sregs, memory: &GuestMemory, end: u64) -> Result<(), RegsError> {
    let gibs = end.div_ceil(1 << 30);
    let gdt: [u64; 5] = [
        0,
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x008f_8b00_0000_ffff,
    ];
    write_u64s(memory, GDT, gdt)?;
    let (pdpt, directories) = (PAGE_TABLES + PAGE, PAGE_TABLES + 2 * PAGE);
    write_u64s(memory, PAGE_TABLES, [pdpt | PRESENT_WRITABLE])?;
    write_u64s(
        memory,
        pdpt,
        (0..gibs).map(|g| (directories + g * PAGE) | PRESENT_WRITABLE),
    )?;
    write_u64s(
        memory,
        directories,
        (0..gibs * 512).map(|i| i << 21 | LARGE_PAGE | PRESENT_WRITABLE),
    )?;
    set_segments(sregs, true);
    sregs.gdt.base = GDT;
    sregs.gdt.limit = (size_of_val(&gdt) - 1) as u16;
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 = CR4_PAE;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.efer = EFER_LME | EFER_LMA;
    Ok(())
}

fn write_u64s(memory: &GuestMemory, at: u64, values: impl IntoIterator<Item = u64>) -> Result<(), RegsError> {
    let bytes: Vec<u8> = values.into_iter().flat_map(u64::to_le_bytes).collect();
    Ok(memory.write_slice(&bytes, GuestAddress(at))?)
}
