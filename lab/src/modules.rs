//! A kernel with its modules, as a Debian `linux-image-*` package unpacks: which modules are there, what they depend
//! on, and in what order to load them.
//!
//! Dependencies come from the modules themselves (the `.modinfo` section), so no `depmod` needs to have run.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Why a kernel tree cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// A file or directory could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// What was read.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// No kernel, or none whose modules are there too.
    #[error(
        "{} holds no boot/vmlinuz-VERSION with lib/modules/VERSION beside it; `scripts/cloud-kernel.sh` fetches Debian's package linux-image-cloud-amd64 and prints a directory that does",
        .0.display()
    )]
    NoKernel(PathBuf),
    /// A module that is needed is neither there nor built in.
    #[error("kernel {version} in {} has no module {name}", tree.display())]
    NoModule {
        /// The tree.
        tree: PathBuf,
        /// The kernel's version.
        version: String,
        /// The module's name.
        name: String,
    },
    /// A module is not what it should be.
    #[error("{} is not a kernel module: {why}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Modules that depend on each other in a ring cannot be loaded in any order.
    #[error("kernel module {0} depends on itself")]
    Ring(String),
}

/// A module that was read.
#[derive(Debug, Clone)]
pub struct Module {
    /// Name, with underscores.
    pub name: String,
    /// Path below `lib/modules/VERSION`.
    pub path: String,
    /// Names of the modules it depends on directly.
    pub depends: Vec<String>,
    /// Patterns that the kernel asks for it by.
    pub aliases: Vec<String>,
    /// The file.
    pub contents: Vec<u8>,
}

/// A kernel with its modules on disk.
#[derive(Debug)]
pub struct KernelTree {
    /// The kernel image.
    pub vmlinuz: PathBuf,
    /// Its version, like `6.1.0-56-cloud-amd64`.
    pub version: String,
    root: PathBuf,
    modules_dir: PathBuf,
    paths: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

impl KernelTree {
    /// Opens the tree at `root`. Of several kernels it takes one of Debian's cloud kernels if there is one, and the
    /// newest.
    ///
    /// # Errors
    /// When there is none, or a directory cannot be read.
    pub fn open(root: &Path) -> Result<Self, TreeError> {
        let (version, modules_dir) = newest_version(root)?;
        let builtin_list = modules_dir.join("modules.builtin");
        let builtin = fs::read_to_string(&builtin_list)
            .map_err(|source| TreeError::Read {
                path: builtin_list,
                source,
            })?
            .lines()
            .filter_map(|line| module_name(Path::new(line)))
            .collect();
        let mut paths = BTreeMap::new();
        collect(&modules_dir.join("kernel"), &mut paths)?;
        let vmlinuz = root.join("boot").join(format!("vmlinuz-{version}"));
        Ok(Self {
            vmlinuz,
            version,
            root: root.to_owned(),
            modules_dir,
            paths,
            builtin,
        })
    }

    /// The modules `names` and all that they depend on, dependencies first. What is built into the kernel is left out.
    ///
    /// # Errors
    /// When one is missing or malformed.
    pub fn resolve(&self, names: &[&str]) -> Result<Vec<Module>, TreeError> {
        let mut order = Vec::new();
        let mut state = BTreeMap::new();
        for name in names {
            self.visit(&name.replace('-', "_"), &mut state, &mut order)?;
        }
        Ok(order)
    }

    /// Whether the module `name` is there as a file.
    pub fn has(&self, name: &str) -> bool {
        self.paths.contains_key(&name.replace('-', "_"))
    }

    /// Depth first; `state` holds false for a module that is being visited, true for one that is in `order`.
    fn visit(
        &self,
        name: &str,
        state: &mut BTreeMap<String, bool>,
        order: &mut Vec<Module>,
    ) -> Result<(), TreeError> {
        match state.get(name) {
            Some(true) => return Ok(()),
            Some(false) => return Err(TreeError::Ring(name.to_owned())),
            None if !self.paths.contains_key(name) && self.builtin.contains(name) => return Ok(()),
            None => state.insert(name.to_owned(), false),
        };
        let module = self.read(name)?;
        for dependency in &module.depends {
            self.visit(dependency, state, order)?;
        }
        state.insert(name.to_owned(), true);
        order.push(module);
        Ok(())
    }

