//! Pseudo-random data that both ends of a test can make for themselves and compare byte for byte. Used by the tests and
//! by what runs inside their guests.

use std::io::{self, Read, Write};

const CHUNK: usize = 64 << 10;

/// Who sends first over a connection, and who answers.
pub const OFFER: u64 = 1;
/// See [`OFFER`].
pub const ANSWER: u64 = 2;
/// What is written to disks.
pub const DISK: u64 = 3;

/// The data of a seed, from its beginning on (splitmix64).
struct Pattern(u64);

impl Pattern {
    fn of(seed: u64) -> Self {
        Self(seed << 40)
    }

    /// Fills `data`, whose length is a multiple of 8 except at the end.
    fn fill(&mut self, data: &mut [u8]) {
        for word in data.chunks_mut(8) {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            word.copy_from_slice(&(z ^ z >> 31).to_le_bytes()[..word.len()]);
        }
    }
}

/// Writes the first `len` bytes of the seed's data.
pub fn send(to: &mut impl Write, seed: u64, len: u64) -> io::Result<()> {
    let mut pattern = Pattern::of(seed);
    let mut chunk = vec![0; CHUNK];
    let mut left = len;
    while left > 0 {
        let n = left.min(CHUNK as u64) as usize;
        pattern.fill(&mut chunk[..n]);
        to.write_all(&chunk[..n])?;
        left -= n as u64;
    }
    Ok(())
}

/// Reads to the end; fails unless that was the first `len` bytes of the seed's data and nothing more.
pub fn expect(from: &mut impl Read, seed: u64, len: u64) -> io::Result<()> {
    let wrong = |what: String| Err(io::Error::new(io::ErrorKind::InvalidData, what));
    let mut pattern = Pattern::of(seed);
    let (mut got, mut want) = (Vec::with_capacity(CHUNK), vec![0; CHUNK]);
    let mut at = 0;
    loop {
        got.clear();
        let n = from.by_ref().take(CHUNK as u64).read_to_end(&mut got)?;
        if n == 0 {
            break;
        }
        pattern.fill(&mut want[..n]);
        if let Some(i) = (0..n).find(|&i| got[i] != want[i]) {
            return wrong(format!(
                "byte {} is {:#x}, not {:#x}",
                at + i as u64,
                got[i],
                want[i]
            ));
        }
        at += n as u64;
    }
    if at == len {
        Ok(())
    } else {
        wrong(format!("{at} bytes instead of {len}"))
    }
}
