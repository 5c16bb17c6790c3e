//! What CPUID tells a guest: what KVM supports, with the topology of the guest's own vCPUs.
//!
//! Topology: one package, one thread per core, APIC id = vCPU index. Sources: Intel SDM vol. 2A (CPUID leaves 1, 4, 0xb,
//! 0x1f), AMD APM vol. 3 appendix E (0x8000_0001, 0x8000_0008, 0x8000_001d, 0x8000_001e).

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

const ECX_X2APIC: u32 = 1 << 21;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const ECX_VMX: u32 = 1 << 5;
const EDX_HTT: u32 = 1 << 28;
const AMD_ECX_CMP_LEGACY: u32 = 1 << 1;
const AMD_ECX_SVM: u32 = 1 << 2;

/// Number of bits that hold an APIC id of `vcpus` vCPUs.
fn id_bits(vcpus: u8) -> u32 {
    u8::BITS - (vcpus - 1).leading_zeros()
}

/// CPUID of the guest, as far as it is the same for all vCPUs. `tsc_deadline` says whether KVM has that timer mode.
pub fn common(supported: &CpuId, vcpus: u8, tsc_deadline: bool) -> CpuId {
    let mut cpuid = supported.clone();
    let n = u32::from(vcpus);
    cpuid.retain(|e| !matches!(e.function, 0xb | 0x1f));
    for e in cpuid.as_mut_slice() {
        match e.function {
            0x1 => {
                e.ebx = e.ebx & 0x0000_ffff | n.next_power_of_two() << 16;
                e.ecx = (e.ecx | ECX_X2APIC | ECX_HYPERVISOR) & !ECX_VMX;
                if tsc_deadline {
                    e.ecx |= ECX_TSC_DEADLINE;
                }
                e.edx = if n > 1 { e.edx | EDX_HTT } else { e.edx & !EDX_HTT };
            }
            // Caches: level 1 and 2 belong to one core, level 3 to the package.
            0x4 if e.eax & 0x1f != 0 => {
                let sharing = if e.eax >> 5 & 0x7 < 3 {
                    0
                } else {
                    n.next_power_of_two() - 1
                };
                e.eax = e.eax & 0x3fff | sharing << 14 | (n.next_power_of_two() - 1).min(63) << 26;
            }
            // No performance counters: they would tell one guest about another.
            0xa => (e.eax, e.ebx, e.ecx, e.edx) = (0, 0, 0, 0),
            0x8000_0001 => {
                e.ecx &= !AMD_ECX_SVM;
                e.ecx = if n > 1 {
                    e.ecx | AMD_ECX_CMP_LEGACY
                } else {
                    e.ecx & !AMD_ECX_CMP_LEGACY
                };
            }
            0x8000_0008 => e.ecx = id_bits(vcpus) << 12 | (n - 1),
            0x8000_001d if e.eax & 0x1f != 0 => {
                let sharing = if e.eax >> 5 & 0x7 < 3 { 0 } else { n - 1 };
                e.eax = e.eax & 0x3fff | sharing << 14;
            }
            _ => {}
        }
    }
    add_topology(&mut cpuid, vcpus);
    cpuid
}

/// Leaves 0xb and 0x1f: level 0 is the thread (one per core), level 1 the core.
fn add_topology(cpuid: &mut CpuId, vcpus: u8) {
    let max_leaf = cpuid
        .as_slice()
        .iter()
        .find(|e| e.function == 0)
        .map_or(0, |e| e.eax);
    for function in [0xb, 0x1f].into_iter().filter(|f| *f <= max_leaf) {
        let levels = [(0, 1, 1), (id_bits(vcpus), u32::from(vcpus), 2), (0, 0, 0)];
        for (index, (shift, count, kind)) in levels.into_iter().enumerate() {
            let entry = kvm_cpuid_entry2 {
                function,
                index: index as u32,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax: shift,
                ebx: count,
                ecx: kind << 8 | index as u32,
                ..Default::default()
            };
            // Room for them was left by removing KVM's own; a table that is full anyway keeps leaf 4 and 1.
            let _ = cpuid.push(entry);
        }
    }
}

/// Writes what differs from vCPU to vCPU: its APIC id.
pub fn set_apic_id(cpuid: &mut CpuId, id: u8) {
    for e in cpuid.as_mut_slice() {
        match e.function {
            0x1 => e.ebx = e.ebx & 0x00ff_ffff | u32::from(id) << 24,
            0xb | 0x1f => e.edx = u32::from(id),
            0x8000_001e => (e.eax, e.ebx, e.ecx) = (u32::from(id), u32::from(id), 0),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> CpuId {
        let leaf = |function, eax| kvm_cpuid_entry2 {
            function,
            eax,
            ..Default::default()
        };
        let cache = kvm_cpuid_entry2 {
            function: 4,
            eax: 0xffff_c063,
            ..Default::default()
        };
        let entries = [
            leaf(0, 0x1f),
            leaf(1, 0),
            cache,
            leaf(0xb, 99),
            leaf(0x8000_0008, 0),
            leaf(0x8000_001e, 0),
        ];
        CpuId::from_entries(&entries).unwrap()
    }

    fn find(c: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *c.as_slice()
            .iter()
            .find(|e| e.function == function && e.index == index)
            .unwrap()
    }

    #[test]
    fn tells_the_number_of_cores_in_every_leaf() {
        for (n, bits) in [(1, 0), (2, 1), (3, 2), (4, 2), (32, 5)] {
            let mut c = common(&supported(), n, true);
            set_apic_id(&mut c, n - 1);
            let one = find(&c, 1, 0);
            assert_eq!(one.ebx >> 24, u32::from(n - 1));
            assert_eq!(one.ebx >> 16 & 0xff, u32::from(n).next_power_of_two());
            assert_eq!(one.edx & EDX_HTT != 0, n > 1);
            let core = find(&c, 0xb, 1);
            assert_eq!(
                (core.eax, core.ebx, core.edx),
                (bits, u32::from(n), u32::from(n - 1))
            );
            assert_eq!(find(&c, 0x1f, 0).ebx, 1);
            assert_eq!(find(&c, 0x8000_0008, 0).ecx, bits << 12 | u32::from(n - 1));
            assert_eq!(
                find(&c, 4, 0).eax >> 14 & 0xfff,
                u32::from(n).next_power_of_two() - 1
            );
        }
    }

    #[test]
    fn keeps_one_set_of_topology_leaves() {
        let c = common(&supported(), 4, false);
        assert_eq!(c.as_slice().iter().filter(|e| e.function == 0xb).count(), 3);
        assert_eq!(find(&c, 1, 0).ecx & ECX_TSC_DEADLINE, 0);
    }
}
