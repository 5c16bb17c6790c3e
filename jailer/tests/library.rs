//! Jails made by the library: what they are, what is refused, and that nothing is left after an error.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use shoal_jailer::cgroup::{CgroupError, Limits, Parent};
use shoal_jailer::{
    Executable, Exit, HandOver, IdRange, Ids, JailError, JailSpec, Jailer, JailerConfig, Mode, Rlimits, Step,
    cgroup, cookie, core_scheduling_works,
};

mod common;
use common::{TestCgroup, escape, fresh_uid, is_root, jailer, processes_of, spawn, status, until, words};

#[test]
fn a_jailed_process_has_nothing() {
    let name = "a_jailed_process_has_nothing";
    let (true, Some(parent)) = (is_root(name), TestCgroup::new(name)) else {
        return;
    };
    let uid = fresh_uid();
    let (held, hold) = std::io::pipe().unwrap();
    let jailer = jailer(Mode::Root, uid, Some(&parent));
    let fds = [HandOver {
        fd: held.as_fd(),
        target: 7,
    }];
    let jail = spawn(&jailer, &escape(), uid, &["hold", "7"], &fds, &Limits::default()).unwrap();
    let pid = jail.pid as u32;
    for (field, value) in [
        ("CapInh", "0000000000000000"),
        ("CapPrm", "0000000000000000"),
        ("CapEff", "0000000000000000"),
        ("CapBnd", "0000000000000000"),
        ("CapAmb", "0000000000000000"),
        ("NoNewPrivs", "1"),
        ("Groups", ""),
    ] {
        assert_eq!(status(pid, field).as_deref(), Some(value), "{field}");
    }
    let ids = format!("{uid}\t{uid}\t{uid}\t{uid}");
    assert_eq!(status(pid, "Uid"), Some(ids.clone()));
    assert_eq!(status(pid, "Gid"), Some(ids));
    assert_eq!(status(pid, "NSpid"), Some(format!("{pid}\t1")));
    let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
    assert_eq!(read("oom_score_adj"), "345\n");
    assert_eq!(read("environ"), "");
    assert!(read("cgroup").contains(&format!(
        "{}/shoal-test\n",
        parent.path.file_name().unwrap().display()
    )));
    for namespace in ["mnt", "net", "pid", "ipc", "uts", "user", "cgroup"] {
        let of = |who: &str| fs::read_link(format!("/proc/{who}/ns/{namespace}")).unwrap();
        assert_ne!(of(&pid.to_string()), of("self"), "{namespace}");
    }
    let open = |fd: u32| fs::read_link(format!("/proc/{pid}/fd/{fd}")).ok();
    assert_eq!(
        (0..3).map(|fd| open(fd).unwrap()).collect::<Vec<_>>(),
        ["/dev/null"; 3].map(Path::new)
    );
    assert_eq!(fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count(), 4);
    drop(hold);
    assert_eq!(jail.wait().unwrap(), Exit::Code(0));
    jail.destroy().unwrap();
    assert!(parent.children().is_empty());
}

#[test]
fn descriptors_arrive_at_their_numbers_whatever_they_were() {
    let (held, hold) = std::io::pipe().unwrap();
    let jailer = jailer(Mode::Off, 5, None);
    // Crosswise: the targets are numbers that other descriptors have here.
    let null = File::open("/dev/null").unwrap();
    for target in [3, 4, 5, 6, 60, 255] {
        let other = if target == 5 { 6 } else { 5 };
        let fds = [
            HandOver {
                fd: held.as_fd(),
                target,
            },
            HandOver {
                fd: null.as_fd(),
                target: other,
            },
        ];
        let jail = spawn(
            &jailer,
            &escape(),
            5,
            &["hold", &target.to_string()],
            &fds,
            &Limits::default(),
        )
        .unwrap();
        let link = |fd: i32| fs::read_link(format!("/proc/{}/fd/{fd}", jail.pid)).unwrap();
        assert!(link(target).to_string_lossy().starts_with("pipe:"));
        assert_eq!(link(other), Path::new("/dev/null"));
        // The exec that ended spawn's wait closes descriptors one after another: the last may still be there.
        let open = || fs::read_dir(format!("/proc/{}/fd", jail.pid)).unwrap().count();
        let closed = (0..100_000).any(|_| {
            std::thread::yield_now();
            open() == 5
        });
        assert!(closed, "{} descriptors are open", open());
        jail.destroy().unwrap();
    }
    drop(hold);
}

