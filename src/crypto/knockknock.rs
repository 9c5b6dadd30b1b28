//! The token of knockknock, the ancestor: twelve bytes of a SYN (docs/protocol.md section 6).
//!
//! ```text
//! P = port(2) || HMAC-SHA1(mac_key, port(2))[0..10]
//! C = P xor AES-128-ECB(cipher_key, 0(12) || counter(4))[0..12]
//! C[0..2] is the IP ID, C[2..6] the sequence number, C[6..10] the acknowledgment number, C[10..12] the window.
//! ```
//!
//! Every number is big-endian. Nothing in it holds for a time or for a source.

use std::str::FromStr;

use aes::Aes128Enc;
use aes::cipher::{BlockCipherEncrypt, KeyInit};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use hmac::{Hmac, Mac};
use serde::{Deserialize, Serialize};
use sha1::Sha1;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use thiserror::Error;
use zeroize::Zeroizing;

use super::{Binding, KeyError, Opened, PrivateKey, PublicKey, Secret};

/// Bytes of a cipher key.
const CIPHER_LEN: usize = 16;

/// Bytes of a MAC key at least: what the ancestor makes.
const MAC_LEN: usize = 16;

/// Bytes of a MAC key at most: a block of SHA-1, to which a shorter one is filled up with zeros (RFC 2104).
const MAC_MAX: usize = 64;

/// Counters that the ancestor's server looks at, from the next one on (`error_window`).
pub const WINDOW: u64 = 20;

/// The last counter: it has 32 bits.
pub const LAST: u64 = u32::MAX as u64;

/// The two keys of a profile. Their text is two lines of standard base64: the cipher key and the MAC key.
#[derive(Clone, Serialize, Deserialize)]
pub struct Secrets {
    cipher: Secret<CIPHER_LEN>,
    mac: Secret<MAC_MAX>,
}

/// Why a profile's keys are refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum SecretsError {
    /// Another number of lines than two.
    #[error("not the keys of a profile: they are two lines, cipher key and MAC key")]
    NotTwoLines,
    /// Not standard base64 with padding.
    #[error("{0} is not standard base64")]
    NotBase64(&'static str),
    /// A key that is too short or too long.
    #[error("{what} has {length} bytes, not {wanted}")]
    Length {
        /// Which key.
        what: &'static str,
        /// Its length.
        length: usize,
        /// What it should be.
        wanted: &'static str,
    },
}

impl FromStr for Secrets {
    type Err = SecretsError;

    fn from_str(text: &str) -> Result<Self, SecretsError> {
        let mut lines = text.trim_end().lines();
        let (Some(cipher), Some(mac), None) = (lines.next(), lines.next(), lines.next()) else {
            return Err(SecretsError::NotTwoLines);
        };
        let decode = |what, line: &str| {
            BASE64.decode(line.trim_ascii()).map(Zeroizing::new).map_err(|_| SecretsError::NotBase64(what))
        };
        let (cipher, mac) = (decode("the cipher key", cipher)?, decode("the MAC key", mac)?);
        let wrong = |what, length, wanted| SecretsError::Length { what, length, wanted };
        let cipher: [u8; CIPHER_LEN] =
            cipher.as_slice().try_into().map_err(|_| wrong("the cipher key", cipher.len(), "16"))?;
        if !(MAC_LEN..=MAC_MAX).contains(&mac.len()) {
            return Err(wrong("the MAC key", mac.len(), "16 to 64"));
        }
        let mut filled = Zeroizing::new([0; MAC_MAX]);
        filled.iter_mut().zip(mac.iter()).for_each(|(to, from)| *to = *from);
        Ok(Self { cipher: Secret::new(cipher), mac: Secret::new(*filled) })
    }
}

impl Secrets {
    /// Whether these are the same two keys.
    pub fn is_same(&self, other: &Self) -> bool {
        self.cipher.is_same(&other.cipher) & self.mac.is_same(&other.mac)
    }

    /// A public key that stands for this profile wherever one names a user: the same for the same keys, and nobody's.
    ///
    /// # Errors
    /// [`KeyError`], with a probability that is not worth a number.
    pub fn stand_in(&self) -> Result<PublicKey, KeyError> {
        let digest = Sha256::new()
            .chain_update(b"knockq stands for knockknock")
            .chain_update(self.cipher.expose())
            .chain_update(self.mac.expose());
        Ok(*PrivateKey::from_bytes(digest.finalize().into())?.public())
    }
}

/// A token on the wire, in host order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Token {
    /// `C[0..2]`: the identification of the IPv4 header, which IPv6 has not.
    pub ip_id: u16,
    /// `C[2..6]`: the TCP sequence number.
    pub sequence: u32,
    /// `C[6..10]`: the TCP acknowledgment number, without the flag.
    pub acknowledgment: u32,
    /// `C[10..12]`: the TCP window.
    pub window: u16,
}

/// The keyed state of both functions for one profile.
#[derive(Clone)]
pub struct Key {
    cipher: Aes128Enc,
    mac: Hmac<Sha1>,
}

impl Key {
    /// Keys the cipher and the MAC.
    pub fn new(secrets: &Secrets) -> Self {
        Self { cipher: Aes128Enc::new(secrets.cipher.expose().into()), mac: Hmac::new(secrets.mac.expose().into()) }
    }

