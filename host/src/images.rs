//! Kernels and initial RAM disks, loaded once into sealed memfds and kept for the next guest.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::OFlags;
use shoal_vmm::kernel::{self, KernelError, LoadedInitrd, LoadedKernel};

use crate::error::{HostError, chain};

/// A file as it was when it was loaded: any change of it makes another key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Key {
    dev: u64,
    ino: u64,
    size: u64,
    mtime: (i64, i64),
    ctime: (i64, i64),
}

/// What was loaded from a file.
#[derive(Clone, Debug)]
enum Image {
    Kernel(Arc<LoadedKernel>),
    Initrd(Arc<LoadedInitrd>),
}

/// The loaded images, the one used last at the end; at most `limit` bytes by size of the files.
#[derive(Debug)]
pub(crate) struct Images {
    limit: u64,
    entries: Mutex<Vec<(Key, Image)>>,
}

impl Images {
    pub fn new(limit: u64) -> Self {
        Self {
            limit,
            entries: Mutex::default(),
        }
    }

    /// The kernel in a file.
    pub fn kernel(&self, path: &Path) -> Result<Arc<LoadedKernel>, HostError> {
        let load = |file: &File| Ok(Image::Kernel(Arc::new(kernel::load(file)?)));
        match self.get("kernel.path", path, |i| matches!(i, Image::Kernel(_)), load)? {
            Image::Kernel(kernel) => Ok(kernel),
            Image::Initrd(_) => unreachable!("get was asked for kernels only"),
        }
    }

    /// The initial RAM disk in a file.
    pub fn initrd(&self, path: &Path) -> Result<Arc<LoadedInitrd>, HostError> {
        let load = |file: &File| Ok(Image::Initrd(Arc::new(kernel::load_initrd(file)?)));
        match self.get("initrd.path", path, |i| matches!(i, Image::Initrd(_)), load)? {
            Image::Initrd(initrd) => Ok(initrd),
            Image::Kernel(_) => unreachable!("get was asked for initial RAM disks only"),
        }
    }

    fn get(
        &self,
        field: &str,
        path: &Path,
        wanted: impl Fn(&Image) -> bool,
        load: impl FnOnce(&File) -> Result<Image, KernelError>,
    ) -> Result<Image, HostError> {
        let bad = |why: String| HostError::invalid(field, format!("{path:?} {why}"));
        // Not blocking, for a pipe would wait for its writer; the loader takes regular files only.
        let flags = (OFlags::NONBLOCK | OFlags::CLOEXEC).bits() as i32;
        let file = File::options().read(true).custom_flags(flags).open(path);
        let file = file.map_err(|e| bad(format!("cannot be opened: {e}")))?;
        let key = key(&file).map_err(|e| bad(format!("cannot be examined: {e}")))?;
        if let Some(image) = self.find(key, &wanted) {
            return Ok(image);
        }
        let image = load(&file).map_err(|e| bad(format!("cannot be loaded: {}", chain(&e))))?;
        self.keep(key, image.clone());
        Ok(image)
    }

    fn find(&self, key: Key, wanted: &impl Fn(&Image) -> bool) -> Option<Image> {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let at = entries.iter().position(|(k, image)| *k == key && wanted(image))?;
        let entry = entries.remove(at);
        let image = entry.1.clone();
        entries.push(entry);
        Some(image)
    }

    fn keep(&self, key: Key, image: Image) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.push((key, image));
        let mut sum: u64 = entries.iter().map(|(k, _)| k.size).sum();
        while sum > self.limit && entries.len() > 1 {
            sum -= entries.remove(0).0.size;
        }
    }
}

fn key(file: &File) -> std::io::Result<Key> {
    let m = file.metadata()?;
    Ok(Key {
        dev: m.dev(),
        ino: m.ino(),
        size: m.size(),
        mtime: (m.mtime(), m.mtime_nsec()),
        ctime: (m.ctime(), m.ctime_nsec()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_once_and_again_after_a_change() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("initrd");
        std::fs::write(&path, [1; 5000]).unwrap();
        let images = Images::new(13_000);
        let first = images.initrd(&path).unwrap();
        assert!(Arc::ptr_eq(&first, &images.initrd(&path).unwrap()));
        std::fs::write(&path, [2; 5001]).unwrap();
        let second = images.initrd(&path).unwrap();
        assert_eq!((first.len, second.len), (5000, 5001));
        let other = dir.path().join("other");
        std::fs::write(&other, [2; 7000]).unwrap();
        images.initrd(&other).unwrap();
        assert_eq!(
            images.entries.lock().unwrap().len(),
            2,
            "the one used longest ago was dropped"
        );
        assert!(Arc::ptr_eq(&second, &images.initrd(&path).unwrap()));
    }

    #[test]
    fn names_the_field_of_a_bad_file() {
        let dir = tempfile::tempdir().unwrap();
        let text = dir.path().join("text");
        std::fs::write(&text, "no kernel").unwrap();
        let images = Images::new(1 << 20);
        for path in [
            dir.path(),
            &text,
            &dir.path().join("missing"),
            Path::new("/dev/null"),
        ] {
            let error = images.kernel(path).unwrap_err();
            assert_eq!(error.field(), Some("kernel.path"), "{error}");
        }
    }
}
