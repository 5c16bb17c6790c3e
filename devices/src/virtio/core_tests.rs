use super::*;
use crate::testing::{END, memory};

const SIZES: &[u16] = &[256, 64];

fn negotiated() -> VirtioCore {
    let mut core = VirtioCore::new(RING_FEATURES, SIZES);
    core.write_status(3);
    core.write_driver_features(F_EVENT_IDX as u32);
    core.select_driver_features(1);
    core.write_driver_features(1);
    assert_eq!(core.write_status(0xb), StatusChange::None);
    assert_eq!(core.phase(), Phase::Negotiated);
    core
}

fn with_queue(change: impl FnOnce(&mut QueueSetup)) -> VirtioCore {
    let mut core = negotiated();
    assert!(core.set_queue(|q| {
        *q = QueueSetup {
            size: 64,
            desc: 0x1000,
            driver: 0x2000,
            device: 0x3000,
            ..*q
        };
        q.ready = true;
        change(q);
    }));
    core
}

#[test]
fn the_steps_lead_to_running_and_zero_leads_back() {
    let mut core = negotiated();
    assert_eq!(core.write_status(0xf), StatusChange::Start);
    assert_eq!(core.status(), 0xf);
    assert_eq!(
        core.write_status(0xf),
        StatusChange::None,
        "it is not started twice"
    );
    assert_eq!(core.write_status(0), StatusChange::Reset);
    assert_eq!((core.status(), core.features()), (0, 0));
}

#[test]
fn steps_cannot_be_left_out_or_taken_back() {
    for value in [2, 4, 8, 0xc, 0xe, 6] {
        let mut core = VirtioCore::new(0, SIZES);
        assert_eq!(core.write_status(value), StatusChange::None);
        assert_eq!(core.phase(), Phase::Reset, "status {value:#x}");
    }
    let mut core = negotiated();
    core.write_status(7);
    assert_eq!(core.phase(), Phase::Negotiated, "FEATURES_OK is not taken back");
}

#[test]
fn features_that_were_not_offered_are_refused() {
    for (low, high, accepted) in [
        (0, 1, true),
        (F_EVENT_IDX as u32, 1, true),
        (1, 1, false),
        (0, 0, false),
        (0, 3, false),
    ] {
        let mut core = VirtioCore::new(RING_FEATURES, SIZES);
        core.write_status(3);
        core.write_driver_features(low);
        core.select_driver_features(1);
        core.write_driver_features(high);
        core.write_status(0xb);
        assert_eq!(
            core.status() & status::FEATURES_OK != 0,
            accepted,
            "{low:#x} {high:#x}"
        );
    }
}

#[test]
fn features_are_fixed_once_negotiated() {
    let mut core = negotiated();
    let before = core.features();
    assert!(!core.write_driver_features(0));
    assert_eq!(core.features(), before);
}

#[test]
fn a_failed_device_is_not_started() {
    let mut core = negotiated();
    core.write_status(0x8b);
    assert_eq!(core.write_status(0x8f), StatusChange::None);
    assert!(!core.is_running());
    assert_eq!(core.status(), 0x8b);
}

#[test]
fn queues_are_set_up_between_features_and_driver_ok_only() {
    let mut core = VirtioCore::new(0, SIZES);
    assert!(!core.set_queue_address(QueueArea::Desc, false, 0x1000));
    let mut core = negotiated();
    assert!(core.set_queue_address(QueueArea::Desc, true, 1));
    assert!(core.set_queue_address(QueueArea::Desc, false, 0x1000));
    assert_eq!(core.queue().map(|q| q.desc), Some(0x1_0000_1000));
    core.write_status(0xf);
    assert!(!core.set_queue(|q| q.size = 8));
    core.select_queue(2);
    assert_eq!((core.queue_max(), core.queue()), (0, None));
    core.select_queue(u32::MAX);
    assert_eq!(core.queue_max(), 0);
}

#[test]
fn every_bad_queue_is_refused() {
    let built = |change: fn(&mut QueueSetup)| with_queue(change).build_queue(0, &memory());
    assert!(matches!(built(|_| ()), Ok(Some(_))));
    assert!(matches!(built(|q| q.ready = false), Ok(None)));
    for size in [0, 3, 512, 0x1_0100, u32::MAX] {
        let core = with_queue(|q| q.size = size);
        assert!(
            matches!(core.build_queue(0, &memory()), Err(BadQueue::Size { .. })),
            "{size}"
        );
    }
    assert!(matches!(
        built(|q| q.desc = 0x1008),
        Err(BadQueue::Alignment { .. })
    ));
    assert!(matches!(
        built(|q| q.driver = 0x2001),
        Err(BadQueue::Alignment { .. })
    ));
    assert!(matches!(
        built(|q| q.device = 0x3002),
        Err(BadQueue::Alignment { .. })
    ));
    assert!(matches!(
        built(|q| q.desc = END - 16),
        Err(BadQueue::Memory { .. })
    ));
    assert!(matches!(built(|q| q.driver = END), Err(BadQueue::Memory { .. })));
    assert!(matches!(
        built(|q| q.device = u64::MAX - 3),
        Err(BadQueue::Memory { .. })
    ));
    assert!(matches!(
        built(|q| q.desc = u64::MAX - 15),
        Err(BadQueue::Memory { .. })
    ));
    assert!(matches!(built(|q| q.driver = 0), Err(BadQueue::Memory { .. })));
}

#[test]
fn a_saved_core_comes_back_and_a_strange_one_is_refused() {
    let mut core = with_queue(|_| ());
    core.write_status(0xf);
    let state = core.state();
    let back = VirtioCore::restore(RING_FEATURES, SIZES, &state).unwrap();
    assert_eq!(back.state(), state);
    assert!(back.is_running());
    assert!(matches!(
        VirtioCore::restore(RING_FEATURES, &[256], &state),
        Err(BadCoreState::QueueCount {
            found: 2,
            expected: 1
        })
    ));
    assert!(matches!(
        VirtioCore::restore(0, SIZES, &state),
        Err(BadCoreState::Features(F_EVENT_IDX))
    ));
}
