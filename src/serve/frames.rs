//! What the verifier may ask of the monitor: two fixed-size frames and no other.
//!
//! ```text
//!   0      kind: 1 open, 2 close          8..12   seconds (open), big-endian
//!   1      family: 4 or 6                12..28   address, IPv4 in its first four bytes
//!   2      transport: 6 or 17            28..92   user, padded with zeros
//!   3      once: 0 or 1                  92..156  service (open), padded with zeros
//!   4..6   port, big-endian             156..160  number of the token, big-endian
//!   6      bound (open): 0 or 1           7      zero
//! ```
//!
//! Every byte has one right form, so whatever decodes encodes to itself.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use thiserror::Error;

use crate::service::{Name, Port, Transport};

/// Bytes of a frame.
pub const FRAME_LEN: usize = 160;

/// A request for one door.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Frame {
    /// Let this source connect to this port.
    Open {
        /// Who may come in.
        source: IpAddr,
        /// Where.
        port: Port,
        /// One connection only.
        once: bool,
        /// The token was bound to the source.
        bound: bool,
        /// For how many seconds.
        seconds: u32,
        /// Who knocked.
        user: Name,
        /// For what.
        service: Name,
        /// With which token: a number that tells it from others of this user's.
        token: u32,
    },
    /// Take back what this token of a user's opened for this source.
    Close {
        /// Who could come in.
        source: IpAddr,
        /// Where.
        port: Port,
        /// Whose knock had opened it.
        user: Name,
        /// With which token.
        token: u32,
    },
}

/// A frame that the verifier cannot have meant: the peer is not what it should be.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum FrameError {
    /// Another number of bytes than [`FRAME_LEN`].
    #[error("a frame has {FRAME_LEN} bytes, not {0}")]
    Length(usize),
    /// A frame carries nothing but its bytes.
    #[error("a frame carries no descriptors")]
    Descriptors,
    /// A field holds what it must not.
    #[error("a frame's field `{0}` is wrong")]
    Field(&'static str),
}

impl Frame {
    /// The bytes of this frame.
    pub fn encode(&self) -> [u8; FRAME_LEN] {
        let (kind, source, port, [once, bound], seconds, user, service, token) = match self {
            Self::Open { source, port, once, bound, seconds, user, service, token } => {
                (1, source, port, [*once, *bound], *seconds, user.as_str(), service.as_str(), token)
            }
            Self::Close { source, port, user, token } => (2, source, port, [false; 2], 0, user.as_str(), "", token),
        };
        let (family, address) = match source {
            IpAddr::V4(address) => (4, address.octets().to_vec()),
            IpAddr::V6(address) => (6, address.octets().to_vec()),
        };
        let mut frame = Vec::with_capacity(FRAME_LEN);
        frame.extend([kind, family, port.transport.number(), u8::from(once)]);
        frame.extend(port.number.to_be_bytes());
        frame.extend([u8::from(bound), 0]);
        frame.extend(seconds.to_be_bytes());
        for (field, end) in [(address.as_slice(), 28), (user.as_bytes(), 92), (service.as_bytes(), 156)] {
            frame.extend(field);
            frame.resize(end, 0);
        }
        frame.extend(token.to_be_bytes());
        let mut bytes = [0; FRAME_LEN];
        bytes.iter_mut().zip(frame).for_each(|(to, from)| *to = from);
        bytes
    }

