//! Killing the daemon or a VMM at any of its steps, from the request to start a guest to its removal, leaves nothing behind:
//! no process, no cgroup, no file, no record.

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use common::{Client, Daemon, Dir, PATIENCE, program, skip_without_kvm, vmms};
use rustix::process::{Pid, Signal, kill_process};

/// Every how many of a process's system calls it is killed. With SHOAL_EVERY_STEP=1 at each, which takes minutes.
fn stride() -> u64 {
    let stride = std::env::var("SHOAL_EVERY_STEP").ok();
    stride.map_or(STRIDE, |text| text.parse().expect("SHOAL_EVERY_STEP is a number"))
}

/// Has no common factor with the length of a loop that calls the kernel twice, thrice or five times a turn.
const STRIDE: u64 = 7;

/// A cgroup for the guests of one test, where there is version 2.
struct Cgroup(Option<PathBuf>);

impl Cgroup {
    fn new(test: &str) -> Cgroup {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let mount = mounts.lines().find_map(|line| {
            let mut words = line.split(' ').skip(1);
            let (place, kind) = (words.next()?, words.next()?);
            (kind == "cgroup2").then(|| PathBuf::from(place))
        });
        let path = mount.map(|mount| mount.join(format!("shoal-steps-{}", std::process::id())));
        let made = path.filter(|path| fs::create_dir(path).is_ok());
        if made.is_none() {
            println!("SKIP: {test} (cgroups): none of version 2 can be made");
        }
        Cgroup(made)
    }

    fn leaves(&self) -> Vec<String> {
        let entries = self.0.iter().flat_map(|path| fs::read_dir(path).unwrap());
        let directories = entries.map(Result::unwrap).filter(|entry| entry.path().is_dir());
        directories
            .map(|entry| entry.file_name().into_string().unwrap())
            .collect()
    }

    fn arguments(&self) -> Vec<&str> {
        let path = self
            .0
            .iter()
            .flat_map(|path| ["--cgroup", path.to_str().unwrap()]);
        path.collect()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Some(path) = &self.0
            && let Err(error) = fs::remove_dir(path)
        {
            println!("{path:?} is left: {error}");
        }
    }
}

/// A daemon below `shoal-escape kill-at`.
struct Doomed {
    tool: Child,
    said: BufReader<std::process::ChildStderr>,
}

impl Doomed {
    fn start(dir: &Dir, cgroup: &Cgroup, options: &[&str]) -> Doomed {
        let mut daemon = dir.command();
        daemon.args(cgroup.arguments());
        let mut tool = Command::new(program("shoal-escape"));
        tool.arg("kill-at")
            .args(options)
            .arg("--")
            .arg(daemon.get_program());
        tool.args(daemon.get_args()).stdin(Stdio::null());
        let mut tool = tool
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(tool.stderr.take().unwrap());
        let mut line = String::new();
        // It may be dead before it is ready.
        while !line.contains(" ready") {
            line.clear();
            if said.read_line(&mut line).unwrap() == 0 {
                break;
            }
        }
        Doomed { tool, said }
    }

    /// Asks the daemon to end, if it lives, and gives what became of it: `killed CALL` or `passed`, and the number of
    /// processes.
    fn end(mut self) -> (bool, usize, String) {
        let children = format!("/proc/{0}/task/{0}/children", self.tool.id());
        let children = fs::read_to_string(children).unwrap_or_default();
        for child in children
            .split_whitespace()
            .filter_map(|pid| Pid::from_raw(pid.parse().ok()?))
        {
            // It may have been killed since.
            let _ = kill_process(child, Signal::TERM);
        }
        let (mut text, mut errors) = (String::new(), String::new());
        self.tool
            .stdout
            .take()
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        self.said.read_to_string(&mut errors).unwrap();
        let code = self.tool.wait().unwrap().code();
        assert!(matches!(code, Some(0 | 1)), "{code:?}: {text}{errors}");
        let processes = text
            .split(", ")
            .find_map(|part| part.strip_prefix("processes ")?.parse().ok());
        (
            code == Some(0),
            processes.expect("it counts them"),
            text.trim().to_owned(),
        )
    }
}

