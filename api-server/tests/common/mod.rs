//! A daemon on a socket of its own, and a client that can say anything to it.
//!
//! The programs are taken from `SHOAL_BIN_DIR`, else from cargo's target directory; `make test` builds them first. A
//! test that needs `/dev/kvm` says `SKIP: name: reason` where there is none.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use serde_json::{Value, json};

/// How long anything may take before a test gives up on it.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// True, after saying so, when the test `name` cannot run because KVM does not open.
pub fn skip_without_kvm(name: &str) -> bool {
    let opened = fs::File::options().read(true).write(true).open("/dev/kvm");
    if let Err(e) = &opened {
        eprintln!("SKIP: {name}: /dev/kvm cannot be opened: {e}");
    }
    opened.is_err()
}

/// One of the workspace's programs.
pub fn program(name: &str) -> PathBuf {
    let built = Path::new(env!("CARGO_BIN_EXE_shoald"))
        .parent()
        .expect("a program lies in a folder");
    let candidates = match std::env::var_os("SHOAL_BIN_DIR") {
        Some(dir) => vec![PathBuf::from(dir).join(name)],
        None => vec![built.join(name), built.with_file_name("vmm").join(name)],
    };
    candidates.iter().find(|p| p.exists()).cloned().unwrap_or_else(|| {
        panic!("{name} is at none of {candidates:?}; build it (cargo build -p {name} --profile vmm) or set SHOAL_BIN_DIR")
    })
}

/// A running daemon. Its directory goes with it.
pub struct Daemon {
    child: Child,
    /// The rest of what it says; without a reader it would block some day.
    said: Option<std::thread::JoinHandle<String>>,
    pub dir: Dir,
}

/// Where a daemon's socket, state and the test's files lie.
pub struct Dir(tempfile::TempDir);

impl Dir {
    pub fn new() -> Self {
        let dir = Self(tempfile::tempdir().expect("a temporary directory"));
        fs::write(dir.path("probe.elf"), shoal_probe::PROBE).expect("writing the probe");
        dir
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn socket(&self) -> PathBuf {
        self.path("s")
    }

    /// What the daemon keeps about its guests: the names in `guests/`.
    pub fn guests(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path("state/guests"));
        // It is missing until a daemon makes it.
        let entries = entries.into_iter().flatten();
        entries
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    pub fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_shoald"));
        if std::env::var_os("SHOAL_BIN_DIR").is_some() {
            command = Command::new(program("shoald"));
        }
        command
            .arg("--socket")
            .arg(self.socket())
            .arg("--state")
            .arg(self.path("state"));
        command
            .arg("--vmm")
            .arg(program("shoal-vmm"))
            .stderr(Stdio::piped())
            .stdin(Stdio::null());
        command
    }

    /// A description of a guest that does what the probe's words in `cmdline` say.
    pub fn guest(&self, cmdline: &str) -> Value {
        json!({"kernel": {"path": self.path("probe.elf"), "cmdline": cmdline}, "memory_mib": 32, "start": true})
    }
}

impl Daemon {
    pub fn start() -> Self {
        Self::start_in(Dir::new(), &[])
    }

