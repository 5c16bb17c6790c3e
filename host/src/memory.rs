//! What a guest costs the host in memory.

use std::fs;
use std::io;

/// A VMM's memory, split into the guest's own and what the VMM needs beside it (KiB).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryFigures {
    /// All of the VMM's memory, each shared page counted by its share (PSS).
    pub pss_kib: u64,
    /// All of the VMM's resident pages (RSS).
    pub rss_kib: u64,
    /// The guest's memory that is resident.
    pub guest_kib: u64,
    /// The guest's memory, each shared page counted by its share.
    pub guest_pss_kib: u64,
    /// What the VMM needs beside the guest's memory: `pss_kib - guest_pss_kib`.
    pub overhead_kib: u64,
}

/// Reads a process's figures. Guest memory is recognised by what the VMM sets for it alone: it is left out of core
/// dumps (`dd` among the VmFlags) and can be written.
pub(crate) fn figures(pid: u32) -> io::Result<MemoryFigures> {
    Ok(parse(&fs::read_to_string(format!("/proc/{pid}/smaps"))?))
}

fn parse(smaps: &str) -> MemoryFigures {
    let mut all = MemoryFigures::default();
    let (mut rss, mut pss, mut writable) = (0, 0, false);
    for line in smaps.lines() {
        let Some((key, value)) = line.split_once(':') else {
            continue;
        };
        let kib = || value.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0);
        match key {
            "Rss" => rss = kib(),
            "Pss" => pss = kib(),
            // The last line of each mapping.
            "VmFlags" => {
                all.rss_kib += rss;
                all.pss_kib += pss;
                let has = |flag| value.split_whitespace().any(|f| f == flag);
                if has("dd") && writable {
                    all.guest_kib += rss;
                    all.guest_pss_kib += pss;
                }
            }
            // A mapping's first line: `55d0-55d1 rw-p 00000000 00:00 0  /name`; its colon is that of the device.
            key if key.contains('-') => {
                writable = key.split_whitespace().nth(1).is_some_and(|p| p.contains('w'));
            }
            _ => {}
        }
    }
    all.overhead_kib = all.pss_kib.saturating_sub(all.guest_pss_kib);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_the_guest_from_its_vmm() {
        let smaps = "\
7f0000000000-7f0008000000 rw-p 00000000 00:00 0 \n\
Size:             131072 kB\nRss:                1000 kB\nPss:                1000 kB\nVmFlags: rd wr mr mw me nr dd \n\
7f0008000000-7f0008600000 rw-p 00200000 00:01 77                         /memfd:shoal-kernel (deleted)\n\
Size:               6144 kB\nRss:                 600 kB\nPss:                 300 kB\nVmFlags: rd wr mr mw me dd \n\
55d000000000-55d000100000 r-xp 00000000 08:01 42                         /usr/bin/shoal-vmm\n\
Size:               1024 kB\nRss:                 400 kB\nPss:                 100 kB\nVmFlags: rd ex mr mw me \n\
7fff00000000-7fff00004000 r--p 00000000 00:00 0                          [vvar]\n\
Size:                 16 kB\nRss:                   0 kB\nPss:                   0 kB\nVmFlags: rd mr pf io de dd \n";
        let want = MemoryFigures {
            pss_kib: 1400,
            rss_kib: 2000,
            guest_kib: 1600,
            guest_pss_kib: 1300,
            overhead_kib: 100,
        };
        assert_eq!(parse(smaps), want);
    }

    #[test]
    fn reads_its_own_process() {
        let me = figures(std::process::id()).unwrap();
        assert!(
            me.pss_kib > 0 && me.rss_kib >= me.pss_kib && me.overhead_kib > 0,
            "{me:?}"
        );
    }
}