    /// Makes the token of a counter for a port.
    pub fn seal(&self, counter: u32, port: u16) -> Token {
        Token::from_bytes(self.ciphertext(counter, port))
    }

    /// Checks, in constant time, whether this is the token of (counter, port).
    pub fn open(&self, counter: u32, port: u16, token: &Token) -> Option<Opened> {
        let is_right = bool::from(token.to_bytes().ct_eq(&self.ciphertext(counter, port)));
        is_right.then_some(Opened { n: counter.into(), port, binding: Binding::Unbound })
    }

    /// The port that a token asks for, if it is one of this counter.
    pub fn port(&self, counter: u32, token: &Token) -> Option<u16> {
        let [high, low, ..] = token.to_bytes();
        let [pad_high, pad_low, ..] = self.pad(counter);
        let port = u16::from_be_bytes([high ^ pad_high, low ^ pad_low]);
        self.open(counter, port, token).map(|_| port)
    }

    fn ciphertext(&self, counter: u32, port: u16) -> [u8; 12] {
        let mut mac = self.mac.clone();
        mac.update(&port.to_be_bytes());
        let tag: [u8; 20] = mac.finalize().into_bytes().into();
        let plaintext = port.to_be_bytes().into_iter().chain(tag);
        let mut ciphertext = self.pad(counter);
        ciphertext.iter_mut().zip(plaintext).for_each(|(byte, plain)| *byte ^= plain);
        ciphertext
    }

    fn pad(&self, counter: u32) -> [u8; 12] {
        let mut block = [0; 16];
        block[12..].copy_from_slice(&counter.to_be_bytes());
        let mut block = block.into();
        self.cipher.encrypt_block(&mut block);
        let [pad @ .., _, _, _, _]: [u8; 16] = block.into();
        pad
    }
}

impl Token {
    const fn from_bytes([a, b, c, d, e, f, g, h, i, j, k, l]: [u8; 12]) -> Self {
        Self {
            ip_id: u16::from_be_bytes([a, b]),
            sequence: u32::from_be_bytes([c, d, e, f]),
            acknowledgment: u32::from_be_bytes([g, h, i, j]),
            window: u16::from_be_bytes([k, l]),
        }
    }

    fn to_bytes(self) -> [u8; 12] {
        let [a, b] = self.ip_id.to_be_bytes();
        let [c, d, e, f] = self.sequence.to_be_bytes();
        let [g, h, i, j] = self.acknowledgment.to_be_bytes();
        let [k, l] = self.window.to_be_bytes();
        [a, b, c, d, e, f, g, h, i, j, k, l]
    }
}

#[cfg(test)]
mod tests {
    use super::{Key, Secrets, SecretsError};

    const KEYS: &str = "sjiTG60X1BTdJ1FAi3J1pg==\n1hPsDZAaENI/HY8wSE5vCw==\n";

    #[test]
    fn a_token_opens_for_its_counter_and_port_and_with_all_of_its_bits() {
        let key = Key::new(&KEYS.parse().unwrap());
        let token = key.seal(7, 22);
        let opened = key.open(7, 22, &token).unwrap();
        assert_eq!((opened.n(), opened.port()), (7, 22));
        assert_eq!(key.port(7, &token), Some(22));
        assert!(
            key.open(8, 22, &token).is_none() && key.open(7, 23, &token).is_none() && key.port(8, &token).is_none()
        );
        let bytes = token.to_bytes();
        for bit in 0..96 {
            let mut changed = bytes;
            changed[bit / 8] ^= 1 << (bit % 8);
            let changed = super::Token::from_bytes(changed);
            assert!(key.open(7, 22, &changed).is_none() && key.port(7, &changed).is_none(), "bit {bit}");
        }
    }

    #[test]
    fn the_same_keys_have_the_same_stand_in_and_others_another() {
        let stand_in = |text: &str| text.parse::<Secrets>().unwrap().stand_in().unwrap();
        assert_eq!(stand_in(KEYS), stand_in(KEYS.trim_end()));
        assert_ne!(stand_in(KEYS), stand_in(&KEYS.replace("sji", "tji")));
    }

    #[test]
    fn keys_of_another_form_are_refused_by_name() {
        let [cipher, mac] = KEYS.trim_end().split('\n').collect::<Vec<_>>().try_into().unwrap();
        let length = |what, length, wanted| SecretsError::Length { what, length, wanted };
        for (text, error) in [
            (String::new(), SecretsError::NotTwoLines),
            (cipher.to_owned(), SecretsError::NotTwoLines),
            (format!("{cipher}\n{mac}\n{mac}"), SecretsError::NotTwoLines),
            (format!("{cipher}!\n{mac}"), SecretsError::NotBase64("the cipher key")),
            (format!("{cipher}\n{}", mac.trim_end_matches('=')), SecretsError::NotBase64("the MAC key")),
            (format!("AAAA\n{mac}"), length("the cipher key", 3, "16")),
            (format!("{cipher}\nAAAA"), length("the MAC key", 3, "16 to 64")),
            (format!("{cipher}\n{}", "A".repeat(88)), length("the MAC key", 66, "16 to 64")),
        ] {
            assert_eq!(text.parse::<Secrets>().err(), Some(error), "{text:?}");
        }
    }
}
