//! How guests are shown.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::devices;
use shoal_api_types::{DiskEngine, Guest, GuestState, TimelineStep};

/// The table of `shoal ps`.
pub fn table(guests: &[Guest]) -> String {
    let head = ["ID", "NAME", "STATE", "CPUS", "MEMORY", "PID", "AGE"].map(str::to_owned);
    let mut rows = vec![head];
    rows.extend(guests.iter().map(|g| {
        [
            g.id.clone(),
            g.name.clone().unwrap_or_else(|| "-".into()),
            state(g),
            g.vcpus.to_string(),
            size_mib(g.memory.configured_mib),
            g.pid.map_or_else(|| "-".into(), |pid| pid.to_string()),
            age(g.created_unix_ms),
        ]
    }));
    align(&rows)
}

fn align<const N: usize>(rows: &[[String; N]]) -> String {
    let mut widths = [0; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |row: &[String; N]| {
        let cells: Vec<_> = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        cells.join("  ").trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

fn state(guest: &Guest) -> String {
    let name = match guest.state {
        GuestState::Created => "created",
        GuestState::Starting => "starting",
        GuestState::Running => "running",
        GuestState::Stopping => "stopping",
        GuestState::Stopped => "stopped",
        GuestState::Failed => "failed",
    };
    match (&guest.stopped, guest.exit_code) {
        (Some(stopped), None) => format!("{name} ({})", word(&stopped.reason)),
        (Some(_), Some(code)) => format!("{name} (exit {code})"),
        (None, _) => name.to_owned(),
    }
}

/// The name that a value has in JSON.
pub fn word(value: &impl serde::Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        _ => String::new(),
    }
}

fn size_mib(mib: u64) -> String {
    if mib >= 1024 && mib.is_multiple_of(1024) {
        format!("{} GiB", mib / 1024)
    } else {
        format!("{mib} MiB")
    }
}

fn age(created_unix_ms: u64) -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_millis() as u64;
    let seconds = now.saturating_sub(created_unix_ms) / 1000;
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7199 => format!("{} min", seconds / 60),
        7200..=172_799 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// All of a guest, for `shoal show`.
pub fn details(g: &Guest) -> String {
    let mut rows: Vec<[String; 2]> = Vec::new();
    let mut row = |key: &str, value: String| rows.push([key.to_owned(), value]);
    row("id", g.id.clone());
    if let Some(name) = &g.name {
        row("name", name.clone());
    }
    row("state", state(g));
    if let Some(stopped) = &g.stopped {
        row("ended", stopped.detail.clone());
    }
    if let Some(error) = &g.error {
        row("error", error.clone());
    }
    if let Some(pid) = g.pid {
        row("process", pid.to_string());
    }
    row("age", age(g.created_unix_ms));
    row("kernel", g.kernel.path.clone());
    row("command line", g.kernel.cmdline.clone());
    if let Some(initrd) = &g.initrd {
        row("initrd", initrd.path.clone());
    }
    row("vCPUs", g.vcpus.to_string());
    row("memory", size_mib(g.memory.configured_mib));
    if let Some(used) = &g.memory.used {
        let text = format!(
            "{} KiB in use by the guest, {} KiB overhead of its VMM",
            used.guest_kib, used.overhead_kib
        );
        row("", text);
    }
    for disk in &g.disks {
        let mode = if disk.read_only { " (read-only)" } else { "" };
        let engine = match disk.engine {
            DiskEngine::Sync => "",
            DiskEngine::IoUring => " (io_uring)",
        };
        let id = disk.id.as_deref().unwrap_or("");
        let queues = queues(disk.queues);
        let limits = devices::shown("", &disk.limits);
        row(
            "disk",
            format!("{id} {}{mode}{engine}{queues}{limits}", disk.path),
        );
    }
    for network in &g.networks {
        let mac = network.mac.as_deref().unwrap_or("");
        let limits = devices::shown("rx ", &network.rx_limits) + &devices::shown("tx ", &network.tx_limits);
        let queues = queues(network.queues);
        row("network", format!("{} {mac}{queues}{limits}", network.tap));
    }
    if let Some(vsock) = &g.vsock {
        let limits = devices::shown("", &vsock.limits);
        row("vsock", format!("cid {} at {}{limits}", vsock.cid, vsock.socket));
    }
    if !g.rng.limits.are_none() {
        row(
            "entropy",
            devices::shown("", &g.rng.limits)
                .trim_start_matches(", ")
                .to_owned(),
        );
    }
    let mut text = align(&rows);
    if !g.timeline.is_empty() {
        text.push_str("\nboot timeline\n");
        text.push_str(&timeline(&g.timeline));
    }
    text
}

/// Several queues are worth a word.
fn queues(count: u32) -> String {
    if count > 1 {
        format!(", {count} queues")
    } else {
        String::new()
    }
}

/// A boot timeline: each step, when it was done, and how long it took.
pub fn timeline(steps: &[TimelineStep]) -> String {
    const BAR: f64 = 40.0;
    let total = steps.last().map_or(0.0, |s| s.ms).max(f64::MIN_POSITIVE);
    let mut text = format!("{:>10}  {:>10}  step\n", "ms", "+ms");
    let mut before = 0.0;
    for step in steps {
        let took = step.ms - before;
        let bar = "#".repeat((took / total * BAR).round() as usize);
        let line = format!("{:>10.2}  {took:>10.2}  {:<18} {bar}", step.ms, step.step);
        text.push_str(line.trim_end());
        text.push('\n');
        before = step.ms;
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligns_columns() {
        let rows = [["A".to_owned(), "B".into()], ["long".into(), "x".into()]];
        assert_eq!(align(&rows), "A     B\nlong  x\n");
    }

    #[test]
    fn draws_a_timeline() {
        let step = |step: &str, ms| TimelineStep {
            step: step.into(),
            ms,
        };
        let text = timeline(&[
            step("request-received", 0.0),
            step("vm-created", 3.0),
            step("init", 4.0),
        ]);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 4);
        assert!(
            lines[2].contains("3.00") && lines[2].ends_with(&"#".repeat(30)),
            "{text}"
        );
        assert!(lines[3].contains("1.00") && lines[3].contains("init"), "{text}");
        assert_eq!(timeline(&[]).lines().count(), 1);
    }

    #[test]
    fn tells_the_age() {
        assert_eq!(age(u64::MAX), "0 s");
        assert!(age(0).ends_with(" d"));
        assert_eq!(
            (size_mib(128), size_mib(2048)),
            ("128 MiB".into(), "2 GiB".into())
        );
    }
}
