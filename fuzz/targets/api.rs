//! Bodies of API requests.
#![no_main]

use libfuzzer_sys::fuzz_target;
use shoal_api_types::{CreateGuest, StopGuest};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(create) = serde_json::from_slice::<CreateGuest>(bytes) {
        let text = serde_json::to_vec(&create).expect("it was read");
        assert!(serde_json::from_slice::<CreateGuest>(&text).is_ok());
    }
    let _ = serde_json::from_slice::<StopGuest>(bytes);
});