    /// Starts a daemon and waits until it says that it is ready.
    pub fn start_in(dir: Dir, more: &[&str]) -> Self {
        let mut child = dir.command().args(more).spawn().expect("starting shoald");
        let mut lines = BufReader::new(child.stderr.take().expect("it is piped"));
        let mut said = String::new();
        while !said.contains("ready") {
            let n = lines.read_line(&mut said).expect("reading what shoald says");
            assert!(n > 0, "shoald ended instead of becoming ready: {said}");
        }
        let said = std::thread::spawn(move || {
            // What is no UTF-8 ends it; the assertions on it will tell.
            let _ = lines.read_to_string(&mut said);
            said
        });
        Self {
            child,
            said: Some(said),
            dir,
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("the daemon lives");
    }

    /// Ends the daemon by a signal; gives what it said and its directory.
    pub fn end(mut self, signal: Signal) -> (String, Dir) {
        self.signal(signal);
        self.child.wait().expect("it is a child");
        let said = self
            .said
            .take()
            .expect("taken once")
            .join()
            .expect("reading does not panic");
        let dir = std::mem::replace(
            &mut self.dir,
            Dir(tempfile::tempdir().expect("a temporary directory")),
        );
        (said, dir)
    }

    pub fn client(&self) -> Client {
        Client {
            socket: self.dir.socket(),
        }
    }

    /// Asserts that it answers and knows `guests` guests.
    pub fn assert_well(&self, guests: usize) {
        let health = self.client().get("/v1/health");
        assert_eq!(
            (health.status, &health.json()["guests"]),
            (200, &json!(guests)),
            "{health:?}"
        );
        assert_eq!(
            self.dir.guests().len(),
            guests,
            "directories in the state directory"
        );
        assert_eq!(
            vmms(&self.dir).len() as u64,
            health.json()["running"].as_u64().unwrap(),
            "VMM processes"
        );
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Guests outlive a daemon; these must not outlive their test.
        let _ = self.child.kill();
        let _ = self.child.wait();
        for pid in vmms(&self.dir) {
            end_process(pid);
        }
    }
}

/// The VMMs whose log lies in `dir`, zombies aside. An ordinary user may not see what a jailed VMM has open: then those
/// that name one of the guests of `dir`.
pub fn vmms(dir: &Dir) -> Vec<u32> {
    let state = dir.path("state");
    let guests = dir.guests();
    let pids = fs::read_dir("/proc")
        .expect("reading /proc")
        .filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok());
    pids.filter(|pid: &u32| {
        let Err(error) = fs::read_dir(format!("/proc/{pid}/fd")) else {
            return fs::read_link(format!("/proc/{pid}/fd/2")).is_ok_and(|log| log.starts_with(&state));
        };
        let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<_> = words.split(|b| *b == 0).collect();
        error.kind() == std::io::ErrorKind::PermissionDenied
            && words.contains(&&b"--guest-id"[..])
            && guests.iter().any(|id| words.contains(&id.as_bytes()))
    })
    .collect()
}

fn pidfd(pid: u32) -> Option<std::os::fd::OwnedFd> {
    pidfd_open(Pid::from_raw(pid as i32)?, PidfdFlags::empty()).ok()
}

/// Kills a process that need not be a child, and waits for its end.
pub fn end_process(pid: u32) {
    let Some(fd) = pidfd(pid) else { return };
    let _ = rustix::process::pidfd_send_signal(&fd, Signal::KILL);
    wait_fd(&fd);
}

/// Waits for the end of a process that need not be a child.
pub fn wait_process(pid: u32) {
    if let Some(fd) = pidfd(pid) {
        wait_fd(&fd);
    }
}

fn wait_fd(fd: &std::os::fd::OwnedFd) {
    let patience = Timespec {
        tv_sec: PATIENCE.as_secs() as i64,
        tv_nsec: 0,
    };
    let ready = poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&patience)).expect("polling a pidfd");
    assert_eq!(ready, 1, "a process does not end");
}

/// Says anything to a daemon.
#[derive(Clone)]
pub struct Client {
    pub socket: PathBuf,
}

/// What it answered.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: HashMap<String, String>,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// Asserts that it is a whole problem document.
    #[track_caller]
    pub fn assert_problem(&self, status: u16, field: Option<&str>, detail: &str) {
        assert_eq!(self.status, status, "{}", self.text());
        assert_eq!(
            self.headers.get("content-type").map(String::as_str),
            Some("application/problem+json")
        );
        let problem = self.json();
        assert_eq!(problem["status"], status);
        assert_eq!(problem.get("field").and_then(Value::as_str), field, "{problem}");
        let said = problem["detail"].as_str().expect("a detail");
        assert!(said.contains(detail), "{said:?} should tell of {detail:?}");
        for name in ["type", "title", "instance"] {
            assert!(problem[name].is_string(), "{name} of {problem}");
        }
    }
}

