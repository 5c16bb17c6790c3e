//! The small commands.

use std::io::Write;

use anyhow::{Context, Result};
use http_body_util::BodyExt;
use hyper::Method;
use shoal_api_types::{Guest, GuestState, Guests, StopGuest};

use crate::client::{Client, guest_path};
use crate::{devices, error, output};

/// Prints to standard output; a reader that has gone away (`| head`) ends the program quietly.
pub fn print(text: &str) -> Result<()> {
    print_bytes(text.as_bytes())
}

fn print_bytes(bytes: &[u8]) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        result => result.context("writing to standard output"),
    }
}

/// `shoal ps`.
pub async fn ps(client: &Client, all: bool, json: bool) -> Result<()> {
    let mut guests: Guests = client.get("/v1/guests").await?;
    let live = |g: &Guest| {
        matches!(
            g.state,
            GuestState::Starting | GuestState::Running | GuestState::Stopping
        )
    };
    guests.guests.retain(|g| all || live(g));
    if json {
        print(&(serde_json::to_string_pretty(&guests)? + "\n"))
    } else {
        print(&output::table(&guests.guests))
    }
}

/// `shoal show`.
pub async fn show(client: &Client, guest: &str, json: bool) -> Result<()> {
    let guest: Guest = client.get(&guest_path(guest, "")).await?;
    if json {
        print(&(serde_json::to_string_pretty(&guest)? + "\n"))
    } else {
        print(&output::details(&guest))
    }
}

/// `shoal logs`.
pub async fn logs(client: &Client, guest: &str, follow: bool) -> Result<()> {
    let path = guest_path(
        guest,
        if follow {
            "/console?follow=true"
        } else {
            "/console"
        },
    );
    let mut body = client.send(Method::GET, &path, "", Vec::new()).await?.into_body();
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame.context("reading the console")?.into_data() {
            print_bytes(&data)?;
        }
    }
    Ok(())
}

/// `shoal start`.
pub async fn start(client: &Client, guests: &[String]) -> Result<()> {
    each(guests, async |guest| {
        let guest: Guest = client
            .post(&guest_path(guest, "/start"), &serde_json::json!({}))
            .await?;
        print(&format!("{}\n", guest.id))
    })
    .await
}

/// `shoal stop`.
pub async fn stop(client: &Client, guests: &[String], timeout: f64) -> Result<()> {
    let body = StopGuest {
        deadline_ms: (timeout * 1000.0) as u64,
    };
    each(guests, async |guest| {
        let guest: Guest = client.post(&guest_path(guest, "/stop"), &body).await?;
        let how = guest.stopped.map(|s| s.detail).unwrap_or_default();
        print(&format!("{}: {how}\n", guest.id))
    })
    .await
}

/// `shoal limit`.
pub async fn limit(client: &Client, guest: &str, device: &str, limits: &[String]) -> Result<()> {
    let body = devices::set_limits(device, limits)?;
    let guest: Guest = client.patch(&guest_path(guest, "/limits"), &body).await?;
    print(&format!("{}\n", guest.id))
}

/// `shoal rm`.
pub async fn rm(client: &Client, guests: &[String], force: bool) -> Result<()> {
    let rest = if force { "?force=true" } else { "" };
    each(guests, async |guest| {
        client.delete(&guest_path(guest, rest)).await
    })
    .await
}

/// Does something to each guest; tells the errors of all but the last that failed, and returns that.
async fn each(guests: &[String], mut act: impl AsyncFnMut(&str) -> Result<()>) -> Result<()> {
    let mut failed = None;
    for guest in guests {
        if let Err(error) = act(guest).await
            && let Some(earlier) = failed.replace(error)
        {
            eprint!("{}", error::describe(&earlier));
        }
    }
    failed.map_or(Ok(()), Err)
}
