//! Messages on the control socket, and the configurations in them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use shoal_vmm::channel::decode;
use shoal_vmm::protocol::{ExitReason, Message, Request};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(Request::Start(config)) = decode(bytes)
        && let Ok(valid) = config.validate()
    {
        assert!(valid.cmdline.len() < shoal_vmm::layout::CMDLINE_MAX);
    }
    let _ = decode::<Message>(bytes);
    let _ = ExitReason::from_record(bytes);
});