#[test]
fn wrong_descriptors_are_refused() {
    let jailer = jailer(Mode::Off, 5, None);
    let null = File::open("/dev/null").unwrap();
    for targets in [&[3, 3][..], &[-1], &[256]] {
        let fds: Vec<_> = targets
            .iter()
            .map(|target| HandOver {
                fd: null.as_fd(),
                target: *target,
            })
            .collect();
        let refused = spawn(&jailer, &escape(), 5, &["exit", "0"], &fds, &Limits::default());
        assert!(
            matches!(refused, Err(JailError::HandOver { .. })),
            "{targets:?}: {refused:?}"
        );
    }
}

#[test]
fn ids_outside_the_range_are_refused() {
    if !is_root("ids_outside_the_range_are_refused") {
        return;
    }
    let uid = fresh_uid();
    let jailer = jailer(Mode::Root, uid, None);
    let refused = spawn(
        &jailer,
        &escape(),
        uid + 1,
        &["exit", "0"],
        &[],
        &Limits::default(),
    );
    assert!(
        matches!(refused, Err(JailError::IdsOutside { .. })),
        "{refused:?}"
    );
}

#[test]
fn a_program_that_cannot_be_executed_leaves_nothing() {
    let name = "a_program_that_cannot_be_executed_leaves_nothing";
    let (true, Some(parent)) = (is_root(name), TestCgroup::new(name)) else {
        return;
    };
    let uid = fresh_uid();
    let jailer = jailer(Mode::Root, uid, Some(&parent));
    let program = Executable::from_bytes(b"\x7fELF, but not really").unwrap();
    let refused = spawn(&jailer, &program, uid, &["exit", "0"], &[], &Limits::default()).unwrap_err();
    let JailError::Step {
        step: Step::Exec,
        errno: libc::ENOEXEC,
        ..
    } = refused
    else {
        panic!("{refused}");
    };
    assert!(
        refused.to_string().contains("must be a static ELF program"),
        "{refused}"
    );
    assert!(parent.children().is_empty());
    assert!(processes_of(uid).is_empty());
    // And the jailer works on.
    let jail = spawn(&jailer, &escape(), uid, &["exit", "9"], &[], &Limits::default()).unwrap();
    assert_eq!(jail.destroy().map(|exit| exit.is_some()).ok(), Some(true));
}

#[test]
fn a_limit_without_its_controller_leaves_nothing() {
    let name = "a_limit_without_its_controller_leaves_nothing";
    let (true, Some(parent)) = (is_root(name), TestCgroup::new(name)) else {
        return;
    };
    // A leaf of a cgroup that has no controllers: a second level below the test's, which hands nothing down.
    let inner = parent.path.join("inner");
    fs::create_dir(&inner).unwrap();
    let opened = Parent::open(&inner).unwrap();
    assert!(
        opened
            .degradations()
            .iter()
            .any(|lack| lack.what == "cgroup memory limit")
    );
    let limits = Limits {
        memory_max: Some(1 << 20),
        ..Limits::default()
    };
    let id = "test".parse().unwrap();
    let refused = opened.create(&id, &limits, cgroup::Missing::Refuse).unwrap_err();
    assert!(matches!(refused, CgroupError::NoController { .. }), "{refused}");
    assert!(opened.leaves().unwrap().is_empty());
    let (mut leaf, lacks) = opened.create(&id, &limits, cgroup::Missing::Report).unwrap();
    assert_eq!(lacks.len(), 1);
    leaf.remove().unwrap();
    fs::remove_dir(&inner).unwrap();
}

