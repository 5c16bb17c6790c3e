//! The guest kernel: unpacked, configured, compiled and kept by the hash of its inputs.

use crate::error::ImageError;
use crate::manifest::sha256_file;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The configuration fragment, part of this program.
pub const FRAGMENT: &str = include_str!("../kernel/shoal.config");
const REFERENCE: &str = include_str!("../kernel/reference.config");
/// About how many files the build compiles: for the progress display only.
const ABOUT_FILES: usize = 1150;
/// Raised when the way of building changes, so that old results are not taken.
const RECIPE: u32 = 3;
/// A change to one place of the source.
struct Change {
    file: &'static str,
    old: &'static str,
    new: &'static str,
}

/// All that differs from Debian's source.
///
/// The kernel's entry code is not put on 2 MiB pages of its own: they are for page table isolation, which the
/// configuration leaves out. Without them the kernel takes 9 MiB instead of 12, and a guest of 16 MiB can boot.
///
/// ACPICA does not ask for PCI's configuration space: 6.1 does even when it is built without PCI, and gives ACPI up then.
///
/// Memory that the kernel frees after its start (init code, gaps between sections, the initial RAM disk) is not filled
/// with 0xcc first, an aid for debugging: it made the host find pages for gaps that the guest may never use, and cost
/// 13 ms of a boot in the lab.
///
/// Memory of each CPU is not rounded up to 2 MiB, which were all cleared and then given back but for 168 KiB: 2.7 ms.
///
/// A byte is written to I/O port 0xf8e, for the VMM's timeline, where C code begins, where the console is there, where the
/// drivers have looked for their devices, and where the root file system is mounted (`shoal_vmm::protocol::mark`). Four
/// exits; a VMM that does not know the port ignores them.
const CHANGES: [Change; 10] = [
    Change {
        file: "arch/x86/kernel/vmlinux.lds.S",
        old: "#define ALIGN_ENTRY_TEXT_BEGIN\t. = ALIGN(PMD_SIZE);",
        new: "#define ALIGN_ENTRY_TEXT_BEGIN",
    },
    Change {
        file: "arch/x86/kernel/vmlinux.lds.S",
        old: "#define ALIGN_ENTRY_TEXT_END\t. = ALIGN(PMD_SIZE);",
        new: "#define ALIGN_ENTRY_TEXT_END",
    },
    Change {
        file: "drivers/acpi/acpica/evhandler.c",
        old: "\tACPI_ADR_SPACE_PCI_CONFIG,\n",
        new: "",
    },
    Change {
        file: "include/acpi/acconfig.h",
        old: "#define ACPI_NUM_DEFAULT_SPACES         4",
        new: "#define ACPI_NUM_DEFAULT_SPACES         3",
    },
    Change {
        file: "include/linux/poison.h",
        old: "#define POISON_FREE_INITMEM\t0xcc",
        new: "#define POISON_FREE_INITMEM\t(-1)",
    },
    Change {
        file: "arch/x86/kernel/setup_percpu.c",
        old: "\t\tatom_size = PMD_SIZE;",
        new: "\t\tatom_size = PAGE_SIZE;",
    },
    Change {
        file: "init/main.c",
        old: "\tset_task_stack_end_magic(&init_task);\n",
        new: "\tset_task_stack_end_magic(&init_task);\n\toutb(16, 0xf8e);\n",
    },
    Change {
        file: "init/main.c",
        old: "\tconsole_init();\n",
        new: "\tconsole_init();\n\toutb(17, 0xf8e);\n",
    },
    Change {
        file: "init/main.c",
        old: "\tdo_basic_setup();\n",
        new: "\tdo_basic_setup();\n\toutb(18, 0xf8e);\n",
    },
    Change {
        file: "init/main.c",
        old: "\tintegrity_load_keys();\n",
        new: "\tintegrity_load_keys();\n\toutb(19, 0xf8e);\n",
    },
];
/// Begins the names of the directories that are built in.
const WORK_PREFIX: &str = ".kernel-build-";
/// The file in such a directory that is locked as long as something is built there.
const IN_USE: &str = "lock";
/// How much of a failed command's output an error shows, in bytes.
const TAIL: usize = 800;