/// Whether the processes of a daemon can be traced; says so when not.
fn skip(test: &str) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let traced = !status.lines().any(|line| line == "TracerPid:\t0");
    if traced {
        println!("SKIP: {test}: it is traced itself, and nobody can be traced by two");
    }
    traced || skip_without_kvm(test)
}

/// A request whose answer may not come.
fn ask(dir: &Dir, request: &str) -> Option<String> {
    let mut stream = UnixStream::connect(dir.socket()).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    answer.starts_with("HTTP/1.1 ").then_some(answer)
}

/// Asks for a guest, and for the removal of the one that was made.
fn come_and_go(dir: &Dir) {
    let body = dir.guest("exit=halt").to_string();
    let head = "host: shoal\r\nconnection: close\r\ncontent-type: application/json";
    let length = body.len();
    let answer = ask(
        dir,
        &format!("POST /v1/guests HTTP/1.1\r\n{head}\r\ncontent-length: {length}\r\n\r\n{body}"),
    );
    let answer = answer.unwrap_or_default();
    if let Some(id) = answer
        .split("\"id\":\"")
        .nth(1)
        .and_then(|rest| rest.split('"').next())
    {
        ask(
            dir,
            &format!("DELETE /v1/guests/{id}?force=true HTTP/1.1\r\n{head}\r\n\r\n"),
        );
    }
}

/// A daemon removes all guests that it knows, and nothing is left.
fn nothing_left(dir: Dir, cgroup: &Cgroup, what: &str) {
    let daemon = Daemon::start_in(dir, &cgroup.arguments());
    let client: Client = daemon.client();
    let guests = client.get("/v1/guests").json();
    for guest in guests["guests"].as_array().unwrap_or_else(|| panic!("{guests}")) {
        let id = guest["id"].as_str().unwrap();
        let deleted = client.delete(&format!("/v1/guests/{id}?force=true"));
        assert_eq!(deleted.status, 204, "{what}: {}", deleted.text());
    }
    daemon.assert_well(0);
    let (_, dir) = daemon.end(Signal::TERM);
    assert_eq!(vmms(&dir), [0; 0], "{what}");
    assert_eq!(dir.guests(), [""; 0], "{what}");
    assert_eq!(cgroup.leaves(), [""; 0], "{what}");
}

/// Kills the `victim`th process at its calls `first`, `first + stride` and so on, until it makes fewer. Gives how often, and
/// of how many processes.
fn every_step(cgroup: &Cgroup, victim: usize, more: &[&str]) -> (u64, usize) {
    let (mut killed, mut call) = (0, 1);
    loop {
        let dir = Dir::new();
        let (victim_word, call_word) = (victim.to_string(), call.to_string());
        let options = [&[victim_word.as_str(), call_word.as_str()], more].concat();
        let doomed = Doomed::start(&dir, cgroup, &options);
        come_and_go(&dir);
        let (hit, processes, text) = doomed.end();
        nothing_left(
            dir,
            cgroup,
            &format!("process {victim} at its call {call}: {text}"),
        );
        if !hit {
            return (killed, processes);
        }
        killed += 1;
        call += stride();
    }
}

#[test]
fn a_daemon_killed_at_any_step_leaves_nothing() {
    let name = "a_daemon_killed_at_any_step_leaves_nothing";
    if skip(name) {
        return;
    }
    let cgroup = Cgroup::new(name);
    let (killed, _) = every_step(&cgroup, 0, &["--after", "accept4", "--leave"]);
    println!(
        "{name}: killed {killed} times, at every {} of its calls",
        stride()
    );
    assert!(killed > 10, "{killed}");
}

#[test]
fn a_vmm_killed_at_any_step_leaves_nothing() {
    let name = "a_vmm_killed_at_any_step_leaves_nothing";
    if skip(name) {
        return;
    }
    let cgroup = Cgroup::new(name);
    let (_, processes) = every_step(&cgroup, usize::MAX, &[]);
    for victim in 1..processes {
        let (killed, _) = every_step(&cgroup, victim, &[]);
        println!(
            "{name}: process {victim} killed {killed} times, at every {} of its calls",
            stride()
        );
    }
}
