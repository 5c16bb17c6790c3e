use super::*;

fn errno(n: i32) -> io::Result<usize> {
    Err(io::Error::from_raw_os_error(n))
}

fn read() -> Job {
    let (start, len, offset) = (16, 1000, 512);
    Job {
        work: Work::Read { start, len, offset },
        written: 1000,
        ..Job::NOTHING
    }
}

fn ranges(lens: [u64; 4], mode: i32) -> Job {
    let mut job = Job {
        work: Work::Allocate(lens.map(|len| Range {
            mode,
            offset: 512,
            len,
        })),
        sync: true,
        ..Job::NOTHING
    };
    job.skip_empty();
    job
}

/// Goes on with each of `results` in turn; the status in which that ends.
fn follow(job: &mut Job, results: impl IntoIterator<Item = io::Result<usize>>) -> Result<(), Status> {
    results
        .into_iter()
        .try_for_each(|result| job.advance(job.step().expect("a step is left"), result))
}

#[test]
fn what_was_moved_in_part_goes_on_there() {
    let mut job = read();
    let at = |part, offset| Some(Step::Read { part, offset });
    assert_eq!(job.step(), at((16, 1000), 512));
    follow(&mut job, [Ok(300), errno(libc::EINTR)]).unwrap();
    assert_eq!(job.step(), at((316, 700), 812));
    follow(&mut job, [Ok(700)]).unwrap();
    assert_eq!((job.step(), job.written()), (None, 1000));
}

#[test]
fn the_end_of_the_file_and_every_error_end_it() {
    for result in [
        Ok(0),
        errno(libc::EIO),
        errno(libc::EAGAIN),
        errno(libc::ECANCELED),
    ] {
        assert_eq!(follow(&mut read(), [Ok(10), result]), Err(Status::IoErr));
    }
    let mut flush = Job {
        sync: true,
        ..Job::NOTHING
    };
    assert_eq!(flush.step(), Some(Step::Sync));
    assert_eq!(follow(&mut flush, [errno(libc::EIO)]), Err(Status::IoErr));
}

#[test]
fn a_write_is_synchronized_after_all_of_it() {
    let (start, len, offset) = (16, 1000, 0);
    let mut job = Job {
        work: Work::Write { start, len, offset },
        sync: true,
        ..Job::NOTHING
    };
    follow(&mut job, [Ok(999)]).unwrap();
    assert!(matches!(job.step(), Some(Step::Write { part: (1015, 1), .. })));
    follow(&mut job, [Ok(1)]).unwrap();
    assert_eq!(job.step(), Some(Step::Sync));
    follow(&mut job, [Ok(0)]).unwrap();
    assert_eq!(job.step(), None);
}

#[test]
fn zeroing_falls_back_to_a_hole_once() {
    let mut job = ranges([512, 0, 1024, 0], ZERO);
    let mode = |job: &Job| match job.step() {
        Some(Step::Allocate { mode, len, .. }) => Some((mode, len)),
        _ => None,
    };
    assert_eq!(mode(&job), Some((ZERO, 512)));
    follow(&mut job, [errno(libc::EOPNOTSUPP)]).unwrap();
    assert_eq!(mode(&job), Some((PUNCH, 512)));
    follow(&mut job, [Ok(0)]).unwrap();
    assert_eq!(mode(&job), Some((PUNCH, 1024)));
    assert_eq!(
        follow(&mut job, [errno(libc::EOPNOTSUPP)]),
        Err(Status::Unsupported)
    );
    let mut empty = ranges([0; 4], PUNCH);
    assert_eq!(empty.step(), Some(Step::Sync));
    follow(&mut empty, [Ok(0)]).unwrap();
    assert_eq!(empty.step(), None);
}
