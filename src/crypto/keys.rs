//! X25519 key pairs and what two of them agree on (docs/protocol.md section 1).

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use hkdf::Hkdf;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use thiserror::Error;
use x25519_dalek::StaticSecret;
use zeroize::Zeroizing;

use super::Secret;

/// Salt of the key derivation: the protocol's name and version.
const SALT: &[u8] = b"knockq v1";

/// 2^255 - 19, little-endian as RFC 7748 writes it.
const FIELD_PRIME: [u8; 32] = {
    let mut bytes = [0xff; 32];
    bytes[0] = 0xed;
    bytes[31] = 0x7f;
    bytes
};

/// The canonical u-coordinates whose order divides 8: with them every agreement is zero, whatever the private key.
const LOW_ORDER: [[u8; 32]; 5] = {
    let mut one = [0; 32];
    one[0] = 1;
    let mut minus_one = FIELD_PRIME;
    minus_one[0] -= 1;
    let eight = [
        0xe0, 0xeb, 0x7a, 0x7c, 0x3b, 0x41, 0xb8, 0xae, 0x16, 0x56, 0xe3, 0xfa, 0xf1, 0x9f, 0xc4, 0x6a, 0xda, 0x09,
        0x8d, 0xeb, 0x9c, 0x32, 0xb1, 0xfd, 0x86, 0x62, 0x05, 0x16, 0x5f, 0x49, 0xb8, 0x00,
    ];
    let other_eight = [
        0x5f, 0x9c, 0x95, 0xbc, 0xa3, 0x50, 0x8c, 0x24, 0xb1, 0xd0, 0xb1, 0x55, 0x9c, 0x83, 0xef, 0x5b, 0x04, 0x44,
        0x5c, 0xc4, 0x58, 0x1c, 0x8e, 0x86, 0xd8, 0x22, 0x4e, 0xdd, 0xd0, 0x9f, 0x11, 0x57,
    ];
    [[0; 32], one, minus_one, eight, other_eight]
};

/// A public key: a canonical u-coordinate of Curve25519 that is not of low order.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "[u8; 32]", into = "[u8; 32]")]
pub struct PublicKey([u8; 32]);

impl PublicKey {
    /// The 32 bytes, little-endian as in RFC 7748.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// What people compare in place of the key, aloud if need be: the first 16 of the 32 bytes of its SHA-256, as eight
    /// groups of four hexadecimal digits. Nobody finds another key that has the same: that takes 2^128 tries.
    pub fn fingerprint(&self) -> String {
        let digest = Sha256::digest(self.0);
        let groups: Vec<String> =
            digest.chunks(2).take(8).map(|pair| pair.iter().map(|byte| format!("{byte:02x}")).collect()).collect();
        groups.join(" ")
    }
}

impl TryFrom<[u8; 32]> for PublicKey {
    type Error = KeyError;

    fn try_from(bytes: [u8; 32]) -> Result<Self, KeyError> {
        if bytes.iter().rev().ge(FIELD_PRIME.iter().rev()) {
            Err(KeyError::NonCanonical)
        } else if LOW_ORDER.contains(&bytes) {
            Err(KeyError::LowOrder)
        } else {
            Ok(Self(bytes))
        }
    }
}

impl From<PublicKey> for [u8; 32] {
    fn from(key: PublicKey) -> Self {
        key.0
    }
}

impl FromStr for PublicKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        Self::try_from(*decode(text)?)
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&BASE64.encode(self.0))
    }
}

/// A private key. It is never printed but for [`PrivateKey::to_file_line`].
#[derive(Clone)]
pub struct PrivateKey {
    secret: StaticSecret,
    public: PublicKey,
}

impl PrivateKey {
    /// A new key from the kernel's random numbers.
    ///
    /// # Errors
    /// When the kernel gives none.
    pub fn generate() -> Result<Self, KeyError> {
        let mut bytes = Zeroizing::new([0; 32]);
        getrandom::fill(&mut *bytes).map_err(|_| KeyError::NoRandomness)?;
        Self::from_bytes(*bytes)
    }

    pub(super) fn from_bytes(bytes: [u8; 32]) -> Result<Self, KeyError> {
        let secret = StaticSecret::from(bytes);
        let public = PublicKey::try_from(*x25519_dalek::PublicKey::from(&secret).as_bytes())?;
        Ok(Self { secret, public })
    }

