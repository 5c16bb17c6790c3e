//! The language of the policy files, used when the filters are compiled and by the tool that compares the policies
//! with traced runs.
//!
//! ```text
//! # The name of a system call allows it; a reason follows the hash sign.
//! read                                  # eventfds, the control socket
//! ioctl   arg1 in KVM_RUN KVM_GET_REGS  # one of these requests
//! mmap    arg2 & PROT_EXEC == 0, arg3 == MAP_PRIVATE|MAP_ANONYMOUS
//! ```
//!
//! Conditions of a line all have to hold; several lines of one system call are alternatives. Arguments are numbered
//! from 0, and their lower 32 bits are compared: all flags and requests lie there.

use crate::constants::CONSTANTS;
use crate::syscalls::SYSCALLS;

/// A policy file that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyError {
    /// Which line, from 1.
    pub line: usize,
    /// What is wrong with it.
    pub what: String,
}

impl std::fmt::Display for PolicyError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "line {}: {}", self.line, self.what)
    }
}

impl std::error::Error for PolicyError {}

/// What has to hold of one argument.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Test {
    /// The bits of the mask have this value.
    Masked {
        /// Which bits.
        mask: u32,
        /// Their value.
        value: u32,
    },
    /// It is one of these.
    OneOf(Vec<u32>),
}

/// A condition of one argument.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condition {
    /// Which argument, from 0.
    pub argument: u8,
    /// What has to hold.
    pub test: Test,
}

impl Condition {
    /// Whether it holds of these arguments.
    pub fn holds(&self, arguments: &[u64; 6]) -> bool {
        let value = arguments[usize::from(self.argument)] as u32;
        match &self.test {
            Test::Masked { mask, value: wanted } => value & mask == *wanted,
            Test::OneOf(values) => values.contains(&value),
        }
    }
}

/// One line of a policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Where it stands, from 1.
    pub line: usize,
    /// Name of the system call.
    pub name: String,
    /// Its number.
    pub number: i64,
    /// What has to hold; nothing for an empty list.
    pub conditions: Vec<Condition>,
    /// Why it is allowed.
    pub reason: String,
}

impl Rule {
    /// Whether it allows this call.
    pub fn allows(&self, number: i64, arguments: &[u64; 6]) -> bool {
        self.number == number && self.conditions.iter().all(|condition| condition.holds(arguments))
    }
}

/// Reads a policy.
///
/// # Errors
/// The first line that is wrong.
pub fn parse(text: &str) -> Result<Vec<Rule>, PolicyError> {
    let mut rules: Vec<Rule> = Vec::new();
    for (index, full) in text.lines().enumerate() {
        let (content, reason) = full.split_once('#').unwrap_or((full, ""));
        if content.trim().is_empty() {
            continue;
        }
        let line = index + 1;
        let rule =
            parse_rule(content.trim(), reason.trim(), line).map_err(|what| PolicyError { line, what })?;
        let redundant = |old: &Rule| {
            old.number == rule.number && (old.conditions.is_empty() || rule.conditions.is_empty())
        };
        if let Some(old) = rules.iter().find(|old| redundant(old)) {
            let what = format!(
                "{} is allowed without condition by line {} or this one",
                rule.name, old.line
            );
            return Err(PolicyError { line, what });
        }
        rules.push(rule);
    }
    Ok(rules)
}

fn parse_rule(content: &str, reason: &str, line: usize) -> Result<Rule, String> {
    let (name, rest) = content.split_once(char::is_whitespace).unwrap_or((content, ""));
    let number = number_of(name).ok_or_else(|| format!("{name} is no system call of x86_64"))?;
    if reason.is_empty() {
        return Err(format!("{name} has no reason: say after a # what needs it"));
    }
    let conditions = if rest.trim().is_empty() {
        Vec::new()
    } else {
        rest.split(',')
            .map(|text| parse_condition(text.trim()))
            .collect::<Result<_, _>>()?
    };
    Ok(Rule {
        line,
        name: name.to_owned(),
        number,
        conditions,
        reason: reason.to_owned(),
    })
}

fn parse_condition(text: &str) -> Result<Condition, String> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let unknown = || format!("{text:?} is no condition: write argN == X, argN & M == X or argN in X Y Z");
    let argument = words
        .first()
        .and_then(|word| word.strip_prefix("arg"))
        .and_then(|digits| digits.parse::<u8>().ok())
        .filter(|argument| *argument < 6)
        .ok_or_else(unknown)?;
    let test = match &words[1..] {
        ["==", value] => Test::OneOf(vec![parse_value(value)?]),
        ["&", mask, "==", value] => {
            let (mask, value) = (parse_value(mask)?, parse_value(value)?);
            if value & !mask != 0 {
                return Err(format!(
                    "{text:?} never holds: the value has bits outside the mask"
                ));
            }
            Test::Masked { mask, value }
        }
        ["in", values @ ..] if !values.is_empty() => Test::OneOf(
            values
                .iter()
                .map(|value| parse_value(value))
                .collect::<Result<_, _>>()?,
        ),
        _ => return Err(unknown()),
    };
    Ok(Condition { argument, test })
}

/// Names and numbers joined by `|`.
fn parse_value(text: &str) -> Result<u32, String> {
    text.split('|').try_fold(0, |sum, part| {
        let known = CONSTANTS
            .iter()
            .find(|(name, _)| *name == part)
            .map(|(_, value)| *value as u32);
        let number = || match part.strip_prefix("0x") {
            Some(digits) => u32::from_str_radix(digits, 16).ok(),
            None => part.parse().ok(),
        };
        known
            .or_else(number)
            .map(|value| sum | value)
            .ok_or_else(|| format!("{part:?} is no number and no known name"))
    })
}

/// The number of a system call.
pub fn number_of(name: &str) -> Option<i64> {
    SYSCALLS
        .iter()
        .find(|(_, known)| *known == name)
        .map(|(number, _)| *number)
}
