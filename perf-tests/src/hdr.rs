//! Latencies as HDR histograms, in the form that the HdrHistogram tools of all languages read.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::{Serializer, V2DeflateSerializer};
use serde::{Deserialize, Serialize};

use crate::results::{figure, samples, text};
use crate::stats::{median, quantile};

/// Significant digits of the histograms.
const DIGITS: u8 = 3;

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

/// Samples (ms) as a histogram of nanoseconds. What is longer than eleven days counts as that.
pub fn histogram(samples_ms: &[f64]) -> String {
    let mut bytes = Vec::new();
    let made = Histogram::<u64>::new(DIGITS).map_err(|e| e.to_string());
    let written = made.and_then(|mut histogram| {
        for &ms in samples_ms {
            let ns = (ms * 1e6).clamp(0.0, 1e15) as u64;
            histogram.record(ns).map_err(|e| e.to_string())?;
        }
        let mut serializer = V2DeflateSerializer::new();
        serializer
            .serialize(&histogram, &mut bytes)
            .map_err(|e| format!("{e:?}"))
    });
    // Neither the digits nor the values are out of range, and a Vec takes all bytes.
    written.expect("a histogram that grows by itself takes every value");
    STANDARD.encode(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hdrhistogram::serialization::Deserializer;

    #[test]
    fn the_histogram_holds_the_samples() {
        let text = histogram(&[1.0, 2.0, 2.0, 1000.0]);
        assert!(
            text.starts_with("HISTFAAA"),
            "what HdrHistogram tools look for: {text}"
        );
        let bytes = STANDARD.decode(text).unwrap();
        let read: Histogram<u64> = Deserializer::new().deserialize(&mut bytes.as_slice()).unwrap();
        assert_eq!(read.len(), 4);
        assert!(read.equivalent(read.value_at_quantile(0.5), 2_000_000));
        assert!(read.equivalent(read.max(), 1_000_000_000));
        for odd in [f64::NAN, f64::INFINITY, -1.0] {
            histogram(&[odd]);
        }
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
