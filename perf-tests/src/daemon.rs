//! A daemon of its own for a benchmark, a client that times each call, and a census of what a daemon holds.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::boot::PROBE_MEMORY_MIB;
use crate::driver::sibling;

/// How long a daemon may take to serve its socket, and to end.
const PATIENCE: Duration = Duration::from_secs(30);
/// No answer of the daemon is longer.
const MAX_ANSWER: u64 = 64 << 20;

/// A daemon with a state directory of its own. It ends, with its guests, when it is dropped.
pub struct Daemon {
    child: Child,
    folder: tempfile::TempDir,
}

impl Daemon {
    /// Starts one, whose guests are jailed or not, and waits until it answers.
    pub fn start(jailed: bool) -> Result<Self> {
        let program = sibling("shoald")?;
        sibling("shoal-vmm")?;
        let folder = tempfile::tempdir().context("making a folder for the daemon")?;
        fs::write(folder.path().join("guest.elf"), shoal_probe::HALT_PVH)
            .context("writing the probe guest")?;
        let log = fs::File::create(folder.path().join("log")).context("making the daemon's log")?;
        let mut command = Command::new(&program);
        command
            .arg("--socket")
            .arg(folder.path().join("socket"))
            .arg("--state")
            .arg(folder.path().join("state"))
            .arg("--stop-guests-on-exit")
            .env("RUST_LOG", "warn")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            // Ctrl-C is for shoal-perf alone, which then ends the daemon.
            .process_group(0);
        if !jailed {
            command.args(["--no-jail", "--seccomp", "off"]);
        }
        let child = command
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        let mut daemon = Self { child, folder };
        daemon.wait_until_served()?;
        Ok(daemon)
    }

    /// It says nothing when it is ready, so its socket is tried.
    fn wait_until_served(&mut self) -> Result<()> {
        let begin = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                bail!("shoald ended with {status}; it said: {}", self.said());
            }
            if UnixStream::connect(self.socket()).is_ok() {
                return Ok(());
            }
            ensure!(
                begin.elapsed() < PATIENCE,
                "shoald does not serve its socket after {PATIENCE:?}; it said: {}",
                self.said()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// The end of its log.
    fn said(&self) -> String {
        let all = fs::read(self.folder.path().join("log")).unwrap_or_default();
        String::from_utf8_lossy(&all[all.len().saturating_sub(2000)..]).into_owned()
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A connection to it.
    pub fn connect(&self) -> Result<Client> {
        let stream = UnixStream::connect(self.socket()).context("connecting to shoald")?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Client {
            stream: BufReader::new(stream),
        })
    }

    /// What POST /v1/guests gets for an idle probe guest.
    pub fn guest(&self, start: bool) -> Value {
        json!({
            "kernel": { "path": self.folder.path().join("guest.elf") },
            "memory_mib": PROBE_MEMORY_MIB,
            "start": start,
        })
    }

    /// What it holds now.
    pub fn census(&self) -> Result<Census> {
        let fds = format!("/proc/{}/fd", self.pid());
        Ok(Census {
            processes: descendants(self.pid())?.len() as u32,
            descriptors: entries(Path::new(&fds))?,
            cgroups: folders_below(Path::new("/sys/fs/cgroup"), 8),
            interfaces: entries(Path::new("/sys/class/net")).unwrap_or(0),
            files: files_below(&self.folder.path().join("state")),
        })
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Asked, it ends its guests; killed, it would leave them.
        crate::signal::terminate(self.child.id());
        let begin = Instant::now();
        while begin.elapsed() < PATIENCE {
            match self.child.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(2)),
                _ => return,
            }
        }
        // It hangs: nothing more can be done in an orderly way.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a daemon and its machine hold, by number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Census {
    /// Processes that descend from the daemon.
    pub processes: u32,
    /// Descriptors of the daemon.
    pub descriptors: u32,
    /// Folders of the cgroup tree.
    pub cgroups: u32,
    /// Network interfaces.
    pub interfaces: u32,
    /// Files and folders in the state directory.
    pub files: u32,
}

impl Census {
    /// What is there beyond what was there `before`.
    pub fn beyond(&self, before: &Self) -> Self {
        Self {
            processes: self.processes.saturating_sub(before.processes),
            descriptors: self.descriptors.saturating_sub(before.descriptors),
            cgroups: self.cgroups.saturating_sub(before.cgroups),
            interfaces: self.interfaces.saturating_sub(before.interfaces),
            files: self.files.saturating_sub(before.files),
        }
    }

