use super::*;
use std::sync::atomic::{AtomicU32, Ordering};

/// A directory that goes away with it.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("shoal-lab-modules-{}-{number}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn write(&self, path: &str, contents: &[u8]) {
        let path = self.0.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, contents).unwrap();
    }

    /// A kernel tree with these modules, `(name, modinfo)`.
    fn tree(modules: &[(&str, &str)]) -> Self {
        let scratch = Self::new();
        scratch.write("boot/vmlinuz-6.1-cloud-amd64", b"kernel");
        scratch.write(
            "lib/modules/6.1-cloud-amd64/modules.builtin",
            b"kernel/lib/built-in.ko\n",
        );
        for (name, modinfo) in modules {
            let path = format!("lib/modules/6.1-cloud-amd64/kernel/drivers/{name}.ko");
            scratch.write(&path, &elf(modinfo.as_bytes()));
        }
        scratch
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The smallest ELF file with a `.modinfo` section: header, names, modinfo, three section headers.
fn elf(modinfo: &[u8]) -> Vec<u8> {
    let names = b"\0.shstrtab\0.modinfo\0";
    let table = 64 + names.len() + modinfo.len();
    let mut file = vec![0; 64];
    file[..6].copy_from_slice(b"\x7fELF\x02\x01");
    file[0x28..0x30].copy_from_slice(&(table as u64).to_le_bytes());
    file[0x3c] = 3;
    file[0x3e] = 1;
    file.extend_from_slice(names);
    file.extend_from_slice(modinfo);
    for (name, offset, size) in [
        (0, 0, 0),
        (1, 64, names.len()),
        (11, 64 + names.len(), modinfo.len()),
    ] {
        let mut header = [0; 64];
        header[0] = name;
        header[0x18..0x20].copy_from_slice(&(offset as u64).to_le_bytes());
        header[0x20..0x28].copy_from_slice(&(size as u64).to_le_bytes());
        file.extend_from_slice(&header);
    }
    file
}

fn names(modules: &[Module]) -> Vec<&str> {
    modules.iter().map(|module| module.name.as_str()).collect()
}

#[test]
fn dependencies_come_first_and_once() {
    let scratch = Scratch::tree(&[
        ("kvm-amd", "license=GPL\0depends=kvm,built_in\0"),
        ("kvm", "depends=irqbypass\0"),
        ("irqbypass", "depends=\0"),
        ("vfio", "depends=irqbypass,kvm\0alias=char-major-1\0"),
    ]);
    let tree = KernelTree::open(&scratch.0).unwrap();
    let modules = tree.resolve(&["kvm-amd", "vfio"]).unwrap();
    assert_eq!(names(&modules), ["irqbypass", "kvm", "kvm_amd", "vfio"]);
    let dep = modules_dep(&modules);
    assert!(
        dep.contains("kernel/drivers/kvm-amd.ko: kernel/drivers/kvm.ko kernel/drivers/irqbypass.ko\n"),
        "{dep}"
    );
    assert!(
        dep.contains("kernel/drivers/vfio.ko: kernel/drivers/kvm.ko kernel/drivers/irqbypass.ko\n"),
        "{dep}"
    );
    assert_eq!(modules_alias(&modules), "alias char-major-1 vfio\n");
}

#[test]
fn missing_module_is_named() {
    let scratch = Scratch::tree(&[("a", "depends=b\0")]);
    let error = KernelTree::open(&scratch.0).unwrap().resolve(&["a"]).unwrap_err();
    assert!(
        matches!(&error, TreeError::NoModule { name, .. } if name == "b"),
        "{error}"
    );
}

#[test]
fn ring_ends() {
    let scratch = Scratch::tree(&[("a", "depends=b\0"), ("b", "depends=a\0")]);
    assert!(matches!(
        KernelTree::open(&scratch.0).unwrap().resolve(&["a"]),
        Err(TreeError::Ring(_))
    ));
}

#[test]
fn newest_cloud_kernel_wins() {
    let scratch = Scratch::tree(&[("a", "")]);
    for version in [
        "6.1-cloud-amd64",
        "6.1.0-9-cloud-amd64",
        "6.1.0-56-cloud-amd64",
        "6.9-amd64",
        "6.8-cloud-amd64",
    ] {
        scratch.write(&format!("boot/vmlinuz-{version}"), b"");
        if version != "6.8-cloud-amd64" {
            scratch.write(&format!("lib/modules/{version}/kernel/x"), b"");
            scratch.write(&format!("lib/modules/{version}/modules.builtin"), b"");
        }
    }
    assert_eq!(
        KernelTree::open(&scratch.0).unwrap().version,
        "6.1.0-56-cloud-amd64"
    );
}

#[test]
fn empty_directory_has_no_kernel() {
    let scratch = Scratch::new();
    assert!(matches!(
        KernelTree::open(&scratch.0),
        Err(TreeError::NoKernel(_))
    ));
}

#[test]
fn no_cut_of_a_module_panics() {
    let whole = elf(b"depends=x\0");
    for length in 0..whole.len() {
        let found = section(&whole[..length], b".modinfo");
        assert!(found.is_err() || found == Ok(b"depends=x\0"), "{length} bytes");
    }
    let mut wild = whole.clone();
    wild[0x28..0x30].fill(0xff);
    assert!(section(&wild, b".modinfo").is_err());
    assert_eq!(section(&whole, b".modinfo"), Ok(&b"depends=x\0"[..]));
}

#[test]
fn signature_is_taken_off() {
    let signed = |length: u32| {
        let mut file = b"contents+signature".to_vec();
        file.extend_from_slice(&[0; 8]);
        file.extend_from_slice(&length.to_be_bytes());
        file.extend_from_slice(b"~Module signature appended~\n");
        file
    };
    let strip = |mut file: Vec<u8>| {
        strip_signature(&mut file);
        file
    };
    assert_eq!(strip(signed(10)), b"contents");
    for length in [100, u32::MAX] {
        assert_eq!(
            strip(signed(length)),
            signed(length),
            "a length beyond the file is none"
        );
    }
    assert_eq!(
        strip(b"~Module signature appended~\n".to_vec()),
        b"~Module signature appended~\n"
    );
    assert_eq!(strip(b"unsigned".to_vec()), b"unsigned");
}