/// Which kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    /// The kernel of Shoal's own image: [`FRAGMENT`] on top of `make tinyconfig`.
    Shoal,
    /// The kernel that boot figures are compared by: `kernel/reference.config`, the source unchanged.
    Reference,
}

impl Flavour {
    fn fragment(self) -> &'static str {
        match self {
            Self::Shoal => FRAGMENT,
            Self::Reference => REFERENCE,
        }
    }

    fn changes(self) -> &'static [Change] {
        match self {
            Self::Shoal => &CHANGES,
            Self::Reference => &[],
        }
    }
}

/// A kernel in the cache.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Holds `vmlinux` (stripped ELF with a PVH note), `bzImage` and `config`.
    pub directory: PathBuf,
    /// Whether it was there already.
    pub cached: bool,
}

/// What is told while a build runs: a line, or how far compiling is.
pub trait Progress {
    /// A step begins.
    fn step(&mut self, text: &str);
    /// `done` of about `total` files are compiled.
    fn compiled(&mut self, done: usize, total: usize);
}

/// Gives the kernel of these inputs, building it when the cache has none.
pub fn build(
    flavour: Flavour,
    source: &Path,
    cache: &Path,
    progress: &mut dyn Progress,
) -> Result<Kernel, ImageError> {
    std::fs::create_dir_all(cache).map_err(ImageError::file("create", cache))?;
    let name = format!("kernel-{}", key(flavour, source, cache)?);
    let directory = cache.join(&name);
    let cached = || {
        directory.is_dir().then(|| Kernel {
            directory: directory.clone(),
            cached: true,
        })
    };
    if let Some(kernel) = cached() {
        return Ok(kernel);
    }
    // Two of the same at once: the second waits and finds the first one's result.
    let _building = locked(&cache.join(format!("{name}.lock")))?;
    if let Some(kernel) = cached() {
        return Ok(kernel);
    }
    let (work, _in_use) = work_directory(cache)?;
    let tree = work.path().join("linux");
    let log = cache.join(format!("{name}.log"));
    let mut build = Build {
        flavour,
        tree,
        log,
        progress,
    };
    build.unpack(source)?;
    build.configure()?;
    build.compile()?;
    let result = work.path().join("result");
    build.collect(&result)?;
    std::fs::rename(&result, &directory).map_err(ImageError::file("create", &directory))?;
    Ok(Kernel {
        directory,
        cached: false,
    })
}

/// A lock that lasts as long as what is returned, at most as long as this process.
fn locked(path: &Path) -> Result<File, ImageError> {
    let lock = File::create(path).map_err(ImageError::file("create", path))?;
    lock.lock().map_err(ImageError::file("lock", path))?;
    Ok(lock)
}

/// A directory to build in, and the lock that says so to other builds.
fn work_directory(cache: &Path) -> Result<(tempfile::TempDir, File), ImageError> {
    let _alone = locked(&cache.join("kernel.lock"))?;
    remove_leftovers(cache)?;
    let work = tempfile::Builder::new()
        .prefix(WORK_PREFIX)
        .tempdir_in(cache)
        .map_err(ImageError::file("make a directory in", cache))?;
    let in_use = locked(&work.path().join(IN_USE))?;
    Ok((work, in_use))
}

/// Removes the gigabyte that a killed build left, but nothing that is built in; the caller sees to it that no directory
/// is being made meanwhile.
fn remove_leftovers(cache: &Path) -> Result<(), ImageError> {
    for entry in std::fs::read_dir(cache)
        .map_err(ImageError::file("read", cache))?
        .flatten()
    {
        let name = entry.file_name();
        let abandoned = || match File::open(entry.path().join(IN_USE)) {
            Ok(lock) => lock.try_lock().is_ok(),
            Err(e) => e.kind() == std::io::ErrorKind::NotFound,
        };
        if name.as_encoded_bytes().starts_with(WORK_PREFIX.as_bytes()) && abandoned() {
            std::fs::remove_dir_all(entry.path()).map_err(ImageError::file("remove", &entry.path()))?;
        }
    }
    Ok(())
}

