//! Ways out of a jail, each with the layer that must stop it. Used by shoal-escape, which tries them, and by
//! shoal-test-jail, which starts it and judges.

use std::collections::{BTreeMap, HashMap};

mod files;
mod kernel;
mod namespaces;
mod network;
mod processes;

/// What an attempt met.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The kernel refused, with this error number.
    Refused(i32),
    /// The call was made, but there was nothing to get, for this reason.
    Nothing(&'static str),
    /// It worked.
    Escaped(String),
}

/// When an attempt says something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stops {
    /// Layers other than seccomp stop it; with seccomp, seccomp does.
    Twice,
    /// It makes allowed system calls only: the layer stops it in both runs.
    Layer,
    /// Nothing but seccomp stops it.
    SeccompOnly,
}

/// One way out.
pub struct Attempt {
    /// Its name on the command line.
    pub name: &'static str,
    /// What is tried.
    pub what: &'static str,
    /// The layer that stops it without seccomp, as docs/security.md calls it.
    pub layer: &'static str,
    /// Which layers do.
    pub stops: Stops,
    /// The error numbers that this layer gives; none where it gives [`Outcome::Nothing`].
    pub errors: &'static [i32],
    /// What it needs to be tried, of [`Facts`].
    pub needs: &'static [&'static str],
    /// Tries.
    pub run: fn(&Facts) -> Outcome,
}

/// What the driver tells of the machine: victims and limits.
#[derive(Debug, Default)]
pub struct Facts(HashMap<String, String>);

impl Facts {
    /// Reads `key=value` arguments.
    pub fn parse(arguments: impl Iterator<Item = String>) -> Facts {
        Facts(
            arguments
                .filter_map(|a| a.split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned())))
                .collect(),
        )
    }

    /// A fact as text; empty when unknown.
    pub fn text(&self, key: &str) -> &str {
        self.0.get(key).map(String::as_str).unwrap_or_default()
    }

    /// A fact as a number; 0 when unknown.
    pub fn number(&self, key: &str) -> usize {
        self.text(key).parse().unwrap_or_default()
    }
}

/// All attempts.
pub fn all() -> impl Iterator<Item = &'static Attempt> {
    [
        files::ATTEMPTS,
        namespaces::ATTEMPTS,
        processes::ATTEMPTS,
        network::ATTEMPTS,
        kernel::ATTEMPTS,
    ]
    .into_iter()
    .flatten()
}

/// The attempts by the layers that refuse them, as docs/security.md shows them.
pub fn table() -> String {
    let mut layers: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for attempt in all() {
        layers.entry(attempt.layer).or_default().push(attempt.what);
    }
    let mut text = "| refused by | attempts |\n|---|---|\n".to_owned();
    for (layer, attempts) in layers {
        text += &format!("| {layer} | {} |\n", attempts.join("; "));
    }
    text
}

/// Makes a system call and gives its result or error number.
fn call(number: libc::c_long, arguments: &[usize]) -> Result<usize, i32> {
    let argument = |index: usize| arguments.get(index).copied().unwrap_or(0);
    // SAFETY: the attempts pass numbers and addresses of live objects. This program has no purpose but to be refused,
    // and has nothing to lose.
    let answer = unsafe {
        libc::syscall(
            number,
            argument(0),
            argument(1),
            argument(2),
            argument(3),
            argument(4),
            argument(5),
        )
    };
    if answer >= 0 {
        return Ok(answer as usize);
    }
    // SAFETY: the address of errno is always valid.
    Err(unsafe { *libc::__errno_location() })
}

/// The outcome of a call that must be refused.
fn refused(result: Result<usize, i32>) -> Outcome {
    match result {
        Ok(value) => Outcome::Escaped(format!("the call returned {value}")),
        Err(errno) => Outcome::Refused(errno),
    }
}

/// The address of a C string.
fn text(text: &std::ffi::CStr) -> usize {
    text.as_ptr() as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOCS: &str = include_str!("../../../docs/security.md");

    #[test]
    fn the_documentation_names_every_attempt_with_its_layer() {
        assert!(
            DOCS.contains(&table()),
            "docs/security.md shows another table than: shoal-escape list\n{}",
            table()
        );
    }

    #[test]
    fn every_layer_is_explained() {
        let explained: Vec<&str> = DOCS
            .lines()
            .filter_map(|line| line.strip_prefix("| **")?.split("**").next())
            .collect();
        for attempt in all() {
            for layer in attempt.layer.split(" or ").flat_map(|part| part.split(" and ")) {
                let layer = layer.strip_prefix("own ").unwrap_or(layer);
                assert!(
                    explained.contains(&layer),
                    "{}: {layer} is not among {explained:?}",
                    attempt.name
                );
            }
        }
    }

    #[test]
    fn names_are_used_once() {
        let mut names: Vec<_> = all().map(|attempt| attempt.name).collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
        assert!(count >= 40, "{count}");
    }
}
