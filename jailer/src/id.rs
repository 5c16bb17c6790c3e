//! Names and numbers of a jail: its id, and the user and group that it runs as.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use crate::error::JailError;

/// The name of a jail: 1 to 64 letters, digits or hyphens. It becomes the name of a cgroup, so nothing that could
/// be a path (`/`, `.`, `..`) passes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JailId(String);

impl JailId {
    /// The longest id, in bytes.
    pub const MAX: usize = 64;

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for JailId {
    type Err = JailError;

    fn from_str(text: &str) -> Result<JailId, JailError> {
        let refuse = |why: &'static str| JailError::Id {
            id: text.chars().take(80).collect(),
            why,
        };
        if text.is_empty() {
            return Err(refuse("it is empty"));
        }
        if text.len() > Self::MAX {
            return Err(refuse("it is longer than 64 bytes"));
        }
        if !text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
            return Err(refuse("it holds another character than a-z, A-Z, 0-9 and '-'"));
        }
        Ok(JailId(text.to_owned()))
    }
}

impl fmt::Display for JailId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The user and group that one VMM runs as, both on the host's numbering. Never 0, never "nobody" (65534), never
/// the error value (2³²-1): made by [`Ids::new`] only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ids {
    uid: u32,
    gid: u32,
}

impl Ids {
    /// Checks and keeps a pair of ids.
    ///
    /// # Errors
    /// [`JailError::UnsafeIds`] for 0, 65534 and 2³²-1.
    pub fn new(uid: u32, gid: u32) -> Result<Ids, JailError> {
        for id in [uid, gid] {
            if id == 0 || id == 65534 || id == u32::MAX {
                return Err(JailError::UnsafeIds { uid, gid });
            }
        }
        Ok(Ids { uid, gid })
    }

    /// User id.
    pub fn uid(self) -> u32 {
        self.uid
    }

    /// Group id.
    pub fn gid(self) -> u32 {
        self.gid
    }
}

/// A range of ids, `first` to `first + count - 1`, of which each guest gets one as both its uid and its gid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdRange {
    first: u32,
    count: u32,
}

impl IdRange {
    /// Checks and keeps a range.
    ///
    /// # Errors
    /// [`JailError::IdRange`] when it is empty, runs over the end of the numbers, or holds 0 or 65534.
    pub fn new(first: u32, count: u32) -> Result<IdRange, JailError> {
        let range = IdRange { first, count };
        let end = u64::from(first) + u64::from(count);
        if first == 0 || count == 0 || end > u64::from(u32::MAX) || range.contains(65534) {
            return Err(JailError::IdRange { first, count });
        }
        Ok(range)
    }

    /// The first id.
    pub fn first(self) -> u32 {
        self.first
    }

    /// How many.
    pub fn count(self) -> u32 {
        self.count
    }

    /// Whether `id` lies in it.
    pub fn contains(self, id: u32) -> bool {
        id >= self.first && id - self.first < self.count
    }
}

impl fmt::Display for IdRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} to {}",
            self.first,
            u64::from(self.first) + u64::from(self.count) - 1
        )
    }
}

/// Gives each guest ids of its own. Pure: the caller keeps the record of who has which, and tells a new allocator
/// after a restart with [`IdAllocator::reserve`].
///
/// Ids are given in turn, so that one that was released is used again as late as possible: files or processes
/// that a dead guest might have left do not fall to its successor at once.
#[derive(Debug, Clone)]
pub struct IdAllocator {
    range: IdRange,
    next: u32,
    taken: BTreeSet<u32>,
}

impl IdAllocator {
    /// An allocator in which all of `range` is free.
    pub fn new(range: IdRange) -> IdAllocator {
        IdAllocator {
            range,
            next: 0,
            taken: BTreeSet::new(),
        }
    }

    /// Takes the next free id.
    ///
    /// # Errors
    /// [`JailError::IdsExhausted`] when every id of the range is taken.
    pub fn allocate(&mut self) -> Result<Ids, JailError> {
        let IdRange { first, count } = self.range;
        if self.taken.len() as u64 >= u64::from(count) {
            return Err(JailError::IdsExhausted { first, count });
        }
        loop {
            let id = first + self.next;
            self.next = (self.next + 1) % count;
            if self.taken.insert(id) {
                return Ids::new(id, id);
            }
        }
    }

    /// Marks an id as taken by a guest that lives already.
    ///
    /// # Errors
    /// [`JailError::IdTaken`] when it is taken or lies outside the range.
    pub fn reserve(&mut self, id: u32) -> Result<Ids, JailError> {
        if !self.range.contains(id) || !self.taken.insert(id) {
            return Err(JailError::IdTaken { id });
        }
        Ids::new(id, id)
    }

    /// Gives an id back. Only when no process of that user is left.
    pub fn release(&mut self, ids: Ids) {
        self.taken.remove(&ids.uid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_jail_ids_are_refused() {
        let long = "a".repeat(300);
        for bad in [
            "",
            ".",
            "..",
            "a/b",
            "/etc",
            "../x",
            "a.b",
            "a b",
            "a\0b",
            "ä",
            "a\n",
            &long,
            &long[..65],
        ] {
            assert!(bad.parse::<JailId>().is_err(), "{bad:?} passed");
        }
        for good in ["a", "A-9", &long[..64]] {
            assert_eq!(good.parse::<JailId>().unwrap().as_str(), good);
        }
    }

    #[test]
    fn unsafe_ids_are_refused() {
        for (uid, gid) in [
            (0, 5),
            (5, 0),
            (65534, 5),
            (5, 65534),
            (u32::MAX, 5),
            (5, u32::MAX),
        ] {
            assert!(Ids::new(uid, gid).is_err(), "{uid}:{gid}");
        }
        assert!(IdRange::new(0, 5).is_err());
        assert!(IdRange::new(10, 0).is_err());
        assert!(IdRange::new(65000, 1000).is_err());
        assert!(IdRange::new(u32::MAX - 5, 6).is_err());
        assert!(IdRange::new(u32::MAX - 5, 5).is_ok());
    }

    #[test]
    fn no_two_guests_share_an_id_and_released_ones_come_last() {
        let mut ids = IdAllocator::new(IdRange::new(100_000, 3).unwrap());
        ids.reserve(100_001).unwrap();
        assert!(matches!(
            ids.reserve(100_001),
            Err(JailError::IdTaken { id: 100_001 })
        ));
        assert!(ids.reserve(99_999).is_err());
        let first = ids.allocate().unwrap();
        assert_eq!(first.uid(), 100_000);
        let second = ids.allocate().unwrap();
        assert_eq!(second.uid(), 100_002);
        assert!(matches!(ids.allocate(), Err(JailError::IdsExhausted { .. })));
        ids.release(second);
        ids.release(first);
        assert_eq!(ids.allocate().unwrap().uid(), 100_000);
        ids.release(Ids::new(100_000, 100_000).unwrap());
        assert_eq!(ids.allocate().unwrap().uid(), 100_002);
    }
}
