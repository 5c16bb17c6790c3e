//! Devices as they are written on the command line: what they stand on, and words about them behind colons.

use shoal_api_types::{Disk, DiskEngine};

/// Path and description (without path) of a disk. What is no word about disks belongs to the path.
pub fn disk(text: &str) -> (&str, Disk) {
    let (mut path, mut disk) = (text, Disk::default());
    while let Some((rest, word)) = path.rsplit_once(':') {
        match word {
            "ro" => disk.read_only = true,
            "io_uring" => disk.engine = DiskEngine::IoUring,
            "sync" => disk.engine = DiskEngine::Sync,
            _ => break,
        }
        path = rest;
    }
    (path, disk)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_disks() {
        let is = |text, path, read_only, engine| {
            let (got, disk) = disk(text);
            assert_eq!(
                (got, disk.read_only, disk.engine),
                (path, read_only, engine),
                "{text}"
            );
        };
        is("a.img", "a.img", false, DiskEngine::Sync);
        is("a.img:ro", "a.img", true, DiskEngine::Sync);
        is("a.img:io_uring:ro", "a.img", true, DiskEngine::IoUring);
        is("a:ro:b.img:io_uring", "a:ro:b.img", false, DiskEngine::IoUring);
        is("a.img:rw", "a.img:rw", false, DiskEngine::Sync);
    }
}
