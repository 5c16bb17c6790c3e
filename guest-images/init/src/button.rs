//! The power button, which the kernel shows as an input device.

use crate::sys;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;

const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;
const PRESSED: i32 = 1;
/// Input devices that are listened to; a guest has one.
const MAX_DEVICES: usize = 8;

/// Opens all input devices there are.
pub fn open() -> Vec<File> {
    let Ok(entries) = std::fs::read_dir("/dev/input") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|e| e.file_name().as_encoded_bytes().starts_with(b"event"))
        .take(MAX_DEVICES)
        .filter_map(|e| {
            File::options()
                .read(true)
                .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
                .open(e.path())
                .ok()
        })
        .collect()
}

/// Reads what the device has to tell; true when the button was pressed.
pub fn pressed(device: &mut File) -> bool {
    let mut records = [0; 16 * sys::INPUT_EVENT_SIZE];
    let n = device.read(&mut records).unwrap_or(0);
    records[..n].chunks_exact(sys::INPUT_EVENT_SIZE).any(is_press)
}

/// The record ends with type (u16), code (u16) and value (i32), behind the time (`linux/input.h`).
fn is_press(record: &[u8]) -> bool {
    let Some([t0, t1, c0, c1, value @ ..]) = record.last_chunk::<8>() else {
        return false;
    };
    u16::from_ne_bytes([*t0, *t1]) == EV_KEY
        && u16::from_ne_bytes([*c0, *c1]) == KEY_POWER
        && i32::from_ne_bytes(*value) == PRESSED
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(kind: u16, code: u16, value: i32) -> Vec<u8> {
        [
            &[0; 16][..],
            &kind.to_ne_bytes(),
            &code.to_ne_bytes(),
            &value.to_ne_bytes(),
        ]
        .concat()
    }

    #[test]
    fn only_a_press_of_the_power_key_counts() {
        assert!(is_press(&record(1, 116, 1)));
        for other in [record(1, 116, 0), record(0, 0, 0), record(1, 30, 1), vec![1; 7]] {
            assert!(!is_press(&other));
        }
    }
}
