//! A log that a guest can write to only so often.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Takes one line of log.
pub type Log = Arc<dyn Fn(&str) + Send + Sync>;

/// Lines that a guest can provoke: at most [`LimitedLog::BURST`] in each [`LimitedLog::WINDOW`].
pub struct LimitedLog {
    log: Log,
    window: Mutex<Window>,
}

struct Window {
    start: Instant,
    lines: u32,
}

impl LimitedLog {
    /// Lines in one window.
    pub const BURST: u32 = 8;
    /// Length of a window.
    pub const WINDOW: Duration = Duration::from_secs(10);

    /// A limited log in front of `log`.
    pub fn new(log: Log) -> Self {
        Self {
            log,
            window: Mutex::new(Window {
                start: Instant::now(),
                lines: 0,
            }),
        }
    }

    /// Writes the line that `line` makes, or drops it.
    pub fn write(&self, line: impl FnOnce() -> String) {
        self.write_at(Instant::now(), line);
    }

    fn write_at(&self, now: Instant, line: impl FnOnce() -> String) {
        // A panic cannot happen while the lock is held, so a poisoned lock is as good as any.
        let mut w = self.window.lock().unwrap_or_else(|e| e.into_inner());
        if now.duration_since(w.start) >= Self::WINDOW {
            let dropped = w.lines.saturating_sub(Self::BURST);
            *w = Window { start: now, lines: 0 };
            if dropped > 0 {
                (self.log)(&format!("{dropped} further lines of this guest were dropped"));
            }
        }
        w.lines = w.lines.saturating_add(1);
        if w.lines <= Self::BURST {
            drop(w);
            (self.log)(&line());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_beyond_the_burst_are_dropped_and_counted() {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let sink = lines.clone();
        let log = LimitedLog::new(Arc::new(move |l| sink.lock().unwrap().push(l.to_owned())));
        let start = Instant::now();
        for n in 0..100 {
            log.write_at(start, || format!("line {n}"));
        }
        assert_eq!(lines.lock().unwrap().len(), LimitedLog::BURST as usize);
        log.write_at(start + LimitedLog::WINDOW * 2, || "later".to_owned());
        let lines = lines.lock().unwrap();
        assert_eq!(
            lines[8..],
            ["92 further lines of this guest were dropped", "later"]
        );
    }
}
