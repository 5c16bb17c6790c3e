//! Compares the policies with traced runs.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Args;
use shoal_jailer::seccomp::ThreadKind;
use shoal_jailer::seccomp::policy::{Rule, parse};

/// Arguments of `policy-report`.
#[derive(Args)]
pub struct ReportArguments {
    /// Files that `trace` wrote
    #[arg(required = true)]
    traces: Vec<PathBuf>,
}

/// A line of a policy in a trace file: number and name, so that a trace of an older policy is noticed.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key(usize, String);

impl Key {
    /// The key of a rule.
    pub fn of(rule: &Rule) -> Key {
        Key(rule.line, rule.name.clone())
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.0, self.1)
    }
}

/// Counts of one kind of thread, by what stands in the trace files.
type Counts = BTreeMap<String, u64>;

/// Prints, per kind of thread, each line with its count, what is unused, and what has no line.
pub fn report(arguments: &ReportArguments) -> Result<ExitCode> {
    let mut traced: BTreeMap<String, Counts> = BTreeMap::new();
    for path in &arguments.traces {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        read(&text, &mut traced).with_context(|| format!("reading {}", path.display()))?;
    }
    share(&mut traced)?;
    let mut well = true;
    for kind in ThreadKind::ALL {
        let mut rules = parse(kind.policy())?;
        if let Some(base) = kind.base() {
            println!("{}: also all that {} may", kind.name(), base.name());
            rules.drain(..parse(base.policy())?.len());
        }
        let counts = traced.remove(kind.name()).unwrap_or_default();
        let (text, good) = compare(kind, &rules, counts);
        print!("{text}");
        well &= good;
    }
    Ok(if well {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn read(text: &str, traced: &mut BTreeMap<String, Counts>) -> Result<()> {
    for line in text.lines() {
        let fields: Vec<&str> = line.split('\t').collect();
        let [kind, what, count] = fields[..] else {
            bail!("{line:?} is no line of a trace")
        };
        let count: u64 = count.parse().with_context(|| format!("{line:?} has no count"))?;
        *traced
            .entry(kind.to_owned())
            .or_default()
            .entry(what.to_owned())
            .or_default() += count;
    }
    Ok(())
}

/// Uses of what a kind has from another kind's policy are uses of that one.
fn share(traced: &mut BTreeMap<String, Counts>) -> Result<()> {
    for (kind, base) in ThreadKind::ALL.into_iter().filter_map(|k| Some((k, k.base()?))) {
        let Some(mut own) = traced.remove(kind.name()) else {
            continue;
        };
        let counts = traced.entry(base.name().to_owned()).or_default();
        for rule in parse(base.policy())? {
            let key = Key::of(&rule).to_string();
            *counts.entry(key.clone()).or_default() += own.remove(&key).unwrap_or(0);
        }
        traced.insert(kind.name().to_owned(), own);
    }
    Ok(())
}

fn compare(kind: ThreadKind, rules: &[Rule], mut counts: Counts) -> (String, bool) {
    use fmt::Write;
    let mut text = String::new();
    let mut add = |line: fmt::Arguments<'_>| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{line}");
    };
    let mut numbers: Vec<i64> = rules.iter().map(|rule| rule.number).collect();
    numbers.sort_unstable();
    numbers.dedup();
    let name = kind.name();
    add(format_args!(
        "{name}: {} system calls allowed by {} lines",
        numbers.len(),
        rules.len()
    ));
    let mut good = true;
    for rule in rules {
        let count = counts.remove(&Key::of(rule).to_string()).unwrap_or(0);
        let verdict = if count == 0 { "UNUSED" } else { "" };
        good &= count > 0;
        add(format_args!(
            "  {count:>9} line {:>2} {:<16} {} {verdict}",
            rule.line, rule.name, rule.reason
        ));
    }
    for (what, count) in counts {
        good = false;
        match what.strip_prefix("! ") {
            Some(call) => add(format_args!("  {count:>9} NOT ALLOWED {call}")),
            None => add(format_args!(
                "  {count:>9} traced with another policy: line {what}"
            )),
        }
    }
    (text, good)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unused_lines_and_calls_without_one_fail() {
        let rules = parse("read # a\nwrite # b").unwrap();
        let compared = |trace: &str| {
            let mut traced = BTreeMap::new();
            read(trace, &mut traced).unwrap();
            compare(
                ThreadKind::Vcpu,
                &rules,
                traced.remove("vcpu").unwrap_or_default(),
            )
        };
        let (text, good) = compared("vcpu\t1 read\t3\nvcpu\t2 write\t1\nvcpu\t1 read\t2\n");
        assert!(
            good && text.contains("2 system calls") && text.contains("        5 line  1 read"),
            "{text}"
        );
        let (text, good) = compared("vcpu\t1 read\t3\n");
        assert!(!good && text.contains("UNUSED"), "{text}");
        let (text, good) = compared("vcpu\t1 read\t3\nvcpu\t2 write\t1\nvcpu\t! openat 0x0 0x0 0x0 0x0\t1\n");
        assert!(!good && text.contains("NOT ALLOWED openat"), "{text}");
        assert!(!compared("vcpu\t1 read\t3\nvcpu\t2 write\t1\nvcpu\t3 write\t1\n").1);
        assert!(read("vcpu 1", &mut BTreeMap::new()).is_err());
    }

    #[test]
    fn what_a_kind_has_from_another_counts_there() {
        let mut traced = BTreeMap::new();
        let first = Key::of(&parse(ThreadKind::EventLoop.policy()).unwrap()[0]);
        let all = parse(ThreadKind::EventLoopUring.policy()).unwrap();
        let own = Key::of(all.last().unwrap());
        let trace =
            format!("event-loop\t{first}\t3\nevent-loop-uring\t{first}\t4\nevent-loop-uring\t{own}\t5\n");
        read(&trace, &mut traced).unwrap();
        share(&mut traced).unwrap();
        assert_eq!(traced["event-loop"][&first.to_string()], 7);
        assert_eq!(traced["event-loop-uring"], Counts::from([(own.to_string(), 5)]));
    }
}
