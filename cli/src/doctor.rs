//! `shoal doctor`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use shoal_host::doctor::{Report, Status, Verdict, examine};

use crate::commands::print;

/// Examines this machine and prints what was found.
pub async fn doctor(json: bool, vmm: Option<PathBuf>) -> Result<ExitCode> {
    let vmm = match vmm {
        Some(path) => path,
        None => std::env::current_exe()
            .context("finding the folder of shoal")?
            .with_file_name("shoal-vmm"),
    };
    let report = examine(&vmm).await;
    if json {
        print(&(serde_json::to_string_pretty(&report)? + "\n"))?
    } else {
        print(&text(&report))?
    }
    Ok(ExitCode::from(report.verdict.exit_code()))
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    for check in &report.checks {
        let mark = match check.status {
            Status::Ok => "ok  ",
            Status::Warning => "warn",
            Status::Failed => "FAIL",
        };
        text.push_str(&format!("{mark}  {:<9} {}\n", check.name, check.detail));
    }
    if let Some(probe) = &report.probe {
        let million = |ips: f64| format!("{:.1} million instructions/s", ips / 1e6);
        text.push_str(&format!(
            "      ring 3  {}\n      ring 0  {}\n",
            million(probe.ring3_ips),
            million(probe.ring0_ips)
        ));
        for instruction in &probe.instructions {
            text.push_str(&format!(
                "      ring 0  {}: {}\n",
                instruction.name, instruction.detail
            ));
        }
    }
    let verdict = match report.verdict {
        Verdict::Linux => "This machine runs Linux guests",
        Verdict::BareMetal => "This machine runs bare-metal guests only, no Linux",
        Verdict::None => "This machine runs no guests",
    };
    text.push_str(&format!("\n{verdict}: {}.\n", report.reason));
    for advice in &report.advice {
        text.push_str(&format!("  - {advice}\n"));
    }
    text
}
