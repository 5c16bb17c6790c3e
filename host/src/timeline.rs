//! When each step of a start came to pass.

use serde::{Deserialize, Serialize};
use shoal_vmm::protocol::Step;

/// CLOCK_MONOTONIC (ns): what every stamp is taken from, in the host and in the VMM.
pub fn now_ns() -> u64 {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    (t.tv_sec as u64) * 1_000_000_000 + t.tv_nsec as u64
}

/// The stamps of one start, by name; the first one is the zero of all others.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stamps(Vec<(String, u64)>);

/// A guest can cause stamps without end; more than these are dropped.
const MAX: usize = 96;

impl Stamps {
    /// A timeline that begins with `step` at `at_ns`.
    pub fn begin(step: &str, at_ns: u64) -> Self {
        Self(vec![(step.to_owned(), at_ns)])
    }

    /// Adds a stamp unless the step has one.
    pub fn add(&mut self, step: &str, at_ns: u64) {
        if self.0.len() < MAX && !self.0.iter().any(|(s, _)| s == step) {
            self.0.push((step.to_owned(), at_ns));
        }
    }

    /// Adds a stamp of now.
    pub fn now(&mut self, step: &str) {
        self.add(step, now_ns());
    }

    /// Adds a VMM's stamp.
    pub fn vmm(&mut self, step: Step, at_ns: u64) {
        self.add(&step.to_string(), at_ns);
    }

    /// The steps in the order of their time, in ms since the first one.
    pub fn relative_ms(&self) -> Vec<(String, f64)> {
        let zero = self.0.first().map_or(0, |s| s.1);
        let mut steps: Vec<_> = self
            .0
            .iter()
            .map(|(s, at)| (s.clone(), (*at as i64 - zero as i64) as f64 / 1e6))
            .collect();
        steps.sort_by(|a, b| a.1.total_cmp(&b.1));
        steps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_and_bounds_the_stamps() {
        let mut t = Stamps::begin("request-received", 1_000_000);
        t.add("late", 5_000_000);
        t.vmm(Step::FirstInstruction, 3_500_000);
        t.add("late", 9_000_000);
        let want = [
            ("request-received", 0.0),
            ("first-instruction", 2.5),
            ("late", 4.0),
        ];
        let want: Vec<_> = want.iter().map(|(s, ms)| (s.to_string(), *ms)).collect();
        assert_eq!(t.relative_ms(), want);
        for n in 0..=255 {
            t.vmm(Step::Mark(n), 1);
            t.vmm(Step::DriverOk(n), 1);
        }
        assert_eq!(t.relative_ms().len(), MAX);
    }
}