    /// Names and numbers.
    pub fn rows(&self) -> [(&'static str, u32); 5] {
        [
            ("processes", self.processes),
            ("descriptors", self.descriptors),
            ("cgroups", self.cgroups),
            ("interfaces", self.interfaces),
            ("files", self.files),
        ]
    }
}

/// All processes below `root`, that one not included.
pub fn descendants(root: u32) -> Result<Vec<u32>> {
    let mut parents = Vec::new();
    for entry in fs::read_dir("/proc").context("reading /proc")? {
        let Ok(pid) = entry?.file_name().to_string_lossy().parse::<u32>() else {
            continue;
        };
        // A process that is gone by now is none.
        if let Some(parent) = fs::read_to_string(format!("/proc/{pid}/stat"))
            .ok()
            .and_then(|s| parent(&s))
        {
            parents.push((pid, parent));
        }
    }
    let mut found = vec![root];
    let mut next = 0;
    while let Some(&of) = found.get(next) {
        found.extend(parents.iter().filter(|p| p.1 == of).map(|p| p.0));
        next += 1;
    }
    found.remove(0);
    Ok(found)
}

/// The fourth field of a process's `stat`, whose second one may hold anything between its parentheses.
fn parent(stat: &str) -> Option<u32> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

fn entries(folder: &Path) -> Result<u32> {
    let all = fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    Ok(all.count() as u32)
}

/// Folders below one, `depth` deep; what goes away meanwhile is not there.
fn folders_below(folder: &Path, depth: u32) -> u32 {
    let all = fs::read_dir(folder).into_iter().flatten().flatten();
    let inner = all.filter(|e| e.file_type().is_ok_and(|t| t.is_dir()));
    inner
        .map(|e| {
            1 + if depth > 0 {
                folders_below(&e.path(), depth - 1)
            } else {
                0
            }
        })
        .sum()
}

/// Files and folders below one.
fn files_below(folder: &Path) -> u32 {
    let all = fs::read_dir(folder).into_iter().flatten().flatten();
    all.map(|e| {
        1 + if e.file_type().is_ok_and(|t| t.is_dir()) {
            files_below(&e.path())
        } else {
            0
        }
    })
    .sum()
}

/// A connection that is kept between calls.
pub struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Does one call, which must end with `expected`; the time from the request's first byte to the answer's last.
    pub fn call(
        &mut self,
        method: &str,
        path: &str,
        body: Option<&Value>,
        expected: u16,
    ) -> Result<(Duration, Value)> {
        let body = body.map(Value::to_string).unwrap_or_default();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: shoal\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let begin = Instant::now();
        self.stream.get_mut().write_all(request.as_bytes())?;
        let (status, answer) = self
            .answer()
            .with_context(|| format!("the answer to {method} {path}"))?;
        let elapsed = begin.elapsed();
        let text = String::from_utf8_lossy(&answer);
        ensure!(
            status == expected,
            "{method} {path} was answered with {status}, not {expected}: {text}"
        );
        Ok((elapsed, serde_json::from_slice(&answer).unwrap_or(Value::Null)))
    }

    /// Begins to read what comes without an end, as a console does.
    pub fn stream(mut self, path: &str) -> Result<Chunked> {
        let request = format!("GET {path} HTTP/1.1\r\nhost: shoal\r\n\r\n");
        self.stream.get_mut().write_all(request.as_bytes())?;
        let (status, _) = self.head().with_context(|| format!("the answer to GET {path}"))?;
        ensure!(status == 200, "GET {path} was answered with {status}");
        Ok(Chunked {
            client: self,
            left: 0,
        })
    }

    /// The status and the length of an answer; none is 0.
    fn head(&mut self) -> Result<(u16, u64)> {
        let first = self.line()?;
        let status = first.split(' ').nth(1).and_then(|s| s.parse().ok());
        let status = status.with_context(|| format!("no HTTP status in {first:?}"))?;
        let mut length = 0;
        loop {
            let line = self.line()?;
            if line.is_empty() {
                return Ok((status, length));
            }
            if let Some((name, value)) = line.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                length = value
                    .trim()
                    .parse()
                    .with_context(|| format!("the header {line:?}"))?;
            }
        }
    }

    fn answer(&mut self) -> Result<(u16, Vec<u8>)> {
        let (status, length) = self.head()?;
        ensure!(length <= MAX_ANSWER, "an answer of {length} bytes");
        let mut body = vec![0; length as usize];
        self.stream.read_exact(&mut body)?;
        Ok((status, body))
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        let n = self.stream.by_ref().take(64 << 10).read_line(&mut line)?;
        ensure!(n > 0, "shoald closed the connection");
        Ok(line.trim_end_matches(['\r', '\n']).to_owned())
    }
}