/// The hash of the source's content, the fragment, the compiler and this recipe.
fn key(flavour: Flavour, source: &Path, cache: &Path) -> Result<String, ImageError> {
    let mut hash = Sha256::new();
    hash.update(source_digest(source, cache)?);
    hash.update(flavour.fragment());
    for change in flavour.changes() {
        [change.file, change.old, change.new]
            .iter()
            .for_each(|part| hash.update(part));
    }
    hash.update(compiler()?);
    hash.update(RECIPE.to_le_bytes());
    Ok(format!("{:x}", hash.finalize())[..16].to_owned())
}

/// The source's digest, remembered by its size and time, for hashing 138 MB takes a while.
fn source_digest(source: &Path, cache: &Path) -> Result<String, ImageError> {
    use std::os::unix::fs::MetadataExt;
    let about = std::fs::metadata(source).map_err(ImageError::file("read", source))?;
    let known = cache.join(format!(
        "source-{}-{}-{}.sha256",
        about.size(),
        about.mtime(),
        about.ctime()
    ));
    if let Ok(digest) = std::fs::read_to_string(&known)
        && digest.len() == 64
    {
        return Ok(digest);
    }
    let digest = sha256_file(source)?;
    let mut file = tempfile::NamedTempFile::new_in(cache).map_err(ImageError::file("write in", cache))?;
    file.write_all(digest.as_bytes())
        .map_err(ImageError::file("write", &known))?;
    file.persist(&known).map_err(|e| ImageError::File {
        action: "write",
        path: known.clone(),
        source: e.error,
    })?;
    Ok(digest)
}

fn compiler() -> Result<String, ImageError> {
    let output = Command::new("gcc").arg("--version").output();
    let output = output.map_err(|source| ImageError::Start {
        program: "gcc".into(),
        source,
    })?;
    Ok(String::from_utf8_lossy(&output.stdout)
        .lines()
        .next()
        .unwrap_or_default()
        .to_owned())
}

impl Change {
    fn apply(&self, tree: &Path) -> Result<(), ImageError> {
        let path = tree.join(self.file);
        let text = std::fs::read_to_string(&path).map_err(ImageError::file("read", &path))?;
        if text.matches(self.old).count() != 1 {
            let problem = format!(
                "{} of this source does not have '{}' once; is it Linux 6.1?",
                self.file, self.old
            );
            return Err(ImageError::Argument(problem));
        }
        std::fs::write(&path, text.replace(self.old, self.new)).map_err(ImageError::file("write", &path))
    }
}

struct Build<'a> {
    flavour: Flavour,
    tree: PathBuf,
    log: PathBuf,
    progress: &'a mut dyn Progress,
}