    fn read(&self, name: &str) -> Result<Module, TreeError> {
        let path = self.paths.get(name).ok_or_else(|| TreeError::NoModule {
            tree: self.root.clone(),
            version: self.version.clone(),
            name: name.to_owned(),
        })?;
        let mut contents = fs::read(path).map_err(|source| TreeError::Read {
            path: path.clone(),
            source,
        })?;
        strip_signature(&mut contents);
        let malformed = |why| TreeError::Malformed {
            path: path.clone(),
            why,
        };
        let modinfo = section(&contents, b".modinfo").map_err(malformed)?;
        let below = path.strip_prefix(&self.modules_dir).unwrap_or(path);
        Ok(Module {
            name: name.to_owned(),
            path: below
                .to_str()
                .ok_or_else(|| malformed("its path is not UTF-8"))?
                .to_owned(),
            depends: values(modinfo, "depends")
                .flat_map(|list| list.split(','))
                .filter(|name| !name.is_empty())
                .map(|name| name.replace('-', "_"))
                .collect(),
            aliases: values(modinfo, "alias").map(str::to_owned).collect(),
            contents,
        })
    }
}

/// The text of `modules.dep` for these modules, as modprobe reads it: every module with all that it needs, nearest first.
pub fn modules_dep(modules: &[Module]) -> String {
    let by_name: BTreeMap<&str, &Module> = modules
        .iter()
        .map(|module| (module.name.as_str(), module))
        .collect();
    let mut text = String::new();
    for module in modules {
        let mut needed: Vec<&Module> = Vec::new();
        let mut next = vec![module];
        while let Some(current) = next.pop() {
            for dependency in current
                .depends
                .iter()
                .filter_map(|name| by_name.get(name.as_str()))
            {
                // Again nearer to the end, when it was there: who is needed by more comes later.
                needed.retain(|other| other.name != dependency.name);
                needed.push(dependency);
                next.push(dependency);
            }
        }
        text += &module.path;
        text.push(':');
        for dependency in needed {
            text.push(' ');
            text += &dependency.path;
        }
        text.push('\n');
    }
    text
}

/// The text of `modules.alias` for these modules, as modprobe reads it.
pub fn modules_alias(modules: &[Module]) -> String {
    let lines = modules.iter().flat_map(|module| {
        module
            .aliases
            .iter()
            .map(move |alias| format!("alias {alias} {}\n", module.name))
    });
    lines.collect()
}

fn newest_version(root: &Path) -> Result<(String, PathBuf), TreeError> {
    let boot = root.join("boot");
    let entries = match fs::read_dir(&boot) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(TreeError::NoKernel(root.to_owned()));
        }
        Err(source) => return Err(TreeError::Read { path: boot, source }),
    };
    let mut best = None;
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(version) = name.to_str().and_then(|name| name.strip_prefix("vmlinuz-")) else {
            continue;
        };
        // Packages of distributions with a merged /usr may have their modules only there.
        let directories = ["lib/modules", "usr/lib/modules"].map(|place| root.join(place).join(version));
        if let Some(modules) = directories
            .into_iter()
            .find(|directory| directory.join("kernel").is_dir())
        {
            best = best.max(Some((
                version.contains("-cloud-"),
                numbers(version),
                version.to_owned(),
                modules,
            )));
        }
    }
    best.map(|(_, _, version, modules)| (version, modules))
        .ok_or_else(|| TreeError::NoKernel(root.to_owned()))
}

/// The numbers that a version begins with, so that 6.1.0-56-cloud-amd64 comes after 6.1.0-9-cloud-amd64.
fn numbers(version: &str) -> Vec<u64> {
    let end = version
        .find(|character: char| character.is_alphabetic())
        .unwrap_or(version.len());
    version[..end]
        .split(['.', '-'])
        .filter_map(|digits| digits.parse().ok())
        .collect()
}