/// An answer that comes in chunks (RFC 9112, section 7.1).
pub struct Chunked {
    client: Client,
    /// Bytes of the chunk that are still to come.
    left: u64,
}

impl Read for Chunked {
    fn read(&mut self, to: &mut [u8]) -> std::io::Result<usize> {
        if self.left == 0 {
            let line = self.client.line().map_err(std::io::Error::other)?;
            self.left = u64::from_str_radix(&line, 16)
                .map_err(|e| std::io::Error::other(format!("the length of a chunk {line:?}: {e}")))?;
            if self.left == 0 {
                return Ok(0);
            }
        }
        let most = self.left.min(to.len() as u64) as usize;
        let n = self.client.stream.read(&mut to[..most])?;
        self.left -= n as u64;
        if self.left == 0 {
            self.client.line().map_err(std::io::Error::other)?;
        }
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A client, and the other end, which has answered already.
    fn answered(answer: &'static [u8]) -> (Client, UnixStream) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(answer).unwrap();
        theirs.shutdown(std::net::Shutdown::Write).unwrap();
        let stream = BufReader::new(ours);
        (Client { stream }, theirs)
    }

    fn client(answer: &'static [u8]) -> Result<(Duration, Value)> {
        let (mut client, _theirs) = answered(answer);
        client.call("GET", "/", None, 200)
    }

    #[test]
    fn chunks_are_put_together_and_wrong_ones_told() {
        let read = |answer| -> Result<String> {
            let mut all = String::new();
            let (client, _theirs) = answered(answer);
            client.stream("/c")?.read_to_string(&mut all)?;
            Ok(all)
        };
        let good =
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\nA\r\n0123456789\r\n0\r\n\r\n";
        assert_eq!(read(good).unwrap(), "abc0123456789");
        for (bad, why) in [
            (&b"HTTP/1.1 404 Not Found\r\n\r\n"[..], "answered with 404"),
            (b"HTTP/1.1 200 OK\r\n\r\nxyz\r\nabc", "\"xyz\""),
            (b"HTTP/1.1 200 OK\r\n\r\n3\r\nabc\r\n", "closed the connection"),
        ] {
            let told = format!("{:#}", read(bad).unwrap_err());
            assert!(told.contains(why), "{why}: {told}");
        }
    }

    #[test]
    fn answers_are_read_and_wrong_ones_told() {
        let good = client(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\nx: y\r\n\r\n{\"a\":1}rest")
            .unwrap()
            .1;
        assert_eq!(good["a"], 1);
        assert_eq!(client(b"HTTP/1.1 200 OK\r\n\r\n").unwrap().1, Value::Null);
        for (bad, why) in [
            (
                &b"HTTP/1.1 404 Not Found\r\ncontent-length: 4\r\n\r\nnone"[..],
                "404, not 200: none",
            ),
            (b"", "closed the connection"),
            (b"what\r\n\r\n", "no HTTP status"),
            (
                b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n",
                "content-length: x",
            ),
            (
                b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999\r\n\r\n",
                "99999999999 bytes",
            ),
            (
                b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nab",
                "answer to GET /",
            ),
        ] {
            let told = format!("{:#}", client(bad).unwrap_err());
            assert!(told.contains(why), "{why}: {told}");
        }
    }

    #[test]
    fn processes_are_found_by_their_parents() {
        assert_eq!(parent("12 (a) b) (c)) S 7 12 12 0"), Some(7));
        assert_eq!(parent("nothing"), None);
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        let found = descendants(std::process::id()).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(found.contains(&child.id()));
        assert!(!descendants(std::process::id()).unwrap().contains(&child.id()));
    }

    #[test]
    fn what_was_there_before_is_no_leak() {
        let before = Census {
            processes: 1,
            files: 5,
            ..Census::default()
        };
        let after = Census {
            processes: 3,
            files: 4,
            ..Census::default()
        };
        assert_eq!(
            after.beyond(&before),
            Census {
                processes: 2,
                ..Census::default()
            }
        );
    }

    #[test]
    fn files_are_counted_with_their_folders() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("a/b")).unwrap();
        fs::write(folder.path().join("a/c"), "").unwrap();
        assert_eq!(
            (files_below(folder.path()), folders_below(folder.path(), 8)),
            (3, 2)
        );
    }
}
