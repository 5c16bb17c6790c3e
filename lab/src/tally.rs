//! Adds up what libtest harnesses print: passed, failed, skipped.
//!
//! A libtest test cannot be skipped while it runs. Shoal's tests therefore say so on standard output (the harness runs
//! with `--nocapture`): a line `SKIP: NAME: REASON`. The harness counts such a test as passed, so the tally takes it
//! from there to skipped. Tests with `#[ignore]` count as skipped too. A test program that begins
//! (`running N tests`) and does not come to its `test result:` has died and counts as one failure.

use std::collections::BTreeSet;
use std::fmt;

/// The sum.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Tests that did what they should.
    pub passed: u64,
    /// Tests that did not, and test programs that died.
    pub failed: u64,
    /// Tests that could not run here.
    pub skipped: u64,
}

impl Tally {
    /// Nothing failed, and something passed or was at least tried.
    pub fn good(&self) -> bool {
        self.failed == 0 && self.passed + self.skipped > 0
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} passed, {} failed, {} skipped",
            self.passed, self.failed, self.skipped
        )
    }
}

/// Reads output line by line.
#[derive(Debug, Default)]
pub struct Counter {
    tally: Tally,
    /// A test program has begun and not ended.
    open: bool,
    /// Names that the current test program skipped.
    skips: BTreeSet<String>,
    results: u64,
}

impl Counter {
    /// Takes a line, with or without its end and the prefix of [`prefixed`].
    pub fn line(&mut self, line: &str) {
        let line = without_prefix(line.trim_end());
        if let Some(result) = line.strip_prefix("test result: ") {
            self.result(result);
        } else if is_beginning(line) {
            self.abandon();
            self.open = true;
        } else if let Some(name) = skipped_name(line) {
            self.skips.insert(name.to_owned());
        }
    }

    /// How many `test result:` lines there were.
    pub fn results(&self) -> u64 {
        self.results
    }

    /// The sum, when no more lines come.
    pub fn finish(mut self) -> Tally {
        self.abandon();
        self.tally
    }

    /// `ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s`
    fn result(&mut self, result: &str) {
        let count = |word: &str| -> u64 {
            let fields = result.split(['.', ';']).map(str::trim);
            fields
                .filter_map(|field| field.strip_suffix(word)?.trim_end().parse().ok())
                .next()
                .unwrap_or(0)
        };
        let skipped = (self.skips.len() as u64).min(count("passed"));
        self.tally.passed += count("passed") - skipped;
        self.tally.failed += count("failed");
        self.tally.skipped += count("ignored") + skipped;
        self.results += 1;
        self.open = false;
        self.skips.clear();
    }

    fn abandon(&mut self) {
        if self.open {
            self.tally.failed += 1;
            self.open = false;
        }
        self.skips.clear();
    }
}

/// `line` with the name of its test program in front, as the lab's runner prints it.
pub fn prefixed(program: &str, line: &str) -> String {
    format!("{program}| {line}")
}

fn without_prefix(line: &str) -> &str {
    match line.split_once("| ") {
        Some((program, rest)) if !program.is_empty() && program.chars().all(is_name) => rest,
        _ => line,
    }
}

fn is_name(character: char) -> bool {
    character.is_ascii_alphanumeric() || matches!(character, '-' | '_' | '.')
}

/// `running 1 test`, `running 5 tests`
fn is_beginning(line: &str) -> bool {
    let count = line
        .strip_prefix("running ")
        .and_then(|rest| rest.split_once(" test"));
    count.is_some_and(|(count, rest)| count.parse::<u64>().is_ok() && matches!(rest, "" | "s"))
}

/// The name in `SKIP: NAME: REASON`, which in a single-threaded harness follows `test NAME ... ` on the same line.
fn skipped_name(line: &str) -> Option<&str> {
    let after = line
        .strip_prefix("test ")
        .and_then(|rest| rest.split_once(" ... "))
        .map_or(line, |(_, after)| after);
    let (name, _reason) = after.strip_prefix("SKIP: ")?.split_once(": ")?;
    Some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(text: &str) -> Tally {
        let mut counter = Counter::default();
        text.lines().for_each(|line| counter.line(line));
        counter.finish()
    }

    fn sum(passed: u64, failed: u64, skipped: u64) -> Tally {
        Tally {
            passed,
            failed,
            skipped,
        }
    }

    const OK: &str =
        "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s\n";

    #[test]
    fn results_are_added() {
        let failed = "test result: FAILED. 2 passed; 5 failed; 0 ignored; 0 measured; 9 filtered out; finished in 1.2s";
        assert_eq!(
            tally(&format!("running 4 tests\n{OK}running 7 tests\n{failed}\n")),
            sum(5, 5, 1)
        );
        assert_eq!(sum(5, 5, 1).to_string(), "5 passed, 5 failed, 1 skipped");
    }

    #[test]
    fn skips_are_taken_from_passed() {
        let text =
            format!("running 4 tests\nSKIP: a: no KVM\ntest b ... SKIP: b: no TAP\nok\nSKIP: a: again\n{OK}");
        assert_eq!(tally(&text), sum(1, 0, 3));
    }

    #[test]
    fn a_skip_belongs_to_its_program() {
        assert_eq!(
            tally(&format!(
                "SKIP: stray: x\nrunning 4 tests\n{OK}running 4 tests\nSKIP: a: b\n{OK}"
            )),
            sum(5, 0, 3)
        );
    }

    #[test]
    fn skips_never_exceed_passes() {
        let text = "running 1 test\nSKIP: a: x\nSKIP: b: y\ntest result: ok. 1 passed; 0 failed; 0 ignored\n";
        assert_eq!(tally(text), sum(0, 0, 1));
    }

    #[test]
    fn a_program_that_dies_has_failed() {
        assert_eq!(tally("running 1 test\ntest a ... "), sum(0, 1, 0));
        assert_eq!(
            tally(&format!("running 2 tests\nrunning 4 tests\n{OK}")),
            sum(3, 1, 1)
        );
    }

    #[test]
    fn prefixes_are_seen_through() {
        let text: String = format!("running 4 tests\nSKIP: a: x\n{OK}")
            .lines()
            .map(|line| prefixed("linux_guest-1.2", line) + "\n")
            .collect();
        assert_eq!(tally(&text), sum(2, 0, 2));
    }

    #[test]
    fn look_alikes_do_not_count() {
        assert_eq!(
            tally("running tests\nrunning 3 testsuites\nsay test result: ok. 3 passed\n3 passed, 0 failed\n"),
            sum(0, 0, 0)
        );
    }

    #[test]
    fn nothing_is_not_good() {
        assert!(!sum(0, 0, 0).good());
        assert!(!sum(9, 1, 0).good());
        assert!(sum(1, 0, 0).good());
        assert!(sum(0, 0, 1).good(), "everything skipped aloud is no failure");
    }
}
