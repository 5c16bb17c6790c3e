//! Rate limiters: how many bytes and how many operations per second a device does, with bursts.
//!
//! A bucket holds tokens for a burst and is refilled all the time. Something is begun while there is any token left, and
//! may take more than there are: the bucket is then in debt, and the next has to wait until it is out of it. So a request
//! larger than a whole burst passes, and the rate is kept all the same.
//!
//! ```text
//!  host ──SetLimits──▶ LimitBoard ──▶ LimitCell (one per device) ◀── looks when told ── Limiter (in its handler)
//! ```
//!
//! What a limiter holds back stays in the guest's ring, or in the host's sockets; a timer in the event loop brings the
//! handler back to it.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::event::{Readiness, Registrar, Token};
use crate::sys::Timer;

/// A rate and how far it may be exceeded for a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rate {
    /// Tokens per second, 1 to [`Rate::MAX`].
    pub per_second: u64,
    /// Tokens that gather while nothing is done, 1 to [`Rate::MAX`].
    pub burst: u64,
}

impl Rate {
    /// The greatest rate and burst (2⁴⁰: a tebibyte per second).
    pub const MAX: u64 = 1 << 40;

    /// A rate with the burst of a tenth of a second.
    pub fn per_second(per_second: u64) -> Self {
        Self {
            per_second,
            burst: (per_second / 10).max(1),
        }
    }

    /// Checks the numbers.
    ///
    /// # Errors
    /// Which one is wrong, and what would be right.
    pub fn check(&self) -> Result<(), BadRate> {
        for (field, value) in [("per_second", self.per_second), ("burst", self.burst)] {
            if !(1..=Self::MAX).contains(&value) {
                return Err(BadRate { field, value });
            }
        }
        Ok(())
    }
}

/// A rate that cannot be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} is {value}, it has to be from 1 to {}", Rate::MAX)]
pub struct BadRate {
    /// Which number.
    pub field: &'static str,
    /// What it is.
    pub value: u64,
}

/// Limits of one thing that a device does. What is missing is not limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes of data.
    pub bandwidth: Option<Rate>,
    /// Requests or packets.
    pub operations: Option<Rate>,
}

impl Limits {
    /// Checks the numbers.
    ///
    /// # Errors
    /// The first that is wrong, with `bandwidth` or `operations`.
    pub fn check(&self) -> Result<(), (&'static str, BadRate)> {
        for (name, rate) in [("bandwidth", self.bandwidth), ("operations", self.operations)] {
            rate.map_or(Ok(()), |r| r.check()).map_err(|bad| (name, bad))?;
        }
        Ok(())
    }

    fn are_none(&self) -> bool {
        *self == Self::default()
    }
}

/// Limits of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceLimits {
    /// Of a disk, a socket device or an entropy device: of all that it does.
    All(Limits),
    /// Of a network device.
    Net {
        /// Packets to the guest.
        rx: Limits,
        /// Packets from the guest.
        tx: Limits,
    },
}

impl DeviceLimits {
    /// Limits with the names of what they limit.
    pub fn each(&self) -> impl Iterator<Item = (&'static str, Limits)> {
        let (first, second) = match *self {
            Self::All(all) => (("limits", all), None),
            Self::Net { rx, tx } => (("rx_limits", rx), Some(("tx_limits", tx))),
        };
        std::iter::once(first).chain(second)
    }

    fn path(&self, path: Path) -> Limits {
        match (self, path) {
            (Self::All(all), _) => *all,
            (Self::Net { rx, .. }, Path::First) => *rx,
            (Self::Net { tx, .. }, Path::Second) => *tx,
        }
    }
}

/// Which of a device's limits a limiter keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// All that it does, or packets to the guest.
    First,
    /// Packets from the guest.
    Second,
}

