//! Token v1: the eight bytes that stand where a genuine SYN has random ones (docs/protocol.md section 3).
//!
//! ```text
//! KS  = AES-256-CTR(k_enc, IV = n(8) || 0(8))
//! tag = HMAC-SHA1(k_mac, "knockq v1" || n(8) || port(2) || source)[0..4]
//! C   = (port(2) || 0x0000 || tag(4)) xor KS[0..8]
//! C[0..4] is the sequence number, C[4..8] the TSval; KS[8..12] picks the knock port.
//! ```

use std::net::IpAddr;

use aes::Aes256Enc;
use aes::cipher::{InnerIvInit, KeyInit, StreamCipherCore};
use ctr::{CtrCore, flavors::Ctr64BE};
use hmac::{Hmac, Mac};
use sha1::Sha1;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use super::{KnockPorts, KnockSecrets};

/// Label in front of what the tag covers.
const LABEL: &[u8] = b"knockq v1";

/// A token on the wire.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Token {
    /// `C[0..4]`: the TCP sequence number.
    pub sequence: u32,
    /// `C[4..8]`: the timestamp value (RFC 7323).
    pub tsval: u32,
}

/// The source address that a token holds for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Binding {
    /// Any: whoever sends it first, spends it.
    Unbound,
    /// This one alone, as the server sees it.
    Bound(IpAddr),
}

/// The keyed state of both functions for one (client, server).
#[derive(Clone)]
pub struct KnockKey {
    cipher: Aes256Enc,
    mac: Hmac<Sha1>,
}

/// The first block of the keystream for one n.
#[derive(Clone, Copy)]
pub struct Pad {
    sequence: u32,
    tsval: u32,
    choice: u32,
}

/// Proof that a tag held. Only [`KnockKey::open`] and [`super::knockknock::Key::open`] make one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Opened {
    pub(super) n: u64,
    pub(super) port: u16,
    pub(super) binding: Binding,
}

impl KnockKey {
    /// Keys the cipher and the MAC.
    pub fn new(secrets: &KnockSecrets) -> Self {
        // RFC 2104 pads a short key with zeros to the hash's block; done here, there is no length left to be wrong.
        let mut mac_key = Zeroizing::new([0; 64]);
        mac_key.iter_mut().zip(secrets.mac.expose()).for_each(|(to, from)| *to = *from);
        Self { cipher: Aes256Enc::new(secrets.enc.expose().into()), mac: Hmac::new((&*mac_key).into()) }
    }

    /// The keystream of counter `n`: one AES block.
    pub fn pad(&self, n: u64) -> Pad {
        let mut iv = [0; 16];
        iv[..8].copy_from_slice(&n.to_be_bytes());
        let mut block = [[0; 16].into()];
        CtrCore::<&Aes256Enc, Ctr64BE>::inner_iv_init(&self.cipher, &iv.into()).write_keystream_blocks(&mut block);
        let [first] = block;
        let [a, b, c, d, e, f, g, h, i, j, k, l, ..]: [u8; 16] = first.into();
        Pad {
            sequence: u32::from_be_bytes([a, b, c, d]),
            tsval: u32::from_be_bytes([e, f, g, h]),
            choice: u32::from_be_bytes([i, j, k, l]),
        }
    }

    /// Makes the token of counter `n` for a service's selector.
    pub fn seal(&self, n: u64, port: u16, binding: Binding) -> Token {
        let pad = self.pad(n);
        let tag = u32::from_be_bytes(self.tag(n, port, binding));
        Token { sequence: pad.sequence_for(port), tsval: tag ^ pad.tsval }
    }

    /// Checks, in constant time, whether `tsval` carries the tag of (n, port, binding).
    ///
    /// The other half of the token, the sequence number, is what the caller found (n, port) by.
    pub fn open(&self, n: u64, port: u16, tsval: u32, binding: Binding) -> Option<Opened> {
        let claimed = (tsval ^ self.pad(n).tsval).to_be_bytes();
        bool::from(claimed.ct_eq(&self.tag(n, port, binding))).then_some(Opened { n, port, binding })
    }

    fn tag(&self, n: u64, port: u16, binding: Binding) -> [u8; 4] {
        let mut mac = self.mac.clone();
        mac.update(LABEL);
        mac.update(&n.to_be_bytes());
        mac.update(&port.to_be_bytes());
        match binding {
            Binding::Unbound => mac.update(&[0]),
            Binding::Bound(IpAddr::V4(address)) => {
                mac.update(&[4]);
                mac.update(&address.octets());
            }
            Binding::Bound(IpAddr::V6(address)) => {
                mac.update(&[6]);
                mac.update(&address.octets());
            }
        }
        let [a, b, c, d, ..]: [u8; 20] = mac.finalize().into_bytes().into();
        [a, b, c, d]
    }
}

impl Pad {
    /// The sequence number of a knock for this selector: fixed by (key, n, port), so a server can know it ahead.
    pub fn sequence_for(&self, port: u16) -> u32 {
        self.sequence ^ (u32::from(port) << 16)
    }

    /// The knock port that goes with this counter.
    pub fn knock_port(&self, ports: &KnockPorts) -> u16 {
        ports.pick(self.choice)
    }
}

impl Opened {
    /// The counter: Unix seconds, or the knocks of a profile of the ancestor's so far.
    pub const fn n(&self) -> u64 {
        self.n
    }

    /// The selector of the service asked for.
    pub const fn port(&self) -> u16 {
        self.port
    }

    /// Which source the tag covered.
    pub const fn binding(&self) -> Binding {
        self.binding
    }
}
