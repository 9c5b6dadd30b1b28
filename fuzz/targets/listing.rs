//! `nft -j list set`: its elements as doors, however strange.
#![no_main]

use knockq::nft::list::read;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(listing) = std::str::from_utf8(bytes) else { return };
    for once in [false, true] {
        match read(listing, once) {
            Ok(doors) => {
                assert!(doors.len() <= bytes.len());
                assert!(doors.iter().all(|open| open.door.port.number > 0 && open.door.once == once));
            }
            Err(error) => drop(error.to_string()),
        }
    }
});