/// Finds all uncompressed modules below `directory`.
fn collect(directory: &Path, paths: &mut BTreeMap<String, PathBuf>) -> Result<(), TreeError> {
    let failed = |source| TreeError::Read {
        path: directory.to_owned(),
        source,
    };
    for entry in fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let path = entry.path();
        if entry.file_type().map_err(failed)?.is_dir() {
            collect(&path, paths)?;
        } else if let Some(name) = module_name(&path) {
            paths.insert(name, path);
        }
    }
    Ok(())
}

/// Takes off the signature at a module's end (Linux `include/linux/module_signature.h`). The lab's machine loads modules
/// without one just as well, and to check it costs an emulated CPU a tenth of a second for `kvm` alone.
fn strip_signature(contents: &mut Vec<u8>) {
    const MAGIC: &[u8] = b"~Module signature appended~\n";
    const DESCRIPTION: usize = 12;
    let Some(signed) = contents.strip_suffix(MAGIC) else {
        return;
    };
    let Some((_, length)) = signed.split_last_chunk::<4>() else {
        return;
    };
    let tail = DESCRIPTION.saturating_add(u32::from_be_bytes(*length) as usize);
    if let Some(end) = signed.len().checked_sub(tail) {
        contents.truncate(end);
    }
}

/// `kvm_amd` for `kernel/arch/x86/kvm/kvm-amd.ko`; `None` for what is no module.
fn module_name(path: &Path) -> Option<String> {
    Some(path.file_name()?.to_str()?.strip_suffix(".ko")?.replace('-', "_"))
}

/// The values of `key` in a `.modinfo` section: strings `key=value`, each ended by NUL.
fn values<'a>(modinfo: &'a [u8], key: &'a str) -> impl Iterator<Item = &'a str> {
    modinfo
        .split(|byte| *byte == 0)
        .filter_map(|field| std::str::from_utf8(field).ok())
        .filter_map(move |field| field.strip_prefix(key)?.strip_prefix('='))
}

/// The bytes of the section `name` of a 64-bit little-endian ELF file.
fn section<'a>(elf: &'a [u8], name: &[u8]) -> Result<&'a [u8], &'static str> {
    if elf.get(..6) != Some(b"\x7fELF\x02\x01") {
        return Err("it is no 64-bit little-endian ELF file (compressed modules are not supported)");
    }
    let table = number(elf, 0x28, 8)?;
    let count = number(elf, 0x3c, 2)?;
    let names_index = number(elf, 0x3e, 2)?;
    let header = |index: usize| -> Result<(usize, &'a [u8]), &'static str> {
        let start = index
            .checked_mul(64)
            .and_then(|offset| offset.checked_add(table))
            .ok_or(TRUNCATED)?;
        let offset = number(elf, start.checked_add(0x18).ok_or(TRUNCATED)?, 8)?;
        let size = number(elf, start.checked_add(0x20).ok_or(TRUNCATED)?, 8)?;
        let end = offset.checked_add(size).ok_or(TRUNCATED)?;
        // A section without bytes in the file (.bss) may point past its end.
        Ok((number(elf, start, 4)?, elf.get(offset..end).unwrap_or_default()))
    };
    let (_, names) = header(names_index)?;
    for index in 0..count {
        let (name_offset, bytes) = header(index)?;
        let found = names
            .get(name_offset..)
            .and_then(|rest| rest.split(|byte| *byte == 0).next());
        if found == Some(name) {
            return Ok(bytes);
        }
    }
    Err("it has no .modinfo section")
}

const TRUNCATED: &str = "it is truncated";

fn number(bytes: &[u8], offset: usize, width: usize) -> Result<usize, &'static str> {
    let end = offset.checked_add(width).ok_or(TRUNCATED)?;
    let field = bytes.get(offset..end).ok_or(TRUNCATED)?;
    Ok(field
        .iter()
        .rev()
        .fold(0, |value, byte| value << 8 | usize::from(*byte)))
}

#[cfg(test)]
#[path = "modules_tests.rs"]
mod tests;
