//! The worked examples of the protocol, both ways.

use std::net::IpAddr;

use knockq::crypto::knockknock;
use knockq::crypto::{
    Binding, KeyError, KnockKey, KnockPorts, KnockSecrets, PresharedKey, PrivateKey, PublicKey, Side,
};
use serde_json::Value;

fn vectors(file: &str) -> Value {
    let path = format!("{}/tests/vectors/{file}", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap()
}

fn ports(texts: &[&str]) -> KnockPorts {
    KnockPorts::try_from(texts.iter().map(|&text| text.to_owned()).collect::<Vec<_>>()).unwrap()
}

/// Both ends' keys of one example, derived from what each end has.
fn both_ends(vector: &Value) -> [KnockKey; 2] {
    let text = |field: &str| vector[field].as_str().unwrap();
    let client: PrivateKey = text("client_private").parse().unwrap();
    let server: PrivateKey = text("server_private").parse().unwrap();
    assert_eq!(client.public().to_string(), text("client_public"));
    assert_eq!(server.public().to_string(), text("server_public"));
    let preshared = match text("preshared_key").parse::<PresharedKey>() {
        Err(KeyError::ZeroPresharedKey) => None, // 32 zero bytes stand for "there is none"
        other => Some(other.unwrap()),
    };
    [(Side::Client, &client, server.public()), (Side::Server, &server, client.public())]
        .map(|(side, own, peer)| KnockSecrets::derive(side, own, peer, preshared.as_ref()).unwrap())
        .map(|secrets| {
            let bytes = postcard::to_stdvec(&secrets).unwrap();
            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(hex, format!("20{}14{}", text("k_enc"), text("k_mac")), "length, k_enc, length, k_mac");
            KnockKey::new(&secrets)
        })
}

#[test]
fn every_token_is_sealed_and_opened_as_written() {
    let all = vectors("token-v1.json");
    let all = all.as_array().unwrap();
    assert_eq!(all.len(), 32);
    for vector in all {
        let number = |field: &str| vector[field].as_u64().unwrap();
        let (n, port) = (number("counter"), u16::try_from(number("port")).unwrap());
        let binding =
            vector["source"].as_str().map_or(Binding::Unbound, |source| Binding::Bound(source.parse().unwrap()));
        for key in both_ends(vector) {
            let token = key.seal(n, port, binding);
            assert_eq!(u64::from(token.sequence), number("tcp_sequence"));
            assert_eq!(u64::from(token.tsval), number("tsval"));
            assert_eq!(format!("{:08x}{:08x}", token.sequence, token.tsval), vector["token"].as_str().unwrap());

            let pad = key.pad(n);
            assert_eq!(
                u64::from(pad.knock_port(&ports(&[vector["knock_ports"].as_str().unwrap()]))),
                number("knock_port")
            );
            let three = ports(&["443", "8443", "2222"]);
            assert_eq!(u64::from(pad.knock_port(&three)), number("knock_port_of_443_8443_and_2222"));

            assert_eq!(pad.sequence_for(port), token.sequence);
            let opened = key.open(n, port, token.tsval, binding).unwrap();
            assert_eq!((opened.n(), opened.port(), opened.binding()), (n, port, binding));
            let elsewhere = Binding::Bound(IpAddr::from([198, 51, 100, 77]));
            assert_eq!(key.open(n, port, token.tsval, elsewhere), None, "bound to another source");
            assert_eq!(key.open(n + 1, port, token.tsval, binding), None, "another counter");
            assert_eq!(key.open(n, port ^ 1, token.tsval, binding), None, "another port");
        }
    }
}

#[test]
fn every_refused_key_is_refused_by_name() {
    let refused = vectors("refused-keys.json");
    let each = |field: &str, cause: &KeyError| {
        let keys = refused[field].as_array().unwrap();
        assert!(!keys.is_empty());
        for key in keys {
            assert_eq!(key.as_str().unwrap().parse::<PublicKey>().as_ref(), Err(cause), "{key}");
        }
    };
    each("low_order_public_keys", &KeyError::LowOrder);
    each("non_canonical_public_keys", &KeyError::NonCanonical);
}

#[test]
fn keys_of_another_length_or_alphabet_are_refused_by_name() {
    assert_eq!("AAAA".parse::<PublicKey>(), Err(KeyError::Length(3)));
    assert_eq!("not base64!".parse::<PublicKey>(), Err(KeyError::NotBase64));
    assert_eq!("".parse::<PublicKey>(), Err(KeyError::Length(0)));
    let zero = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
    assert_eq!(zero.parse::<PresharedKey>().err(), Some(KeyError::ZeroPresharedKey));
    assert_eq!("AAAA".parse::<PresharedKey>().err(), Some(KeyError::Length(3)));
}

#[test]
fn one_key_at_both_ends_is_refused() {
    let key = PrivateKey::generate().unwrap();
    let own = *key.public();
    assert_eq!(KnockSecrets::derive(Side::Server, &key, &own, None).err(), Some(KeyError::SameKey));
}

#[test]
fn a_private_key_survives_its_file() {
    let key = PrivateKey::generate().unwrap();
    let line = key.to_file_line();
    assert!(line.ends_with('\n') && line.len() == 45);
    assert_eq!(line.parse::<PrivateKey>().unwrap().public(), key.public());
}

#[test]
fn every_token_of_the_ancestor_is_sealed_and_opened_as_written() {
    let all = vectors("knockknock.json");
    let all = all.as_array().unwrap();
    assert_eq!(all.len(), 16);
    for vector in all {
        let text = |field: &str| vector[field].as_str().unwrap();
        let number = |field: &str| vector[field].as_u64().unwrap();
        let keys = format!("{}\n{}\n", text("cipher_key"), text("mac_key"));
        let key = knockknock::Key::new(&keys.parse().unwrap());
        let (counter, port) = (u32::try_from(number("counter")).unwrap(), u16::try_from(number("port")).unwrap());
        let token = key.seal(counter, port);
        let knockknock::Token { ip_id, sequence, acknowledgment, window } = token;
        assert_eq!(u64::from(ip_id), number("ip_id"));
        assert_eq!(u64::from(sequence), number("tcp_sequence"));
        assert_eq!(u64::from(acknowledgment), number("tcp_acknowledgment"));
        assert_eq!(u64::from(window), number("tcp_window"));
        assert_eq!(format!("{ip_id:04x}{sequence:08x}{acknowledgment:08x}{window:04x}"), text("ciphertext"));
        assert_eq!(key.open(counter, port, &token).map(|opened| opened.n()), Some(number("counter")));
    }
}