#[test]
fn remains_of_a_crash_are_removed_and_live_jails_are_not() {
    let name = "remains_of_a_crash_are_removed_and_live_jails_are_not";
    let (true, Some(parent)) = (is_root(name), TestCgroup::new(name)) else {
        return;
    };
    let uid = fresh_uid();
    fs::create_dir(parent.path.join("shoal-test")).unwrap();
    fs::create_dir(parent.path.join("not-ours")).unwrap();
    let (held, hold) = std::io::pipe().unwrap();
    let jailer = jailer(Mode::Root, uid, Some(&parent));
    let fds = [HandOver {
        fd: held.as_fd(),
        target: 3,
    }];
    let jail = spawn(&jailer, &escape(), uid, &["hold", "3"], &fds, &Limits::default()).unwrap();
    let second = spawn(&jailer, &escape(), uid, &["exit", "0"], &[], &Limits::default());
    assert!(
        matches!(second, Err(JailError::Cgroup(CgroupError::Busy { .. }))),
        "{second:?}"
    );
    let leaves = jailer.cgroup().unwrap().leaves().unwrap();
    assert_eq!(leaves, [("test".parse().unwrap(), true)]);
    assert_eq!(processes_of(uid), [jail.pid as u32]);
    // Another daemon adopts the jail by its cgroup and ends it.
    let mut leaf = jailer
        .cgroup()
        .unwrap()
        .existing(&"test".parse().unwrap())
        .unwrap()
        .unwrap();
    leaf.kill().unwrap();
    assert_eq!(jail.wait().unwrap(), Exit::Signal(libc::SIGKILL));
    leaf.remove().unwrap();
    leaf.remove().unwrap();
    drop(hold);
    assert_eq!(parent.children(), ["not-ours"]);
}

#[test]
fn wrong_cgroups_are_refused() {
    let name = "wrong_cgroups_are_refused";
    let (true, Some(parent)) = (is_root(name), TestCgroup::new(name)) else {
        return;
    };
    let refused = |path: &Path| Parent::open(path).unwrap_err().to_string();
    assert!(refused(&parent.path.join("missing")).contains("does not exist"));
    assert!(refused(Path::new("/proc")).contains("is no cgroup"));
    assert!(refused(Path::new("relative")).contains("absolute"));
    assert!(refused(&parent.path.join("../x")).contains("'..'"));
    let link = std::env::temp_dir()
        .canonicalize()
        .unwrap()
        .join(format!("shoal-link-{}", std::process::id()));
    symlink(&parent.path, &link).unwrap();
    let text = refused(&link);
    fs::remove_file(&link).unwrap();
    assert!(text.contains("symbolic link"), "{text}");
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let version1 = mounts
        .lines()
        .find(|line| line.split(' ').nth(2) == Some("cgroup"));
    match version1.and_then(|line| line.split(' ').nth(1)) {
        Some(path) => assert!(refused(Path::new(path)).contains("version 1")),
        None => println!("no cgroup of version 1 is mounted to try"),
    }
    assert!(parent.children().is_empty());
}

#[test]
fn a_path_that_changes_under_the_jailer_s_feet_is_never_followed_out() {
    let directory = std::env::temp_dir()
        .canonicalize()
        .unwrap()
        .join(format!("shoal-race-{}", std::process::id()));
    fs::create_dir_all(directory.join("good")).unwrap();
    fs::create_dir_all(directory.join("evil")).unwrap();
    fs::write(directory.join("good/program"), b"\x7fELFgood").unwrap();
    fs::write(directory.join("evil/program"), b"\x7fELFevil").unwrap();
    symlink(directory.join("evil"), directory.join("other")).unwrap();
    let (stop, path) = (AtomicBool::new(false), directory.join("good/program"));
    let (mut opened, mut refused) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let names = ["good", "other"].map(|name| {
                std::ffi::CString::new(directory.join(name).into_os_string().into_encoded_bytes()).unwrap()
            });
            while !stop.load(Relaxed) {
                let (here, exchange) = (libc::AT_FDCWD, libc::RENAME_EXCHANGE);
                // SAFETY: two C strings and numbers.
                let done =
                    unsafe { libc::renameat2(here, names[0].as_ptr(), here, names[1].as_ptr(), exchange) };
                assert_eq!(done, 0);
            }
        });
        while opened < 200 || refused < 200 {
            match Executable::from_path(&path) {
                Ok(program) => {
                    let mut start = [0; 8];
                    // SAFETY: a buffer of the length given.
                    let got = unsafe {
                        libc::pread(
                            std::os::fd::AsRawFd::as_raw_fd(&program.fd()),
                            start.as_mut_ptr().cast(),
                            8,
                            0,
                        )
                    };
                    assert_eq!((got, &start), (8, b"\x7fELFgood"));
                    opened += 1;
                }
                Err(error) => {
                    assert!(error.to_string().contains("symbolic link"), "{error}");
                    refused += 1;
                }
            }
        }
        stop.store(true, Relaxed);
    });
    fs::remove_dir_all(&directory).unwrap();
}

