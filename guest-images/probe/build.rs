//! Assembles the bare-metal guests with the C compiler (`$CC`, else `cc`) into small ELF files in `OUT_DIR`.

#[path = "src/layout.rs"]
mod layout;

use std::path::PathBuf;
use std::process::Command;

/// One ELF file: its name, its sources in `guest/`, and the macros that choose among its variants.
struct Guest {
    name: &'static str,
    sources: &'static [&'static str],
    defines: &'static [&'static str],
}

const PROBE: &[&str] = &[
    "entry.S",
    "probe.c",
    "measure.c",
    "virtio.c",
    "block.c",
    "net.c",
    "vsock.c",
    "pieces.ld",
];

const GUESTS: &[Guest] = &[
    Guest {
        name: "minimal-pvh.elf",
        sources: &["minimal.S"],
        defines: &[],
    },
    Guest {
        name: "minimal-64.elf",
        sources: &["minimal.S"],
        defines: &["-DLONG64"],
    },
    Guest {
        name: "halt-pvh.elf",
        sources: &["minimal.S"],
        defines: &["-DHALT"],
    },
    Guest {
        name: "halt-64.elf",
        sources: &["minimal.S"],
        defines: &["-DLONG64", "-DHALT"],
    },
    Guest {
        name: "probe.elf",
        sources: PROBE,
        defines: &[],
    },
    Guest {
        name: "probe-64.elf",
        sources: PROBE,
        defines: &["-DLONG64"],
    },
];

/// Freestanding code that runs before there is a stack guard, a red zone that interrupts respect, or an FPU state.
const FLAGS: &[&str] = &[
    "-m64",
    "-O2",
    "-std=gnu11",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-ffreestanding",
    "-nostdlib",
    "-static",
    "-no-pie",
    "-fno-pic",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
    "-fcf-protection=none",
    "-mno-red-zone",
    "-mgeneral-regs-only",
    "-Wl,--build-id=none",
    "-Wl,-z,max-page-size=4096",
    "-Wl,-z,norelro",
    "-Wl,--no-warn-rwx-segments",
    "-Wl,-s",
];

fn main() {
    let here = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let guest = here.join("guest");
    println!("cargo::rerun-if-changed=guest");
    println!("cargo::rerun-if-changed=src/layout.rs");
    println!("cargo::rerun-if-env-changed=CC");
    let compiler = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
    let constants = [
        format!("-DSLEEP_CONTROL_PORT={}", layout::SLEEP_CONTROL_PORT),
        format!("-DSLEEP_CONTROL_S5={}", layout::SLEEP_CONTROL_S5),
        format!("-DMARK_PORT={}", layout::MARK_PORT),
        format!("-DMMIO_BASE={}ul", layout::MMIO_BASE),
        format!("-DMMIO_WINDOW={}ul", layout::MMIO_WINDOW),
        format!("-DMMIO_WINDOWS={}ul", layout::MMIO_WINDOWS),
    ];
    let script =
        std::fs::read_to_string(guest.join("guest.ld")).expect("guest/guest.ld is part of the crate");
    for g in GUESTS {
        // Without a PVH note there must be no program header for it either: an empty one confuses loaders.
        let keep = |line: &&str| !g.defines.contains(&"-DLONG64") || !line.contains("note");
        let script: String = script
            .lines()
            .filter(keep)
            .flat_map(|line| [line, "\n"])
            .collect();
        let path = out.join(format!("{}.ld", g.name));
        std::fs::write(&path, script).expect("OUT_DIR is writable");
        let status = Command::new(&compiler)
            .args(FLAGS)
            .args(g.defines)
            .args(&constants)
            .arg("-Wl,-T")
            .arg(&path)
            .arg("-o")
            .arg(out.join(g.name))
            .args(g.sources.iter().map(|s| guest.join(s)))
            .status();
        match status {
            Ok(s) if s.success() => {}
            Ok(s) => panic!(
                "{} could not build the guest {}: {s}; its message is above",
                compiler.display(),
                g.name
            ),
            Err(e) => panic!(
                "cannot run the C compiler {}: {e}; install gcc (scripts/deps.sh does)",
                compiler.display()
            ),
        }
    }
}