    /// Reads a frame.
    ///
    /// # Errors
    /// Whatever is not exactly what [`Frame::encode`] makes.
    pub fn decode(bytes: &[u8]) -> Result<Self, FrameError> {
        let bytes: &[u8; FRAME_LEN] = bytes.try_into().map_err(|_| FrameError::Length(bytes.len()))?;
        let [kind, family, transport, once, port_high, port_low, bound, _, rest @ ..] = bytes;
        let (seconds, rest) = rest.split_first_chunk::<4>().ok_or(FrameError::Field("seconds"))?;
        let (address, rest) = rest.split_first_chunk::<16>().ok_or(FrameError::Field("address"))?;
        let (user, rest) = rest.split_first_chunk::<64>().ok_or(FrameError::Field("user"))?;
        let (service, rest) = rest.split_first_chunk::<64>().ok_or(FrameError::Field("service"))?;
        let token = u32::from_be_bytes(*rest.first_chunk().ok_or(FrameError::Field("token"))?);

        let [a, b, c, d, ..] = *address;
        let source = match family {
            4 => Ipv4Addr::from([a, b, c, d]).into(),
            6 => Ipv6Addr::from(*address).into(),
            _ => return Err(FrameError::Field("family")),
        };
        let transport = Transport::from_number(*transport).ok_or(FrameError::Field("transport"))?;
        let number = u16::from_be_bytes([*port_high, *port_low]);
        if number == 0 {
            return Err(FrameError::Field("port"));
        }
        let port = Port { transport, number };
        let user = name(user).ok_or(FrameError::Field("user"))?;
        let frame = match kind {
            1 => Self::Open {
                source,
                port,
                once: *once == 1,
                bound: *bound == 1,
                seconds: u32::from_be_bytes(*seconds),
                user,
                service: name(service).ok_or(FrameError::Field("service"))?,
                token,
            },
            2 => Self::Close { source, port, user, token },
            _ => return Err(FrameError::Field("kind")),
        };
        if frame.encode() == *bytes { Ok(frame) } else { Err(FrameError::Field("padding")) }
    }
}

fn name(padded: &[u8; 64]) -> Option<Name> {
    let length = padded.iter().position(|&byte| byte == 0).unwrap_or(padded.len());
    std::str::from_utf8(padded.get(..length)?).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::{FRAME_LEN, Frame, FrameError};
    use proptest::prelude::{any, proptest};

    fn open(source: &str) -> Frame {
        Frame::Open {
            source: source.parse().unwrap(),
            port: "udp/51820".parse().unwrap(),
            once: true,
            bound: true,
            seconds: 30,
            user: "alice".parse().unwrap(),
            service: "s".repeat(64).parse().unwrap(),
            token: 0x0102_0304,
        }
    }

    #[test]
    fn frames_survive_the_way() {
        for source in ["203.0.113.9", "2001:db8::9", "::ffff:192.0.2.1"] {
            let source_address = source.parse().unwrap();
            let (port, user) = ("tcp/1".parse().unwrap(), "b".parse().unwrap());
            let close = Frame::Close { source: source_address, port, user, token: u32::MAX };
            for frame in [open(source), close] {
                assert_eq!(Frame::decode(&frame.encode()), Ok(frame));
            }
        }
    }

    #[test]
    fn frames_of_another_length_are_refused() {
        let bytes = open("203.0.113.9").encode();
        for length in 0..FRAME_LEN {
            assert_eq!(Frame::decode(&bytes[..length]), Err(FrameError::Length(length)));
        }
        assert_eq!(Frame::decode(&[&bytes[..], &[0]].concat()), Err(FrameError::Length(161)));
    }

    #[test]
    fn a_field_with_another_value_than_its_own_is_refused_by_name() {
        let bytes = open("203.0.113.9").encode();
        let changes = [
            (0, 0, "kind"),
            (0, 3, "kind"),
            (1, 5, "family"),
            (2, 1, "transport"),
            (3, 2, "padding"),
            (6, 2, "padding"),
            (7, 1, "padding"),
            (16, 1, "padding"),
            (28, b'-', "user"),
            (40, b'x', "padding"),
            (92, 0, "service"),
        ];
        for (place, value, field) in changes {
            let mut changed = bytes;
            changed[place] = value;
            assert_eq!(Frame::decode(&changed), Err(FrameError::Field(field)), "byte {place}");
        }
    }

    proptest! {
        #[test]
        fn whatever_decodes_encodes_to_itself(mut bytes in proptest::collection::vec(any::<u8>(), FRAME_LEN), kind in 0_u8..4) {
            bytes[0] = kind;
            if let Ok(frame) = Frame::decode(&bytes) {
                assert_eq!(frame.encode()[..], bytes);
            }
        }
    }
}