impl Build<'_> {
    fn unpack(&mut self, source: &Path) -> Result<(), ImageError> {
        self.progress.step(&format!("unpacking {}", source.display()));
        std::fs::create_dir(&self.tree).map_err(ImageError::file("create", &self.tree))?;
        File::create(&self.log).map_err(ImageError::file("create", &self.log))?;
        let mut tar = Command::new("tar");
        tar.arg("-xf")
            .arg(source)
            .args(["--strip-components=1", "-C"])
            .arg(&self.tree);
        self.run("tar", tar)?;
        let changes = self.flavour.changes();
        changes.iter().try_for_each(|change| change.apply(&self.tree))
    }

    fn configure(&mut self) -> Result<(), ImageError> {
        self.progress.step("configuring");
        let wanted = self.flavour.fragment();
        let fragment = self.tree.join("shoal.config");
        std::fs::write(&fragment, wanted).map_err(ImageError::file("write", &fragment))?;
        match self.flavour {
            Flavour::Shoal => {
                let tiny = self.make(&["tinyconfig"]);
                self.run("make tinyconfig", tiny)?;
                let mut merge = Command::new("scripts/kconfig/merge_config.sh");
                merge.args(["-n", ".config", "shoal.config"]);
                self.run("merge_config.sh", merge)?;
            }
            Flavour::Reference => {
                let path = self.tree.join(".config");
                std::fs::write(&path, wanted).map_err(ImageError::file("write", &path))?;
                let rest = self.make(&["olddefconfig"]);
                self.run("make olddefconfig", rest)?;
            }
        }
        let path = self.tree.join(".config");
        let config = std::fs::read_to_string(&path).map_err(ImageError::file("read", &path))?;
        let lost = lost(wanted, &config);
        if lost.is_empty() {
            Ok(())
        } else {
            Err(ImageError::Configuration { fragment, lost })
        }
    }

    fn compile(&mut self) -> Result<(), ImageError> {
        let jobs = std::thread::available_parallelism().map_or(1, usize::from);
        self.progress.step(&format!(
            "compiling with {jobs} jobs; the log is {}",
            self.log.display()
        ));
        let mut make = self.make(&[&format!("-j{jobs}"), "vmlinux", "bzImage"]);
        self.prepare(&mut make)?;
        let mut child = make
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|source| ImageError::Start {
                program: "make".into(),
                source,
            })?;
        let mut log = self.open_log()?;
        let mut done = 0;
        for line in child
            .stdout
            .take()
            .into_iter()
            .flat_map(|out| BufReader::new(out).lines())
        {
            let line = line.map_err(ImageError::file("read the output of make for", &self.log))?;
            writeln!(log, "{line}").map_err(ImageError::file("write", &self.log))?;
            if line.starts_with("  CC ") || line.starts_with("  AS ") {
                done += 1;
                self.progress.compiled(done, ABOUT_FILES.max(done));
            }
        }
        let status = child
            .wait()
            .map_err(ImageError::file("wait for make with log", &self.log))?;
        if status.success() {
            Ok(())
        } else {
            Err(self.failure("make", status.to_string()))
        }
    }

    fn collect(&mut self, result: &Path) -> Result<(), ImageError> {
        self.progress.step("stripping");
        std::fs::create_dir(result).map_err(ImageError::file("create", result))?;
        let mut strip = Command::new("strip");
        strip.arg("-o").arg(result.join("vmlinux")).arg("vmlinux");
        self.run("strip", strip)?;
        for (from, to) in [("arch/x86/boot/bzImage", "bzImage"), (".config", "config")] {
            let from = self.tree.join(from);
            std::fs::copy(&from, result.join(to)).map_err(ImageError::file("copy", &from))?;
        }
        Ok(())
    }

    /// `make` whose result does not depend on when, where and by whom it is run.
    fn make(&self, arguments: &[&str]) -> Command {
        let mut make = Command::new("make");
        make.args(arguments);
        make.env("KBUILD_BUILD_TIMESTAMP", "2026-01-01")
            .env("KBUILD_BUILD_VERSION", "1");
        make.env("KBUILD_BUILD_USER", "shoal")
            .env("KBUILD_BUILD_HOST", "shoal");
        make
    }

    fn open_log(&self) -> Result<File, ImageError> {
        File::options()
            .append(true)
            .open(&self.log)
            .map_err(ImageError::file("open", &self.log))
    }

    fn prepare(&self, command: &mut Command) -> Result<(), ImageError> {
        // Our own make's settings (`make demo` runs this) are not the kernel's.
        for name in [
            "MAKEFLAGS",
            "MFLAGS",
            "MAKELEVEL",
            "GNUMAKEFLAGS",
            "KCONFIG_CONFIG",
            "ARCH",
            "CROSS_COMPILE",
        ] {
            command.env_remove(name);
        }
        command
            .env("LC_ALL", "C")
            .current_dir(&self.tree)
            .stdin(Stdio::null());
        command.stdout(self.open_log()?).stderr(self.open_log()?);
        Ok(())
    }

    fn run(&mut self, name: &str, mut command: Command) -> Result<(), ImageError> {
        self.prepare(&mut command)?;
        let status = command.status().map_err(|source| ImageError::Start {
            program: name.to_owned(),
            source,
        })?;
        if status.success() {
            Ok(())
        } else {
            Err(self.failure(name, status.to_string()))
        }
    }

    fn failure(&self, program: &str, status: String) -> ImageError {
        let log = std::fs::read(&self.log).unwrap_or_default();
        let tail = String::from_utf8_lossy(&log[log.len().saturating_sub(TAIL)..]).into_owned();
        let output = format!("the log is {} and ends:\n{tail}", self.log.display());
        ImageError::Program {
            program: program.to_owned(),
            status,
            output,
        }
    }
}

