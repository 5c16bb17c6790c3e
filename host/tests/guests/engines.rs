//! What was chosen for speed changes nothing that a guest sees: the tests of disks again, on io_uring.

use shoal_host::DiskEngine;

use crate::block;
use crate::fleet::linux_runs;

#[test]
fn what_is_flushed_through_io_uring_survives_a_reset() {
    if linux_runs("what_is_flushed_through_io_uring_survives_a_reset") {
        block::flushed_survives(DiskEngine::IoUring);
    }
}

#[test]
fn what_is_discarded_through_io_uring_is_given_back() {
    if linux_runs("what_is_discarded_through_io_uring_is_given_back") {
        block::discarded_is_given_back(DiskEngine::IoUring);
    }
}
