//! Compiles the policy files to BPF programs.

#[path = "src/constants.rs"]
mod constants;
#[path = "src/policy.rs"]
#[allow(dead_code)]
mod policy;
#[path = "src/syscalls.rs"]
mod syscalls;

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write;
use std::path::Path;

use policy::{Condition, Rule, Test};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

fn main() -> Result<(), Box<dyn Error>> {
    let mut code = String::new();
    for (files, name) in [
        (&["event-loop"][..], "EVENT_LOOP"),
        (&["vcpu"], "VCPU"),
        (&["event-loop", "event-loop-uring"], "EVENT_LOOP_URING"),
    ] {
        let mut text = String::new();
        for file in files {
            let path = Path::new("../policies").join(format!("{file}.policy"));
            println!("cargo::rerun-if-changed={}", path.display());
            text += &std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        }
        let rules = policy::parse(&text).map_err(|e| format!("{}: {e}", files.join(" and ")))?;
        for (mode, action) in [("KILL", SeccompAction::KillProcess), ("LOG", SeccompAction::Log)] {
            let program = compile(&rules, action)?;
            emit(&mut code, &format!("{name}_{mode}"), &program)?;
        }
        writeln!(code, "pub const {name}_POLICY: &str = {text:?};")?;
    }
    let out = std::env::var("OUT_DIR")?;
    std::fs::write(Path::new(&out).join("programs.rs"), code)?;
    Ok(())
}

fn compile(rules: &[Rule], otherwise: SeccompAction) -> Result<BpfProgram, Box<dyn Error>> {
    let mut table: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for rule in rules {
        let alternatives = table.entry(rule.number).or_default();
        for conditions in combinations(&rule.conditions)? {
            alternatives.push(SeccompRule::new(conditions)?);
        }
    }
    let filter = SeccompFilter::new(table, otherwise, SeccompAction::Allow, TargetArch::x86_64)?;
    Ok(filter.try_into()?)
}

/// seccompiler compares with one value at a time: a list of values becomes as many alternatives.
fn combinations(conditions: &[Condition]) -> Result<Vec<Vec<SeccompCondition>>, Box<dyn Error>> {
    if conditions.is_empty() {
        return Ok(Vec::new());
    }
    let mut all = vec![Vec::new()];
    for Condition { argument, test } in conditions {
        let tests = match test {
            Test::Masked { mask, value } => vec![(SeccompCmpOp::MaskedEq(u64::from(*mask)), *value)],
            Test::OneOf(values) => values.iter().map(|value| (SeccompCmpOp::Eq, *value)).collect(),
        };
        let mut longer = Vec::new();
        for start in &all {
            for (operator, value) in &tests {
                let width = SeccompCmpArgLen::Dword;
                let condition = SeccompCondition::new(*argument, width, operator.clone(), u64::from(*value))?;
                let mut next: Vec<SeccompCondition> = start.clone();
                next.push(condition);
                longer.push(next);
            }
        }
        all = longer;
    }
    Ok(all)
}

fn emit(code: &mut String, name: &str, program: &BpfProgram) -> std::fmt::Result {
    writeln!(
        code,
        "pub static {name}: [libc::sock_filter; {}] = [",
        program.len()
    )?;
    for i in program {
        writeln!(
            code,
            "libc::sock_filter {{ code: {}, jt: {}, jf: {}, k: {} }},",
            i.code, i.jt, i.jf, i.k
        )?;
    }
    writeln!(code, "];")
}
