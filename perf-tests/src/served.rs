//! A boot as users have it: a request to a daemon, a jailed VMM, Shoal's image on a disk, from the request to the workload.

use std::io::Read;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::api::id;
use crate::boot::{bar, ms};
use crate::daemon::{Client, Daemon};
use crate::driver::{images, sibling};
use crate::linux::IMAGE_MARKER;
use crate::results::{LinuxBoot, Measured, Stage};
use crate::signal::interrupted;
use crate::stats::median;

/// What [`here`] measures.
pub const HERE: &str = "Linux guest of a daemon on /dev/kvm, jailed, from the request on";
/// What [`lab`] measures.
pub const LAB: &str =
    "Linux guest of a daemon in the lab, jailed, from the request on, time counted in instructions";

const GUEST: &str = "Shoal's image on a disk, started by the daemon";
/// As `shoal run` has it.
const CMDLINE: &str = "console=ttyS0 root=/dev/vda rootfstype=erofs ro panic=-1 quiet -- sleep 600";
/// The daemon's name for the step after which the workload runs.
const LAST_STEP: &str = "workload";
/// The guest has said by then what the daemon is about to hear of.
const TRIES: u32 = 100;

/// Files of the image.
struct Image {
    kernel: PathBuf,
    disk: PathBuf,
}

impl Image {
    fn find() -> Result<Self> {
        let folder = images()?;
        // By the same path in the lab.
        let file = |name: &str| {
            let path = folder.join(name);
            ensure!(path.is_file(), "{} is missing: run `make images`", path.display());
            Ok(path)
        };
        Ok(Self {
            kernel: file("vmlinux")?,
            disk: file("rootfs.erofs")?,
        })
    }
}

/// On this machine's /dev/kvm.
pub fn here(runs: u32) -> Result<LinuxBoot> {
    let image = Image::find()?;
    let guest = json!({
        "kernel": { "path": image.kernel, "cmdline": CMDLINE },
        "disks": [{ "path": image.disk, "read_only": true }],
        "memory_mib": 128,
        "start": true,
    });
    let daemon = Daemon::start(true)?;
    let mut client = daemon.connect()?;
    let (mut samples, mut timelines) = (Vec::new(), Vec::new());
    let progress = bar(runs, "boots");
    // The daemon loads the kernel for the first one.
    for run in 0..runs + 1 {
        if interrupted() {
            break;
        }
        let (took, timeline) = once(&daemon, &mut client, &guest)?;
        if run > 0 {
            samples.push(took);
            timelines.push(timeline);
            progress.inc(1);
        }
    }
    progress.finish_and_clear();
    if samples.is_empty() {
        bail!("interrupted before the first boot was measured");
    }
    let mut stages = medians(&timelines);
    stages.push(Stage {
        step: "output-read".into(),
        at_ms: median(&samples),
    });
    Ok(LinuxBoot::new(GUEST.into(), samples, stages))
}

/// One boot: how long it took until the guest's output could be read (ms), and the daemon's timeline.
fn once(daemon: &Daemon, client: &mut Client, guest: &Value) -> Result<(f64, Vec<Stage>)> {
    let begin = std::time::Instant::now();
    let (_, created) = client.call("POST", "/v1/guests", Some(guest), 201)?;
    let id = id(&created)?;
    await_marker(daemon, &id)?;
    let took = ms(begin.elapsed());
    let timeline = complete_timeline(client, &id);
    client.call("DELETE", &format!("/v1/guests/{id}?force=true"), None, 204)?;
    Ok((took, timeline?))
}

/// Reads the guest's console until it says that it is ready.
fn await_marker(daemon: &Daemon, id: &str) -> Result<()> {
    let mut console = daemon
        .connect()?
        .stream(&format!("/v1/guests/{id}/console?follow=true"))?;
    let marker = IMAGE_MARKER.as_bytes();
    let (mut said, mut piece) = (Vec::new(), [0; 4096]);
    while !said.windows(marker.len()).any(|w| w == marker) {
        let n = console.read(&mut piece).context("reading the guest's console")?;
        if n == 0 || said.len() > 1 << 20 {
            bail!(
                "the guest did not say {IMAGE_MARKER:?} but {:?}",
                String::from_utf8_lossy(&said[..said.len().min(2000)])
            );
        }
        said.extend_from_slice(&piece[..n]);
    }
    Ok(())
}

/// The timeline with its last step, which the VMM may be telling just now.
fn complete_timeline(client: &mut Client, id: &str) -> Result<Vec<Stage>> {
    for _ in 0..TRIES {
        let (_, guest) = client.call("GET", &format!("/v1/guests/{id}"), None, 200)?;
        let stages = timeline(&guest)?;
        if stages.iter().any(|s| s.step == LAST_STEP) {
            return Ok(stages);
        }
    }
    bail!("the daemon's timeline has no step {LAST_STEP:?}");
}

fn timeline(guest: &Value) -> Result<Vec<Stage>> {
    let steps = guest["timeline"].as_array();
    let stage = |s: &Value| {
        Some(Stage {
            step: s["step"].as_str()?.into(),
            at_ms: s["ms"].as_f64()?,
        })
    };
    let stages: Option<Vec<Stage>> = steps.and_then(|all| all.iter().map(stage).collect());
    stages.with_context(|| format!("the daemon described a guest without a timeline: {guest}"))
}

/// When each step that all boots have was reached (medians), in the order of time.
fn medians(timelines: &[Vec<Stage>]) -> Vec<Stage> {
    let first = timelines.first().map_or(&[][..], Vec::as_slice);
    let of = |name: &str| -> Option<Vec<f64>> {
        let at = |t: &Vec<Stage>| t.iter().find(|s| s.step == name).map(|s| s.at_ms);
        timelines.iter().map(at).collect()
    };
    let named = first.iter().filter_map(|s| Some((s, of(&s.step)?)));
    let mut stages: Vec<Stage> = named
        .map(|(s, samples)| Stage {
            step: s.step.clone(),
            at_ms: median(&samples),
        })
        .collect();
    stages.sort_by(|a, b| a.at_ms.total_cmp(&b.at_ms));
    stages
}

/// The same in the lab.
pub fn lab(runs: u32) -> Result<LinuxBoot> {
    let image = Image::find()?;
    let mut inside: Vec<std::ffi::OsString> = ["boot", "--here", "--daemon", "--json", "--runs"]
        .map(Into::into)
        .into();
    inside.push(runs.to_string().into());
    match crate::lab::run(&inside, &[&sibling("shoald")?, &image.kernel, &image.disk])?.measured {
        Measured::BootLinux(boot) => Ok(boot),
        _ => bail!("the lab printed another kind of result than a boot"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timelines_are_read_and_their_common_steps_kept() {
        let guest = |ms: f64| json!({"timeline": [{"step": "b", "ms": ms}, {"step": "a", "ms": 1.0}, {"step": format!("{ms}"), "ms": 9.0}]});
        let all: Vec<_> = [3.0, 2.0, 4.0].map(|ms| timeline(&guest(ms)).unwrap()).into();
        let kept: Vec<_> = medians(&all).into_iter().map(|s| (s.step, s.at_ms)).collect();
        assert_eq!(kept, [("a".into(), 1.0), ("b".into(), 3.0)]);
        assert!(medians(&[]).is_empty());
        for bad in [
            json!({}),
            json!({"timeline": [{"step": "a"}]}),
            json!({"timeline": 1}),
        ] {
            assert!(timeline(&bad).unwrap_err().to_string().contains("timeline"));
        }
    }
}
