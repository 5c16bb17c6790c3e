//! Saved states that were tampered with.
#![no_main]

use libfuzzer_sys::fuzz_target;
use shoal_devices::legacy::i8042::I8042;
use shoal_devices::legacy::serial::SerialState;
use shoal_devices::spec::{Section, Versioned};
use shoal_devices::testing::{LoopThread, MmioBench, memory};
use shoal_devices::virtio::block::BlockState;
use shoal_devices::virtio::mmio::{MmioTransport, TransportState};
use shoal_devices::virtio::net::NetState;
use shoal_devices::virtio::rng::RngState;
use shoal_devices::virtio::vsock::VsockState;

static EVENT_LOOP: std::sync::OnceLock<LoopThread> = std::sync::OnceLock::new();

/// What can be decoded can be encoded, and is the same again.
fn there_and_back<T: Versioned + PartialEq + std::fmt::Debug>(bytes: &[u8]) -> Option<T> {
    let section = Section {
        name: T::NAME.into(),
        version: T::VERSION,
        bytes: bytes.to_vec(),
    };
    let state: T = section.decode().ok()?;
    assert_eq!(
        Section::encode(&state)
            .expect("it was decoded")
            .decode::<T>()
            .expect("it was encoded"),
        state
    );
    Some(state)
}

fuzz_target!(|bytes: &[u8]| {
    there_and_back::<SerialState>(bytes);
    there_and_back::<I8042>(bytes);
    there_and_back::<BlockState>(bytes);
    there_and_back::<NetState>(bytes);
    there_and_back::<RngState>(bytes);
    there_and_back::<VsockState>(bytes);
    if let Some(state) = there_and_back::<TransportState>(bytes) {
        let event_loop = EVENT_LOOP.get_or_init(LoopThread::new);
        let parts = MmioBench::parts(shoal_fuzz::rng(), memory(), event_loop);
        if let Ok(mut t) = MmioTransport::restore(parts, &state) {
            t.resume();
            t.write(0x70, &0u32.to_le_bytes());
            assert_eq!(t.status(), 0);
        }
    }
});
