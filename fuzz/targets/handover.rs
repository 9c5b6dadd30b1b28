//! What root hands over as sealed memory: any bytes are refused, or are a value that can be handed on unchanged.
#![no_main]

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::OwnedFd;

use knockq::serve::control::Selection;
use knockq::serve::handover::{seal, seal_bytes, unseal};
use knockq::serve::plan::Plan;
use knockq::serve::policy::Policy;
use knockq::serve::settings::Settings;
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, memfd_create};

fuzz_target!(|bytes: &[u8]| {
    let Some((kind, bytes)) = bytes.split_first() else { return };
    match kind % 4 {
        0 => check_value::<Policy>(bytes),
        1 => check_value::<Selection>(bytes),
        2 => {
            if let Ok(plan) = Plan::read(seal_bytes(bytes).unwrap()) {
                assert!(Plan::read(plan.seal().unwrap()).unwrap() == plan);
            }
        }
        // They hold keys and cannot be compared, but write every list in order.
        _ => check_bytes::<Settings>(bytes),
    }
});

fn check_value<T: serde::Serialize + serde::de::DeserializeOwned + PartialEq>(bytes: &[u8]) {
    if let Ok(value) = unseal::<T>(memory(bytes)) {
        assert!(unseal::<T>(seal(&value).unwrap()).unwrap() == value);
    }
}

fn check_bytes<T: serde::Serialize + serde::de::DeserializeOwned>(bytes: &[u8]) {
    if let Ok(value) = unseal::<T>(memory(bytes)) {
        let first = contents(seal(&value).unwrap());
        let again: T = unseal(memory(&first)).unwrap();
        assert!(contents(seal(&again).unwrap()) == first);
    }
}

fn memory(bytes: &[u8]) -> OwnedFd {
    let mut memory = File::from(memfd_create("fuzz", MemfdFlags::CLOEXEC).unwrap());
    memory.write_all(bytes).unwrap();
    memory.rewind().unwrap();
    memory.into()
}

fn contents(memory: OwnedFd) -> Vec<u8> {
    let mut bytes = Vec::new();
    File::from(memory).read_to_end(&mut bytes).unwrap();
    bytes
}