impl Client {
    pub fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.socket).expect("connecting to shoald");
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    pub fn get(&self, path: &str) -> Answer {
        self.send("GET", path, None)
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.send("POST", path, Some(body.to_string().as_bytes()))
    }

    pub fn delete(&self, path: &str) -> Answer {
        self.send("DELETE", path, None)
    }

    pub fn send(&self, method: &str, path: &str, body: Option<&[u8]>) -> Answer {
        let mut head = format!("{method} {path} HTTP/1.1\r\nhost: shoal\r\nconnection: close\r\n");
        if let Some(body) = body {
            head += &format!(
                "content-type: application/json\r\ncontent-length: {}\r\n",
                body.len()
            );
        }
        self.raw(&[(head + "\r\n").as_bytes(), body.unwrap_or_default()].concat())
    }

    /// Sends these bytes on a connection of their own and reads the answer.
    #[track_caller]
    pub fn raw(&self, bytes: &[u8]) -> Answer {
        let mut stream = self.connect();
        // A daemon that has answered already may close; what it answered counts.
        let _ = stream.write_all(bytes);
        read_answer(&mut BufReader::new(stream))
    }

    /// Creates a guest and gives what the daemon says about it.
    #[track_caller]
    pub fn create(&self, guest: &Value) -> Value {
        let answer = self.post("/v1/guests", guest);
        assert_eq!(answer.status, 201, "{}", answer.text());
        answer.json()
    }

    /// Waits until a guest is in `state`, by following its console, which ends with the guest.
    #[track_caller]
    pub fn await_end(&self, id: &str) -> Value {
        let followed = self.get(&format!("/v1/guests/{id}/console?follow=true"));
        assert_eq!(followed.status, 200, "{followed:?}");
        let guest = self.get(&format!("/v1/guests/{id}")).json();
        assert_eq!(guest["state"], "stopped", "{guest}");
        guest
    }

    /// Asks for a guest until a step stands in its timeline: the VMM tells of steps after they came to pass.
    pub fn await_step(&self, id: &str, step: &str) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let guest = self.get(&format!("/v1/guests/{id}")).json();
            let steps = guest["timeline"].as_array().expect("a timeline");
            if steps.iter().any(|s| s["step"] == step) {
                return guest;
            }
            assert!(Instant::now() < deadline, "no {step} in {guest}");
        }
    }

    /// Follows a console until `text` was printed.
    pub fn await_output(&self, id: &str, text: &str) {
        let mut stream = self.connect();
        let request = format!("GET /v1/guests/{id}/console?follow=true HTTP/1.1\r\nhost: shoal\r\n\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        let mut stream = BufReader::new(stream);
        let (status, headers) = read_head(&mut stream);
        assert_eq!(status, 200, "{headers:?}");
        let mut seen = Vec::new();
        while !String::from_utf8_lossy(&seen).contains(text) {
            let more = read_chunk(&mut stream, &mut seen);
            assert!(
                more,
                "the guest ended without {text:?}: {:?}",
                String::from_utf8_lossy(&seen)
            );
        }
    }
}

fn read_head(stream: &mut BufReader<UnixStream>) -> (u16, HashMap<String, String>) {
    let mut line = String::new();
    stream.read_line(&mut line).expect("reading an answer");
    let status = line.split(' ').nth(1).and_then(|s| s.parse().ok());
    let status = status.unwrap_or_else(|| panic!("no answer: {line:?}"));
    let mut headers = HashMap::new();
    loop {
        line.clear();
        stream.read_line(&mut line).expect("reading a header");
        match line.trim_end().split_once(": ") {
            Some((name, value)) => drop(headers.insert(name.to_lowercase(), value.to_owned())),
            None => return (status, headers),
        }
    }
}

/// Reads one chunk of a body; false when it was the last.
fn read_chunk(stream: &mut BufReader<UnixStream>, body: &mut Vec<u8>) -> bool {
    let mut line = String::new();
    stream.read_line(&mut line).expect("reading a chunk's length");
    let len = usize::from_str_radix(line.trim(), 16).unwrap_or_else(|e| panic!("{e}: {line:?}"));
    let mut chunk = vec![0; len + 2];
    stream.read_exact(&mut chunk).expect("reading a chunk");
    body.extend(&chunk[..len]);
    len > 0
}

/// Reads one answer: by length, or in chunks.
pub fn read_answer(stream: &mut BufReader<UnixStream>) -> Answer {
    let (status, headers) = read_head(stream);
    let mut body = Vec::new();
    if headers.get("transfer-encoding").is_some_and(|e| e == "chunked") {
        while read_chunk(stream, &mut body) {}
    } else if let Some(len) = headers.get("content-length") {
        body.resize(len.parse().expect("a length"), 0);
        stream.read_exact(&mut body).expect("reading a body");
    }
    Answer {
        status,
        headers,
        body,
    }
}
