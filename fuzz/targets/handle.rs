//! `handle(bytes, now) -> Decision`: whatever packets come, in whatever order and at whatever time, nothing is granted but
//! for a token that was sealed with a registered key, once; and nobody is locked out by it.
#![no_main]

use knockq_fuzz::{Input, World};
use libfuzzer_sys::fuzz_target;

/// Steps that are taken at most.
const STEPS: usize = 200;

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let mut world = World::new();
    for _ in 0..STEPS {
        if input.is_over() {
            break;
        }
        world.step(&mut input);
    }
    world.everyone_can_still_knock();
});
