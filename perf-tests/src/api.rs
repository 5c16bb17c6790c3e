//! Latency of each call of the API, against the number of guests that run.

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::boot::{bar, ms};
use crate::daemon::{Census, Client, Daemon};
use crate::hdr::Latencies;
use crate::results::{Measured, count};
use crate::signal::interrupted;

/// What [`probe`] measures.
pub const PROBE: &str =
    "shoald on this machine with idle probe guests, calls one after another on one connection";
/// What [`lab`] measures.
pub const LAB: &str =
    "shoald in the lab with idle probe guests, calls one after another, time counted in instructions";

/// Points of a result, and calls of a point, at most.
const MAX_POINTS: usize = 64;

/// What is called, in the order of a round.
pub const CALLS: [&str; 7] = [
    "GET health",
    "GET guests",
    "POST guests",
    "POST start",
    "GET guest",
    "POST stop",
    "DELETE guest",
];

/// Calls of the API.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct Api {
    /// The guests were jailed.
    pub jailed: bool,
    /// For each number of guests.
    pub points: Vec<ApiPoint>,
    /// What was left when all guests had been deleted.
    pub leaks: Census,
}

/// Calls with some guests running.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct ApiPoint {
    /// How many.
    pub guests: u32,
    /// Each call.
    pub calls: Vec<Latencies>,
}

impl Api {
    /// Refuses what cannot be.
    pub fn check(&self) -> Result<(), String> {
        count("points", self.points.len(), MAX_POINTS)?;
        for point in &self.points {
            count("calls", point.calls.len(), MAX_POINTS)?;
            point.calls.iter().try_for_each(Latencies::check)?;
        }
        Ok(())
    }
}

/// What `api` is asked for.
#[derive(clap::Args)]
pub struct ApiArgs {
    /// Numbers of guests that run meanwhile, rising
    #[arg(long, value_delimiter = ',', default_value = "0,50,200", value_name = "N,…")]
    guests: Vec<u32>,
    /// Rounds of calls for each number of guests
    #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rounds: u32,
    /// Without jail and filters, for comparison
    #[arg(long)]
    no_jail: bool,
}

impl Default for ApiArgs {
    fn default() -> Self {
        Self {
            guests: vec![0, 50, 200],
            rounds: 40,
            no_jail: false,
        }
    }
}

/// Starts a daemon, and guests up to each number, and times the calls.
pub fn probe(args: &ApiArgs) -> Result<Api> {
    if args.guests.is_empty() || !args.guests.is_sorted_by(|a, b| a < b) {
        bail!("the numbers of guests have to rise: --guests 0,50,200, for one");
    }
    let daemon = Daemon::start(!args.no_jail)?;
    let mut client = daemon.connect()?;
    // The first guest makes what the daemon keeps: the kernel in memory, a jailer, a cgroup.
    round(&daemon, &mut client)?;
    let before = daemon.census()?;
    let (mut points, mut ids) = (Vec::new(), Vec::new());
    for &guests in &args.guests {
        if !fill(&daemon, &mut client, &mut ids, guests)? {
            break;
        }
        if let Some(calls) = rounds(&daemon, &mut client, args.rounds)? {
            points.push(ApiPoint { guests, calls });
        }
    }
    for id in &ids {
        client.call("DELETE", &format!("/v1/guests/{id}?force=true"), None, 204)?;
    }
    let leaks = daemon.census()?.beyond(&before);
    if points.is_empty() {
        bail!("interrupted before the first round was done");
    }
    Ok(Api {
        jailed: !args.no_jail,
        points,
        leaks,
    })
}

/// Starts guests until there are `guests`; false if that was interrupted.
fn fill(daemon: &Daemon, client: &mut Client, ids: &mut Vec<String>, guests: u32) -> Result<bool> {
    let progress = bar(guests, "guests");
    progress.set_position(ids.len() as u64);
    while ids.len() < guests as usize {
        if interrupted() {
            return Ok(false);
        }
        let (_, guest) = client.call("POST", "/v1/guests", Some(&daemon.guest(true)), 201)?;
        ids.push(id(&guest)?);
        progress.inc(1);
    }
    progress.finish_and_clear();
    Ok(true)
}

/// The id in an answer that describes a guest.
pub fn id(guest: &Value) -> Result<String> {
    match guest["id"].as_str() {
        Some(id) => Ok(id.to_owned()),
        None => bail!("the daemon described a guest without an id: {guest}"),
    }
}

