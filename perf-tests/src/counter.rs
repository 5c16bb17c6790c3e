//! How often the kernel passes its tracepoints: how many system calls processes make, and other things.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{FromRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};

const SYSTEM_CALLS: &str = "raw_syscalls/sys_enter";
const PERF_TYPE_TRACEPOINT: u32 = 2;
const PERF_FLAG_FD_CLOEXEC: libc::c_ulong = 8;
/// Flags of perf_event_attr: off at first; also for what is started later; on when the process executes a program.
const DISABLED: u64 = 1;
const INHERIT: u64 = 1 << 1;
const ENABLE_ON_EXEC: u64 = 1 << 12;

/// The head of the kernel's `struct perf_event_attr` (linux/perf_event.h), 64 bytes of its first version.
#[repr(C)]
#[derive(Default)]
struct PerfEventAttr {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup_events: u32,
    bp_type: u32,
    config1: u64,
}

/// A count of the times that a tracepoint was passed, by some threads and those that they make.
pub struct Counter(Vec<OwnedFd>);

impl Counter {
    /// Of system calls of the next program that this thread starts, from its exec on, and of what that starts. (Of a second one nothing
    /// would be counted: the kernel turns an inherited counter on once.)
    ///
    /// # Errors
    /// When the kernel has no tracepoints or does not let us count.
    pub fn of_next_program() -> Result<Self> {
        let event = open(number_of(SYSTEM_CALLS)?, 0, DISABLED | INHERIT | ENABLE_ON_EXEC)?;
        Ok(Self(vec![event]))
    }

    /// Of system calls of the process `pid`, and of what it starts from now on.
    ///
    /// # Errors
    /// As for [`Self::of_next_program`], or when there is no such process.
    pub fn of_process(pid: u32) -> Result<Self> {
        let folder = format!("/proc/{pid}/task");
        let mut threads = Vec::new();
        for task in fs::read_dir(&folder).with_context(|| format!("reading {folder}"))? {
            let name = task?.file_name();
            let tid = name.to_str().and_then(|n| n.parse().ok());
            threads.push(tid.context("a thread without a number")?);
        }
        Self::system_calls_of(threads)
    }

    /// Of system calls of some threads.
    ///
    /// # Errors
    /// As for [`Self::of_threads`].
    pub fn system_calls_of(threads: impl IntoIterator<Item = u32>) -> Result<Self> {
        Self::of_threads(SYSTEM_CALLS, threads)
    }

    /// Of the tracepoint `group/name`, passed by some threads.
    ///
    /// # Errors
    /// As for [`Self::of_next_program`], or when there is no such tracepoint, thread, or any thread.
    pub fn of_threads(tracepoint: &str, threads: impl IntoIterator<Item = u32>) -> Result<Self> {
        let id = number_of(tracepoint)?;
        let threads = threads.into_iter();
        let events = threads
            .map(|tid| open(id, tid, INHERIT))
            .collect::<Result<Vec<_>>>()?;
        ensure!(!events.is_empty(), "there is no thread to count {tracepoint} of");
        Ok(Self(events))
    }

    /// The count so far.
    pub fn read(&self) -> Result<u64> {
        let mut sum = 0;
        for event in &self.0 {
            let mut value = [0; 8];
            File::from(event.try_clone()?)
                .read_exact(&mut value)
                .context("reading a counter of the kernel")?;
            sum += u64::from_ne_bytes(value);
        }
        Ok(sum)
    }
}

/// The number of a tracepoint.
fn number_of(tracepoint: &str) -> Result<u64> {
    let path = |root| format!("{root}/events/{tracepoint}/id");
    let (first, second) = (path("/sys/kernel/tracing"), path("/sys/kernel/debug/tracing"));
    let text = fs::read_to_string(&first)
        .or_else(|e| fs::read_to_string(second).map_err(|_| e))
        .with_context(|| {
            format!("reading {first}: tracepoints are counted as root, where tracefs is mounted")
        })?;
    text.trim()
        .parse()
        .with_context(|| format!("{first} holds {text:?}"))
}

fn open(id: u64, tid: u32, flags: u64) -> Result<OwnedFd> {
    let attr = PerfEventAttr {
        kind: PERF_TYPE_TRACEPOINT,
        size: size_of::<PerfEventAttr>() as u32,
        config: id,
        flags,
        ..PerfEventAttr::default()
    };
    // SAFETY: the kernel reads `size` bytes of the structure; the rest are numbers.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            &raw const attr,
            tid as libc::pid_t,
            -1,
            -1,
            PERF_FLAG_FD_CLOEXEC,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error()).context("counting a tracepoint (perf_event_open)");
    }
    // SAFETY: the descriptor is new and owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_program_s_calls_are_counted_from_its_exec_on() {
        let once = |script: &str| -> Result<u64> {
            let counter = Counter::of_next_program()?;
            assert_eq!(counter.read()?, 0);
            assert!(Command::new("sh").args(["-c", script]).status()?.success());
            counter.read()
        };
        // Linux 6.18 misses calls now and then when other counters come and go beside this one; it never invents any.
        let count = |script| {
            (0..5)
                .map(|_| once(script))
                .try_fold(0, |most, n| Ok::<_, anyhow::Error>(n?.max(most)))
        };
        let few = match count(":") {
            Ok(few) => few,
            Err(e) => {
                println!("SKIP: a_program_s_calls_are_counted_from_its_exec_on: {e:#}");
                return;
            }
        };
        let more = count("for i in 1 2 3 4 5 6 7 8; do : > /dev/null; done").unwrap();
        assert!(few > 1 && more > few + 8, "{few} {more}");
        assert!(Counter::of_process(u32::MAX).is_err());
    }

    #[test]
    fn system_calls_are_counted_where_the_kernel_lets_us() {
        // SAFETY: takes nothing and cannot fail.
        let thread_id = || unsafe { libc::syscall(libc::SYS_gettid) as u32 };
        let Ok(counter) = Counter::system_calls_of([thread_id()]) else {
            eprintln!("SKIPPED: no tracepoints here");
            return;
        };
        let before = counter.read().unwrap();
        for _ in 0..100 {
            std::hint::black_box(thread_id());
        }
        assert!(counter.read().unwrap() >= before + 100);
        assert!(Counter::of_threads("no/such", std::iter::empty()).is_err());
    }
}