/// The limits of one device, shared between its handler and who changes them. Both are in the event loop's thread; the
/// device's control half, which is not, only holds it.
pub struct LimitCell {
    version: AtomicU32,
    limits: Mutex<DeviceLimits>,
    /// Made with the first limit, and before it is in force, so that a lack of descriptors is told to who asked.
    timers: [OnceLock<Timer>; 2],
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Plain values, whole at any time.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl LimitCell {
    /// Limits that are in force from the start.
    ///
    /// # Errors
    /// When a timer is needed and cannot be made.
    pub fn new(limits: DeviceLimits) -> io::Result<Self> {
        let cell = Self {
            version: AtomicU32::new(1),
            limits: Mutex::new(limits),
            timers: [const { OnceLock::new() }; 2],
        };
        cell.prepare(&limits)?;
        Ok(cell)
    }

    fn prepare(&self, limits: &DeviceLimits) -> io::Result<()> {
        for (timer, (_, limits)) in self.timers.iter().zip(limits.each()) {
            if !limits.are_none() && timer.get().is_none() {
                // Only the event loop's thread makes timers.
                let _ = timer.set(Timer::new()?);
            }
        }
        Ok(())
    }
}

/// The limits of a device cannot be set.
#[derive(Debug, thiserror::Error)]
pub enum SetLimitsError {
    /// There is no such device.
    #[error("there is no device {0}")]
    NoDevice(usize),
    /// They are limits for another kind of device.
    #[error("these are not limits for this kind of device")]
    Kind,
    /// A number is out of range.
    #[error("{limits}.{rate}: {source}")]
    Rate {
        /// Which limits.
        limits: &'static str,
        /// Which of their rates.
        rate: &'static str,
        /// What is wrong with it.
        source: BadRate,
    },
    /// There is no timer for them.
    #[error("making a timer failed")]
    Timer(#[source] io::Error),
}

/// Checks the numbers of all limits.
///
/// # Errors
/// [`SetLimitsError::Rate`].
pub fn check(limits: &DeviceLimits) -> Result<(), SetLimitsError> {
    limits.each().try_for_each(|(name, each)| {
        each.check().map_err(|(rate, source)| SetLimitsError::Rate {
            limits: name,
            rate,
            source,
        })
    })
}

/// The limits of all devices, in the order in which they were built.
#[derive(Clone, Default)]
pub struct LimitBoard(Arc<Mutex<Vec<Arc<LimitCell>>>>);

impl LimitBoard {
    /// Adds a device.
    pub fn add(&self, cell: Arc<LimitCell>) {
        lock(&self.0).push(cell);
    }

    /// Changes the limits of a device. Its handler looks at them when it gets [`Token::LIMITS`]. What is in the buckets
    /// is forgotten. To be called from the event loop's thread.
    ///
    /// # Errors
    /// See [`SetLimitsError`]; the limits are then as they were.
    pub fn set(&self, device: usize, limits: DeviceLimits) -> Result<(), SetLimitsError> {
        let cell = lock(&self.0)
            .get(device)
            .cloned()
            .ok_or(SetLimitsError::NoDevice(device))?;
        check(&limits)?;
        let mut current = lock(&cell.limits);
        if std::mem::discriminant(&*current) != std::mem::discriminant(&limits) {
            return Err(SetLimitsError::Kind);
        }
        cell.prepare(&limits).map_err(SetLimitsError::Timer)?;
        *current = limits;
        cell.version.fetch_add(1, Ordering::Release);
        Ok(())
    }
}

/// Tokens of one kind. Counts in units of a token's share of a nanosecond, so that nothing is rounded: `per_second` units
/// pass in a nanosecond, and a token is 10⁹ of them.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    rate: Rate,
    /// The time (in units) at which the bucket is full.
    full_at: u128,
}

const TOKEN: u128 = 1_000_000_000;

impl Bucket {
    fn new(rate: Rate) -> Self {
        Self { rate, full_at: 0 }
    }

    fn units(&self, now_ns: u64) -> u128 {
        u128::from(now_ns) * u128::from(self.rate.per_second)
    }

    /// How long until there is a token (ns); zero when there is one.
    fn wait(&self, now_ns: u64) -> u64 {
        let until = (self.full_at + TOKEN).saturating_sub(u128::from(self.rate.burst) * TOKEN);
        let missing = until.saturating_sub(self.units(now_ns));
        missing
            .div_ceil(u128::from(self.rate.per_second))
            .try_into()
            .unwrap_or(u64::MAX)
    }

    fn take(&mut self, tokens: u64, now_ns: u64) {
        self.full_at = self.full_at.max(self.units(now_ns)) + u128::from(tokens) * TOKEN;
    }