/// The latencies of all whole rounds; none if the first was interrupted.
fn rounds(daemon: &Daemon, client: &mut Client, rounds: u32) -> Result<Option<Vec<Latencies>>> {
    let mut samples: [Vec<f64>; CALLS.len()] = Default::default();
    let progress = bar(rounds, "rounds");
    for _ in 0..rounds {
        if interrupted() {
            break;
        }
        for (all, sample) in samples.iter_mut().zip(round(daemon, client)?) {
            all.push(sample);
        }
        progress.inc(1);
    }
    progress.finish_and_clear();
    let any = !samples[0].is_empty();
    let named = CALLS.iter().zip(samples);
    Ok(any.then(|| named.map(|(name, s)| Latencies::new(name, s)).collect()))
}

/// The life of one guest, call by call; how long each of [`CALLS`] took (ms).
fn round(daemon: &Daemon, client: &mut Client) -> Result<[f64; CALLS.len()]> {
    let mut took = [0.0; CALLS.len()];
    let mut guest = String::new();
    for (name, took) in CALLS.iter().zip(&mut took) {
        (*took, guest) = call(name, daemon, client, guest)?;
    }
    Ok(took)
}

/// Does the call `name` of [`CALLS`] on a round's guest; how long it took (ms), and the guest.
pub fn call(name: &str, daemon: &Daemon, client: &mut Client, guest: String) -> Result<(f64, String)> {
    let path = format!("/v1/guests/{guest}");
    let (elapsed, answer) = match name {
        "GET health" => client.call("GET", "/v1/health", None, 200)?,
        "GET guests" => client.call("GET", "/v1/guests", None, 200)?,
        "POST guests" => client.call("POST", "/v1/guests", Some(&daemon.guest(false)), 201)?,
        "POST start" => client.call("POST", &format!("{path}/start"), Some(&json!({})), 200)?,
        "GET guest" => client.call("GET", &path, None, 200)?,
        "POST stop" => client.call(
            "POST",
            &format!("{path}/stop"),
            Some(&json!({ "deadline_ms": 0 })),
            200,
        )?,
        _ => client.call("DELETE", &path, None, 204)?,
    };
    let guest = match name {
        "POST guests" => id(&answer)?,
        _ => guest,
    };
    Ok((ms(elapsed), guest))
}

/// The same in the lab.
pub fn lab(args: &ApiArgs) -> Result<Api> {
    let numbers: Vec<String> = args.guests.iter().map(u32::to_string).collect();
    let mut inside: Vec<std::ffi::OsString> = ["api", "--probe", "--json", "--guests"].map(Into::into).into();
    inside.extend([numbers.join(","), "--rounds".into(), args.rounds.to_string()].map(Into::into));
    if args.no_jail {
        inside.push("--no-jail".into());
    }
    match crate::lab::run(&inside, &[&crate::driver::sibling("shoald")?])?.measured {
        Measured::Api(api) => Ok(api),
        _ => bail!("the lab printed another kind of result than calls of the API"),
    }
}

/// Prints the result as a table.
pub fn print(api: &Api) {
    let jailed = if api.jailed { "jailed" } else { "not jailed" };
    println!("latency of each call (ms), guests {jailed}:");
    for point in &api.points {
        println!(
            "  with {} guests running   median       p90       p99       max",
            point.guests
        );
        for c in &point.calls {
            println!(
                "    {:<20} {:9.3} {:9.3} {:9.3} {:9.3}",
                c.name, c.median_ms, c.p90_ms, c.p99_ms, c.max_ms
            );
        }
    }
    print_leaks(&api.leaks);
}

/// Prints what was left behind.
pub fn print_leaks(leaks: &Census) {
    let rows = leaks.rows().map(|(name, n)| format!("{n} {name}"));
    println!("  left behind: {}", rows.join(", "));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_to_rise() {
        for guests in [vec![], vec![5, 5], vec![5, 1]] {
            let args = ApiArgs {
                guests,
                ..ApiArgs::default()
            };
            assert!(probe(&args).unwrap_err().to_string().contains("have to rise"));
        }
    }

    #[test]
    fn a_guest_without_an_id_is_told() {
        assert_eq!(id(&json!({"id": "a"})).unwrap(), "a");
        assert!(id(&json!([1])).unwrap_err().to_string().contains("[1]"));
    }
}