#[test]
fn many_threads_start_jails_at_once() {
    let name = "many_threads_start_jails_at_once";
    if !is_root(name) {
        return;
    }
    let uid = fresh_uid();
    let (jailer, program) = (jailer(Mode::Root, uid, None), escape());
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for code in 0..25 {
                    let jail = spawn(
                        &jailer,
                        &program,
                        uid,
                        &["exit", &code.to_string()],
                        &[],
                        &Limits::default(),
                    )
                    .unwrap();
                    assert_eq!(jail.wait().unwrap(), Exit::Code(code));
                }
            });
        }
    });
    assert!(processes_of(uid).is_empty());
}

#[test]
fn a_jail_outlives_the_thread_that_made_it() {
    let (held, hold) = std::io::pipe().unwrap();
    let uid = fresh_uid();
    let jailer = jailer(Mode::detect(), uid, None);
    let jail = std::thread::scope(|scope| {
        let made = scope.spawn(|| {
            let fds = [HandOver {
                fd: held.as_fd(),
                target: 3,
            }];
            spawn(&jailer, &escape(), uid, &["hold", "3"], &fds, &Limits::default())
        });
        made.join().unwrap().unwrap()
    });
    assert_eq!(jail.try_wait().unwrap(), None);
    drop(hold);
    assert_eq!(jail.wait().unwrap(), Exit::Code(0));
}

#[test]
fn no_jailer_without_what_it_needs() {
    let config = JailerConfig {
        mode: Mode::Off,
        uids: IdRange::new(5, 1).unwrap(),
        gids: IdRange::new(5, 1).unwrap(),
        cgroup_parent: Some("/nonexistent/cgroup".into()),
        missing_controllers: cgroup::Missing::Refuse,
    };
    let before = fs::read_dir("/proc/self/fd").unwrap().count();
    let refused = Jailer::new(&config).unwrap_err();
    assert!(matches!(refused, JailError::File { .. }), "{refused}");
    until("descriptors to be closed", || {
        fs::read_dir("/proc/self/fd").unwrap().count() <= before
    });
}

#[test]
fn core_scheduling_gives_each_jail_a_cookie_or_fails() {
    let name = "core_scheduling_gives_each_jail_a_cookie_or_fails";
    if !is_root(name) {
        return;
    }
    let uid = fresh_uid();
    let (jailer, program) = (jailer(Mode::Root, uid, None), escape());
    let (held, hold) = std::io::pipe().unwrap();
    let start = |id: &str| {
        let spec = JailSpec {
            id: &id.parse().unwrap(),
            ids: Ids::new(uid, uid).unwrap(),
            argv: &words(&["hold", "3"]),
            fds: &[HandOver {
                fd: held.as_fd(),
                target: 3,
            }],
            limits: &Limits::default(),
            rlimits: Rlimits::default(),
            oom_score_adj: None,
            core_scheduling: true,
            die_with_parent: true,
        };
        jailer.spawn(&program, &spec)
    };
    if let Err(error) = core_scheduling_works() {
        println!("SKIP: {name} (cookies): the kernel refuses them here: {error}");
        let refused = start("first").unwrap_err();
        let JailError::Step {
            step: Step::CoreScheduling,
            ..
        } = refused
        else {
            panic!("{refused}")
        };
        assert!(refused.to_string().contains("leave it at auto"), "{refused}");
        assert!(processes_of(uid).is_empty());
        return;
    }
    let jails = ["first", "second"].map(|id| start(id).unwrap());
    let cookies = [&jails[0], &jails[1]].map(|jail| cookie(jail.pid).unwrap());
    assert!(
        cookies[0] != 0 && cookies[1] != 0 && cookies[0] != cookies[1],
        "{cookies:x?}"
    );
    assert_eq!(cookie(0).unwrap(), 0, "the daemon has one, too");
    drop(hold);
    for jail in jails {
        jail.destroy().unwrap();
    }
}