/// The fragment's lines that a configuration does not hold. A symbol that is off may also be unknown to it.
fn lost(fragment: &str, config: &str) -> Vec<String> {
    let holds = |line: &str| config.lines().any(|l| l == line);
    let is_on = |symbol: &str| {
        config
            .lines()
            .any(|l| l.strip_prefix(symbol).is_some_and(|l| l.starts_with('=')))
    };
    fragment
        .lines()
        .filter(|line| {
            match line
                .strip_prefix("# ")
                .and_then(|l| l.strip_suffix(" is not set"))
            {
                Some(symbol) => is_on(symbol),
                None => line.starts_with("CONFIG_") && !holds(line),
            }
        })
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_did_not_stick_are_found() {
        let config = "CONFIG_A=y\nCONFIG_AB=m\n# CONFIG_C is not set\nCONFIG_D=64\n";
        let fragment = "# a comment\nCONFIG_A=y\nCONFIG_AB=y\n# CONFIG_C is not set\n# CONFIG_A is not set\n\
                        CONFIG_D=6\nCONFIG_E=y\n# CONFIG_F is not set\n";
        assert_eq!(
            lost(fragment, config),
            ["CONFIG_AB=y", "# CONFIG_A is not set", "CONFIG_D=6", "CONFIG_E=y"]
        );
    }

    #[test]
    fn the_fragment_names_each_symbol_once() {
        let mut seen = std::collections::BTreeSet::new();
        for line in FRAGMENT.lines() {
            let name = line
                .trim_start_matches("# ")
                .split(['=', ' '])
                .next()
                .unwrap_or_default();
            assert!(
                !name.starts_with("CONFIG_") || seen.insert(name),
                "{name} is there twice"
            );
        }
        assert!(seen.len() > 100);
    }

    #[test]
    fn only_leftovers_of_builds_are_removed() {
        let cache = tempfile::tempdir().unwrap();
        for name in [".kernel-build-abc/linux", "kernel-0123456789abcdef"] {
            std::fs::create_dir_all(cache.path().join(name)).unwrap();
        }
        File::create(cache.path().join(".kernel-build-abc").join(IN_USE)).unwrap();
        std::fs::create_dir(cache.path().join(".kernel-build-no-lock")).unwrap();
        let used = work_directory(cache.path()).unwrap();
        let (other, _) = work_directory(cache.path()).unwrap();
        assert!(used.0.path().is_dir());
        drop(other);
        std::fs::remove_file(cache.path().join("kernel.lock")).unwrap();
        drop(used);
        remove_leftovers(cache.path()).unwrap();
        let left: Vec<_> = std::fs::read_dir(cache.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(left, ["kernel-0123456789abcdef"]);
    }

    #[test]
    fn a_change_needs_its_place_once() {
        let tree = tempfile::tempdir().unwrap();
        let file = tree.path().join("f");
        let change = Change {
            file: "f",
            old: "one",
            new: "two",
        };
        for bad in ["", "one one"] {
            std::fs::write(&file, bad).unwrap();
            assert!(matches!(change.apply(tree.path()), Err(ImageError::Argument(_))));
        }
        std::fs::write(&file, "a one b").unwrap();
        change.apply(tree.path()).unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "a two b");
    }

    #[test]
    fn a_missing_source_is_named() {
        let cache = tempfile::tempdir().unwrap();
        let error = key(Flavour::Shoal, Path::new("/nowhere/linux.tar.xz"), cache.path()).unwrap_err();
        assert_eq!(error.to_string(), "cannot read /nowhere/linux.tar.xz");
    }
}
