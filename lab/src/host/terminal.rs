//! Our terminal, when the machine gets it.

use crate::job::Stdin;
use std::io;

/// The terminal on standard input in raw mode, so that every key goes to the machine. Dropping it restores it.
pub struct Terminal {
    before: libc::termios,
}

impl std::fmt::Debug for Terminal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Terminal").finish_non_exhaustive()
    }
}

impl Terminal {
    /// Takes the terminal over.
    ///
    /// # Errors
    /// When standard input is none.
    pub fn take() -> io::Result<Self> {
        // SAFETY: termios is plain data, for which all zeroes is a value.
        let mut before: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: the structure is valid for the call.
        check(unsafe { libc::tcgetattr(libc::STDIN_FILENO, &raw mut before) })?;
        let mut raw = before;
        // SAFETY: the structure is valid for the call, and tcgetattr has filled it.
        unsafe { libc::cfmakeraw(&raw mut raw) };
        // SAFETY: the structure is valid for the call.
        check(unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &raw const raw) })?;
        Ok(Self { before })
    }

    /// The kind of input that this is, with its size now.
    pub fn size(&self) -> Stdin {
        let mut size = libc::winsize {
            ws_row: 0,
            ws_col: 0,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: the structure is valid for the call. When it fails the size stays zero.
        unsafe { libc::ioctl(libc::STDIN_FILENO, libc::TIOCGWINSZ, &raw mut size) };
        let or = |value: u16, other| if value == 0 { other } else { value };
        Stdin::Terminal {
            rows: or(size.ws_row, 24),
            columns: or(size.ws_col, 80),
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // SAFETY: the structure was filled by tcgetattr and is valid for the call.
        unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &raw const self.before) };
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