    /// How long it takes to fill (ns).
    fn span(&self) -> u64 {
        let span = u128::from(self.rate.burst) * TOKEN / u128::from(self.rate.per_second);
        span.try_into().unwrap_or(u64::MAX)
    }
}

/// The most that is waited beyond the first token (ns), so that what is held back does not wake the loop for each of
/// many small requests.
const GATHER: u64 = 200_000;

/// Keeps one path of a device to its limits. Belongs to the device's back end: a driver that resets its device gets no
/// new burst.
pub struct Limiter {
    cell: Arc<LimitCell>,
    path: Path,
    seen: u32,
    bandwidth: Option<Bucket>,
    operations: Option<Bucket>,
    epoch: Instant,
    now_ns: u64,
    /// The timer is set.
    waiting: bool,
    watched: bool,
}

impl Limiter {
    /// For one path of a device.
    pub fn new(cell: Arc<LimitCell>, path: Path) -> Self {
        let mut limiter = Self {
            cell,
            path,
            seen: 0,
            bandwidth: None,
            operations: None,
            epoch: Instant::now(),
            now_ns: 0,
            waiting: false,
            watched: false,
        };
        limiter.look();
        limiter
    }

    /// Takes over limits that were changed.
    fn look(&mut self) {
        let version = self.cell.version.load(Ordering::Acquire);
        if version == self.seen {
            return;
        }
        let limits = lock(&self.cell.limits).path(self.path);
        self.seen = version;
        self.bandwidth = limits.bandwidth.map(Bucket::new);
        self.operations = limits.operations.map(Bucket::new);
        self.waiting = false;
    }

    fn timer(&self) -> Option<&Timer> {
        self.cell.timers[self.path as usize].get()
    }

    /// Looks at the limits and has the timer, if there is one by now, watched under `token`.
    pub fn register(&mut self, events: &mut Registrar<'_>, token: Token) -> io::Result<()> {
        self.look();
        if let Some(timer) = self.timer()
            && !self.watched
        {
            events.add(timer, token, Readiness::IN)?;
            self.watched = true;
        }
        Ok(())
    }

    /// No longer has the timer watched.
    pub fn unregister(&mut self, events: &mut Registrar<'_>) {
        if let Some(timer) = self.timer()
            && self.watched
        {
            // It was registered.
            let _ = events.remove(timer);
        }
        (self.watched, self.waiting) = (false, false);
    }

    /// The handler was woken: looks at the clock, if anything is limited.
    pub fn begin(&mut self) {
        if self.bandwidth.is_some() || self.operations.is_some() {
            self.now_ns = u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX);
        }
    }

    /// The timer's event was delivered.
    pub fn woken(&mut self) {
        if let Some(timer) = self.timer() {
            timer.take();
        }
        self.waiting = false;
    }

    /// Whether something may be done now. When not, the timer wakes the handler in time.
    pub fn admits(&mut self) -> bool {
        if self.wait() == 0 {
            return true;
        }
        // The time may have come since the handler was woken.
        self.begin();
        match self.wait() {
            0 => true,
            wait => {
                self.remind(wait);
                false
            }
        }
    }

    fn wait(&self) -> u64 {
        let of = |bucket: &Option<Bucket>| bucket.as_ref().map_or(0, |b| b.wait(self.now_ns));
        of(&self.bandwidth).max(of(&self.operations))
    }

    fn remind(&mut self, wait_ns: u64) {
        if self.waiting {
            return;
        }
        let spans = [&self.bandwidth, &self.operations].map(|b| b.map_or(u64::MAX, |b| b.span()));
        let gather = (spans[0].min(spans[1]) / 2).min(GATHER);
        let delay = Duration::from_nanos(wait_ns.max(gather));
        // There is a timer where there are limits, and a timer of this process can be set.
        self.waiting = self.timer().is_some_and(|timer| timer.set(delay).is_ok());
    }

    /// Counts one operation that moves `bytes`.
    pub fn count(&mut self, bytes: u64) {
        if let Some(bucket) = &mut self.bandwidth {
            bucket.take(bytes, self.now_ns);
        }
        if let Some(bucket) = &mut self.operations {
            bucket.take(1, self.now_ns);
        }
    }
}

#[cfg(test)]
#[path = "limit_tests.rs"]
mod tests;
