//! Latencies as HDR histograms, in the form that the HdrHistogram tools of all languages read.

use std::io::Read;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use flate2::read::ZlibDecoder;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::{Deserializer, Serializer, V2DeflateSerializer};
use serde::{Deserialize, Serialize};

use crate::results::{figure, samples, text};
use crate::stats::{median, quantile};

/// Significant digits of the histograms.
const DIGITS: u8 = 3;
/// What is longer counts as this: eleven days (ns).
const LONGEST_NS: u64 = 1_000_000_000_000_000;
/// A histogram of `DIGITS` has fewer bytes, as text and unpacked.
const MAX_BYTES: usize = 1 << 20;
/// Bytes of the unpacked form before the counts: cookie, length of the counts, offset, digits, bounds, ratio.
const HEADER: usize = 40;
/// Operations in a histogram, at most: the form has room for no more of one latency.
const MAX_COUNT: u64 = i64::MAX as u64;

/// Latencies of one operation. Times in ms.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Latencies {
    /// What was done.
    pub name: String,
    /// Median.
    pub median_ms: f64,
    /// 90th percentile.
    pub p90_ms: f64,
    /// 99th percentile.
    pub p99_ms: f64,
    /// The longest.
    pub max_ms: f64,
    /// All samples, in their order.
    pub samples_ms: Vec<f64>,
    /// The same as an HDR histogram of nanoseconds (V2, compressed, base64).
    pub hdr_ns: String,
}

impl Latencies {
    /// Of samples in their order.
    pub fn new(name: &str, samples_ms: Vec<f64>) -> Self {
        Self {
            name: name.into(),
            median_ms: median(&samples_ms),
            p90_ms: quantile(&samples_ms, 0.9),
            p99_ms: quantile(&samples_ms, 0.99),
            max_ms: quantile(&samples_ms, 1.0),
            hdr_ns: histogram(&samples_ms),
            samples_ms,
        }
    }

    /// Refuses what cannot be.
    pub fn check(&self) -> Result<(), String> {
        text("a name", &self.name)?;
        for (what, value) in [
            ("median_ms", self.median_ms),
            ("p90_ms", self.p90_ms),
            ("p99_ms", self.p99_ms),
            ("max_ms", self.max_ms),
        ] {
            figure(what, value)?;
        }
        samples("samples_ms", &self.samples_ms)
    }
}

/// Samples (ms) as a histogram of nanoseconds.
pub fn histogram(samples_ms: &[f64]) -> String {
    write(&of(samples_ms.iter().map(|ms| ((ms * 1e6) as u64, 1))))
}

/// A histogram of latencies (ns), each with how often it was met.
pub fn of(latencies: impl IntoIterator<Item = (u64, u64)>) -> Histogram<u64> {
    let mut histogram = Histogram::new(DIGITS).expect("the digits are not out of range");
    for (ns, count) in latencies {
        histogram
            .record_n(ns.min(LONGEST_NS), count)
            .expect("a histogram that grows by itself takes every value");
    }
    histogram
}

/// A histogram of at most 2^63 operations as text (V2, compressed, base64).
pub fn write(histogram: &Histogram<u64>) -> String {
    let mut bytes = Vec::new();
    V2DeflateSerializer::new()
        .serialize(histogram, &mut bytes)
        .expect("a Vec takes all bytes, and no count is too large");
    STANDARD.encode(bytes)
}

