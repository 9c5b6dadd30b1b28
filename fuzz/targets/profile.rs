//! Host profiles, which a user imports from elsewhere.
#![no_main]

use std::path::Path;

use knockq::client::{Profile, TokenProfile};
use knockq::service::Name;
use knockq_fuzz::diagnostic;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let path = Path::new("server.profile");
    match Profile::parse(path, text) {
        Ok(profile) => check(path, &profile),
        Err(error) => {
            let error = error.to_string();
            // Nothing is shown of what may be a private key.
            if !error.contains("is a key file") {
                diagnostic::check(path, text, &error);
            }
        }
    }
});

fn check(path: &Path, profile: &Profile) {
    let written = profile.to_text();
    assert!(!written.contains(|c: char| c.is_control() && c != '\n'), "{written:?}");
    let stored = match profile.clone() {
        Profile::Token(profile) => {
            if let Some(key) = &profile.client_private_key {
                assert_eq!(Profile::parse(path, &profile.to_invitation(&key.0)).unwrap(), profile.clone().into());
            }
            TokenProfile { client_private_key: None, ..profile }.into()
        }
        knockknock => knockknock,
    };
    assert_eq!(Profile::parse(path, &written).unwrap(), stored);
    let host: Name = "server".parse().unwrap();
    for (name, service) in profile.services() {
        assert_eq!(profile.service(&host, Some(name.as_str())).unwrap(), (name, service));
        for port in &service.ports {
            assert!(profile.service(&host, Some(&port.number.to_string())).is_ok());
        }
    }
    let _ = profile.service(&host, None).map_err(|error| error.to_string());
}
