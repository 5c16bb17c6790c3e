use std::io::Write;
use std::os::unix::fs::FileExt;

use super::*;

/// A ring on a file of two sectors; nothing where there is no io_uring.
fn ring(test: &str) -> Option<(Ring, std::fs::File)> {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[3; 1024]).unwrap();
    match Ring::new(&file, 8) {
        Ok(ring) => Some((ring, file)),
        Err(e) => {
            println!("SKIP: {test}: {e}");
            None
        }
    }
}

fn vec(bytes: &mut [u8]) -> libc::iovec {
    libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    }
}

/// The result of whatever was queued.
fn result(ring: &mut Ring) -> i32 {
    ring.submit_and_wait().unwrap();
    ring.completed().unwrap().1
}

#[test]
fn every_operation_does_what_it_says() {
    let Some((mut ring, file)) = ring("every_operation_does_what_it_says") else {
        return;
    };
    let (mut a, mut b) = ([0; 500], [0; 524]);
    let both = [vec(&mut a), vec(&mut b)];
    // SAFETY: here and below, what is pointed to outlives the wait for the result.
    assert!(unsafe { ring.push(Op::Read { to: &both, offset: 0 }, 7) });
    assert_eq!(ring.pending(), 1);
    ring.submit_and_wait().unwrap();
    assert_eq!((ring.completed(), ring.pending()), (Some((7, 1024)), 0));
    assert_eq!(ring.completed(), None);
    assert_eq!((a, b), ([3; 500], [3; 524]));
    a.fill(9);
    let one = [vec(&mut a)];
    // SAFETY: as above.
    assert!(unsafe {
        ring.push(
            Op::Write {
                from: &one,
                offset: 512,
            },
            0,
        )
    });
    assert_eq!(result(&mut ring), 500);
    let (mode, offset, len) = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, 0, 512);
    for op in [Op::Sync, Op::Allocate { mode, offset, len }] {
        // SAFETY: as above.
        assert!(unsafe { ring.push(op, 0) });
        assert_eq!(result(&mut ring), 0);
    }
    let mut all = [1; 1024];
    file.read_exact_at(&mut all, 0).unwrap();
    assert!(
        all[..512].iter().all(|x| *x == 0)
            && all[512..1012].iter().all(|x| *x == 9)
            && all[1012..] == [3; 12]
    );
    // SAFETY: as above.
    assert!(unsafe {
        ring.push(
            Op::Read {
                to: &one,
                offset: 4096,
            },
            0,
        )
    });
    assert_eq!(result(&mut ring), 0, "behind the file's end");
}

#[test]
fn a_full_queue_takes_no_more() {
    let Some((mut ring, _)) = ring("a_full_queue_takes_no_more") else {
        return;
    };
    for at in 0..8 {
        // SAFETY: points to nothing.
        assert!(unsafe { ring.push(Op::Sync, at) });
    }
    // SAFETY: points to nothing.
    assert!(!unsafe { ring.push(Op::Sync, 8) });
    ring.submit().unwrap();
    assert_eq!(ring.pending(), 0);
    let mut done = Vec::new();
    while done.len() < 8 {
        match ring.completed() {
            Some((id, result)) => done.push((id, result)),
            None => ring.submit_and_wait().unwrap(),
        }
    }
    done.sort_unstable();
    assert_eq!(done, (0..8).map(|id| (id, 0)).collect::<Vec<_>>());
}

#[test]
fn nothing_but_its_work_can_be_asked_of_it() {
    let Some((mut ring, file)) = ring("nothing_but_its_work_can_be_asked_of_it") else {
        return;
    };
    let mut byte = [0_u8];
    let at = byte.as_mut_ptr();
    let name = c"/etc/passwd";
    let raw = types::Fd(file.as_raw_fd());
    for (entry, what) in [
        (
            opcode::Nop::new().build().flags(squeue::Flags::FIXED_FILE),
            "another operation",
        ),
        (
            opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), name.as_ptr()).build(),
            "opening a file",
        ),
        (
            opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build(),
            "making a socket",
        ),
        (
            opcode::Read::new(raw, at, 1).build(),
            "a file that is not registered",
        ),
        (
            opcode::Read::new(FILE, at, 1)
                .build()
                .flags(squeue::Flags::FIXED_FILE | squeue::Flags::IO_LINK),
            "a link",
        ),
        (
            opcode::Read::new(FILE, at, 1)
                .build()
                .flags(squeue::Flags::FIXED_FILE | squeue::Flags::ASYNC),
            "a worker",
        ),
    ] {
        // SAFETY: what is pointed to outlives the wait for the result.
        unsafe { ring.ring.submission().push(&entry).unwrap() };
        assert_eq!(result(&mut ring), -libc::EACCES, "{what}");
    }
    // SAFETY: as above.
    assert!(unsafe {
        ring.push(
            Op::Read {
                to: &[vec(&mut byte)],
                offset: 0,
            },
            0,
        )
    });
    assert_eq!(result(&mut ring), 1, "it works still");
    let s = ring.ring.submitter();
    for (refused, what) in [
        (
            s.register_files_update(0, &[file.as_raw_fd()]).map(drop),
            "another file",
        ),
        (s.unregister_files(), "no file"),
        (s.register_eventfd(file.as_raw_fd()), "an eventfd"),
        (s.register_restrictions(&mut restrictions()), "other restrictions"),
        (s.register_personality().map(drop), "other credentials"),
    ] {
        assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::EACCES), "{what}");
    }
}

#[test]
fn errors_say_what_to_do() {
    let text = |errno| failed("making it")(io::Error::from_raw_os_error(errno)).to_string();
    assert!(text(libc::ENOSYS).contains("CONFIG_IO_URING"));
    assert!(text(libc::EPERM).contains("kernel.io_uring_disabled"));
    assert!(text(libc::EINVAL).contains("5.15"));
    assert!(text(libc::ENOMEM).contains("making it failed: Cannot allocate memory"));
}