/// Reads what [`write`] wrote, which may be anything; says what is wrong with it. None of no text, as in files from before
/// there were histograms.
pub fn read(text: &str) -> Result<Option<Histogram<u64>>, String> {
    if text.is_empty() {
        return Ok(None);
    }
    let wrong = |what: &str| Err(format!("a histogram {what}"));
    if text.len() > MAX_BYTES {
        return wrong("is longer than any");
    }
    let Ok(packed) = STANDARD.decode(text) else {
        return wrong("is not base64");
    };
    // Behind its cookie and length. Unpacked here and not by the deserializer, which makes room for as much as the bytes say.
    let mut bytes = Vec::new();
    let unpacked = ZlibDecoder::new(packed.get(8..).unwrap_or_default())
        .take(MAX_BYTES as u64)
        .read_to_end(&mut bytes);
    if unpacked.is_err() || bytes.len() < HEADER {
        return wrong("cannot be unpacked");
    }
    let word = |at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    if word(4) as usize != bytes.len() - HEADER || word(12) != u32::from(DIGITS) {
        return wrong("says of itself what is not so");
    }
    match Deserializer::new().deserialize::<u64, _>(&mut bytes.as_slice()) {
        Ok(read) if read.len() <= MAX_COUNT => Ok(Some(read)),
        Ok(read) => wrong(&format!("holds {} operations", read.len())),
        Err(e) => wrong(&format!("cannot be read: {e}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_histogram_holds_the_samples() {
        let text = histogram(&[1.0, 2.0, 2.0, 1000.0]);
        assert!(
            text.starts_with("HISTFAAA"),
            "what HdrHistogram tools look for: {text}"
        );
        let read = read(&text).unwrap().unwrap();
        assert_eq!(read.len(), 4);
        assert!(read.equivalent(read.value_at_quantile(0.5), 2_000_000));
        assert!(read.equivalent(read.max(), 1_000_000_000));
        for odd in [f64::NAN, f64::INFINITY, -1.0] {
            histogram(&[odd]);
        }
    }

    #[test]
    fn counts_survive_the_way_through_text() {
        let all = [(0, 1), (39_000, 1_000_000), (5_000_000, 3), (u64::MAX, 1)];
        let there = of(all);
        assert_eq!((there.len(), there.count_at(39_000)), (1_000_005, 1_000_000));
        assert!(there.equivalent(there.max(), LONGEST_NS));
        assert_eq!(read(&write(&there)).unwrap(), Some(there));
        assert_eq!(read("").unwrap(), None);
        assert_eq!(read(&write(&of([]))).unwrap().unwrap().len(), 0);
    }

    /// The histogram of one byte changed, packed again.
    fn changed(at: usize, to: u8) -> String {
        let mut bytes = Vec::new();
        let packed = STANDARD.decode(histogram(&[1.0])).unwrap();
        ZlibDecoder::new(&packed[8..]).read_to_end(&mut bytes).unwrap();
        bytes[at] = to;
        packed_again(&bytes)
    }

    fn packed_again(bytes: &[u8]) -> String {
        let mut packed = Vec::from(*b"cook\0\0\0\0");
        flate2::read::ZlibEncoder::new(bytes, flate2::Compression::fast())
            .read_to_end(&mut packed)
            .unwrap();
        STANDARD.encode(packed)
    }

    #[test]
    fn hostile_text_is_refused_and_takes_no_memory() {
        let good = histogram(&[1.0, 2.0]);
        for end in 1..good.len() {
            assert!(read(&good[..end]).is_err(), "cut at {end}");
        }
        for (text, why) in [
            ("HISTFAAA".repeat(1 << 18), "longer than any"),
            ("ä".into(), "base64"),
            ("AAAA".into(), "unpacked"),
            (packed_again(&[0; HEADER - 1]), "unpacked"),
            // Its counts would be 4 GiB, 16 MiB.
            (changed(4, 0xff), "not so"),
            (packed_again(&vec![0; 16 << 20]), "not so"),
            (changed(0, 0), "cannot be read"),
            // Digits, whose memory is beyond all measure; lowest value; highest value.
            (changed(15, 5), "not so"),
            (changed(23, 0), "cannot be read"),
            (changed(29, 0), "cannot be read"),
        ] {
            let told = read(&text).map(|_| ()).unwrap_err();
            assert!(told.contains(why), "{told}, not {why}");
        }
        let over = of([(1, MAX_COUNT), (2, MAX_COUNT)]);
        let told = read(&write(&over)).map(|_| ()).unwrap_err();
        assert!(told.contains("operations"), "{told}");
    }

    #[test]
    fn order_statistics_are_of_the_samples() {
        let l = Latencies::new("x", (1..=100).map(f64::from).collect());
        assert_eq!(
            (l.median_ms, l.p90_ms, l.p99_ms, l.max_ms),
            (51.0, 91.0, 100.0, 100.0)
        );
        assert!(l.check().is_ok());
        assert!(Latencies { max_ms: -1.0, ..l }.check().is_err());
    }
}