    /// The public key that belongs to it.
    pub const fn public(&self) -> &PublicKey {
        &self.public
    }

    /// The line of base64 that a key file holds, with its newline.
    pub fn to_file_line(&self) -> Zeroizing<String> {
        let mut line = Zeroizing::new(BASE64.encode(self.secret.as_bytes()));
        line.push('\n');
        line
    }
}

impl FromStr for PrivateKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        Self::from_bytes(*decode(text)?)
    }
}

/// An optional key that both sides hold besides their pairs, for cover against quantum computers.
#[derive(Clone)]
pub struct PresharedKey(Secret<32>);

impl FromStr for PresharedKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        let bytes = decode(text)?;
        if bytes.iter().all(|&byte| byte == 0) {
            Err(KeyError::ZeroPresharedKey)
        } else {
            Ok(Self(Secret::new(*bytes)))
        }
    }
}

/// Which end of the agreement the private key belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// It knocks.
    Client,
    /// It is knocked at.
    Server,
}

/// What client and server agree on: `k_enc` (AES-256) and `k_mac` (HMAC-SHA1).
#[derive(Clone, Serialize, Deserialize)]
pub struct KnockSecrets {
    pub(super) enc: Secret<32>,
    pub(super) mac: Secret<20>,
}

impl KnockSecrets {
    /// Whether these are the same two keys.
    pub fn is_same(&self, other: &Self) -> bool {
        self.enc.is_same(&other.enc) & self.mac.is_same(&other.mac)
    }

    /// Agrees on the two keys: HKDF-SHA256 over the X25519 agreement and the pre-shared key.
    ///
    /// # Errors
    /// [`KeyError::SameKey`] if both ends have one key, [`KeyError::LowOrder`] if the agreement is all zero.
    pub fn derive(
        side: Side,
        own: &PrivateKey,
        peer: &PublicKey,
        preshared: Option<&PresharedKey>,
    ) -> Result<Self, KeyError> {
        if own.public() == peer {
            return Err(KeyError::SameKey);
        }
        let agreed = own.secret.diffie_hellman(&x25519_dalek::PublicKey::from(*peer.as_bytes()));
        if !agreed.was_contributory() {
            return Err(KeyError::LowOrder);
        }
        let (client, server) = match side {
            Side::Client => (own.public(), peer),
            Side::Server => (peer, own.public()),
        };
        let zero = [0; 32];
        let preshared = preshared.map_or(&zero, |key| key.0.expose());
        let input = Zeroizing::new([*agreed.as_bytes(), *preshared].concat());
        let info = [*client.as_bytes(), *server.as_bytes()].concat();

        let mut output = Zeroizing::new([0; 52]);
        Hkdf::<Sha256>::new(Some(SALT), &input).expand(&info, &mut *output).map_err(|_| KeyError::Length(52))?;
        let mut enc = Zeroizing::new([0; 32]);
        let mut mac = Zeroizing::new([0; 20]);
        let (first, last) = output.split_at(32);
        enc.copy_from_slice(first);
        mac.copy_from_slice(last);
        Ok(Self { enc: Secret::new(*enc), mac: Secret::new(*mac) })
    }
}

/// Why a key is refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum KeyError {
    /// Not standard base64 with padding.
    #[error("not a key: a key is one line of standard base64")]
    NotBase64,
    /// Another number of bytes than 32.
    #[error("not a key: {0} bytes instead of 32")]
    Length(usize),
    /// The top bit is set or the value is 2^255 - 19 or more.
    #[error("public key is not canonical: its number is 2^255-19 or more")]
    NonCanonical,
    /// Every agreement with it would be zero.
    #[error("public key is of low order: anyone could knock with it")]
    LowOrder,
    /// A pre-shared key of 32 zero bytes stands for none.
    #[error("pre-shared key is all zero")]
    ZeroPresharedKey,
    /// Client and server cannot be one.
    #[error("client and server have the same key")]
    SameKey,
    /// The kernel's random number generator failed.
    #[error("the kernel gave no random numbers")]
    NoRandomness,
}

fn decode(text: &str) -> Result<Zeroizing<[u8; 32]>, KeyError> {
    let bytes = Zeroizing::new(BASE64.decode(text.trim_ascii()).map_err(|_| KeyError::NotBase64)?);
    <[u8; 32]>::try_from(bytes.as_slice()).map(Zeroizing::new).map_err(|_| KeyError::Length(bytes.len()))
}
