//! The commands of shoal-jailer.

pub mod report;
pub mod run;
pub mod sweep;
pub mod trace;

/// Exit code when there is no jail.
pub const NO_JAIL: u8 = 125;
