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
    TargetArch, sock_filter,
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
    let mut head = BpfProgram::new();
    let mut leaves = Vec::new();
    for (number, rules) in table {
        let one = BTreeMap::from([(number, rules)]);
        let filter = SeccompFilter::new(one, otherwise.clone(), SeccompAction::Allow, TargetArch::x86_64)?;
        let mut program: BpfProgram = filter.try_into()?;
        // It begins with the check of the architecture, and loads the number of the system call; the rest is its rules.
        let loads = |i: &sock_filter| (i.code, i.k) == (BPF_LOAD, NUMBER);
        let start = program.iter().position(loads).ok_or("no number is loaded")? + 1;
        let rules = program.split_off(start);
        head = program;
        leaves.push((u32::try_from(number)?, rules));
    }
    head.extend(search(&leaves)?);
    Ok(head)
}

/// Loads a word of what the kernel tells about a system call, and where its number is in that.
const BPF_LOAD: u16 = 0x20;
const NUMBER: u32 = 0;
const BPF_JUMP_GE: u16 = 0x35;
const BPF_JUMP: u16 = 0x05;

/// Finds a system call's rules by halving. seccompiler alone compares with one number after the other, and the kernel
/// runs a filter for each number there is when it is installed: 320,000 instructions of a VMM's start more than this.
fn search(leaves: &[(u32, BpfProgram)]) -> Result<BpfProgram, Box<dyn Error>> {
    let (lower, upper) = match leaves {
        [] => return Err("a policy without rules".into()),
        [(_, rules)] => return Ok(rules.clone()),
        _ => leaves.split_at(leaves.len() / 2),
    };
    let (k, lower) = (upper[0].0, search(lower)?);
    let instruction = |code, jt, jf, k| sock_filter { code, jt, jf, k };
    let mut program = vec![
        instruction(BPF_JUMP_GE, 0, 1, k),
        instruction(BPF_JUMP, 0, 0, u32::try_from(lower.len())?),
    ];
    program.extend(lower);
    program.extend(search(upper)?);
    Ok(program)
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
