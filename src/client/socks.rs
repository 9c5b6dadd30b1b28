//! The server's side of SOCKS 5 (RFC 1928), without or with user and password (RFC 1929), as far as a name or address and a
//! port: no byte is read beyond the request, and none of it takes more than 255 bytes of memory.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use zeroize::Zeroizing;

use crate::config::FileError;
use crate::config::secure_file::{self, Privacy};
use crate::service::HostAddress;

/// The version of the protocol.
const SOCKS: u8 = 5;
/// The version of user and password.
const PASSWORD: u8 = 1;

/// METHOD: no authentication.
const BY_NOTHING: u8 = 0;
/// METHOD: user and password.
const BY_PASSWORD: u8 = 2;
/// METHOD: none of those that the client has.
const BY_NO_METHOD: u8 = 0xff;

/// CMD: the one that is served.
const CONNECT: u8 = 1;

/// ATYP: four bytes.
const V4: u8 = 1;
/// ATYP: a length, and as many bytes.
const DOMAIN: u8 = 3;
/// ATYP: sixteen bytes.
const V6: u8 = 4;

/// REP: what came of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Reply {
    /// There is a connection.
    Succeeded = 0,
    /// General failure.
    Failed = 1,
    /// A rule forbids it.
    NotAllowed = 2,
    /// No route.
    NetworkUnreachable = 3,
    /// The host does not answer, or its name has no address.
    HostUnreachable = 4,
    /// The port answers with resets.
    Refused = 5,
    /// TTL expired, which others answer too where nothing came in time.
    TimedOut = 6,
    /// BIND and UDP ASSOCIATE.
    NoSuchCommand = 7,
    /// An address that is neither IPv4 nor IPv6 nor a name.
    NoSuchAddressType = 8,
}

/// Where a client wants to go.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Target {
    /// A name, or an address as text.
    pub host: HostAddress,
    /// The TCP port.
    pub port: u16,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.as_str().parse() {
            Ok(address) => SocketAddr::new(address, self.port).fmt(f),
            Err(_) => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

/// Why a client gets nowhere.
#[derive(Debug, Error)]
pub enum SocksError {
    /// It went away.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Another protocol.
    #[error("speaks no SOCKS 5")]
    Version,
    /// It cannot authenticate as it must, or not at all.
    #[error("offers no way of authentication that is asked for")]
    NoMethod,
    /// Wrong.
    #[error("wrong user or password")]
    Login,
    /// Not CONNECT.
    #[error("asks for a command other than CONNECT")]
    Command,
    /// Not known.
    #[error("asks for an unknown type of address")]
    AddressType,
    /// No name that could be resolved.
    #[error("asks for what is no host name")]
    Name,
}

impl SocksError {
    /// What a client is told whose request is wrong; nothing if it did not come so far.
    const fn reply(&self) -> Option<Reply> {
        match self {
            Self::Io(_) | Self::NoMethod | Self::Login => None,
            Self::Version => Some(Reply::Failed),
            Self::Command => Some(Reply::NoSuchCommand),
            Self::AddressType => Some(Reply::NoSuchAddressType),
            Self::Name => Some(Reply::HostUnreachable),
        }
    }
}

/// Why a file is no login.
#[derive(Debug, Error)]
pub enum LoginError {
    /// It is refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// It holds something else.
    #[error("{}: is not one line `user:password`, with 1 to 255 bytes each", .0.display())]
    Content(PathBuf),
}

/// The user and password that are asked for: their SHA-256, whose comparison does not tell a length either.
pub struct Login {
    user: [u8; 32],
    password: [u8; 32],
}

impl Login {
    /// Reads a file of one line, `user:password`, that its owner alone may read.
    ///
    /// # Errors
    /// [`LoginError`].
    pub fn read(path: &Path) -> Result<Self, LoginError> {
        let text = secure_file::read(path, Privacy::Secret)?;
        Self::parse(&text).ok_or_else(|| LoginError::Content(path.to_owned()))
    }

    fn parse(text: &str) -> Option<Self> {
        let mut lines = text.strip_prefix('\u{feff}').unwrap_or(text).lines(); // whatever system it was written on
        let (Some(line), None) = (lines.next(), lines.next()) else { return None };
        let (user, password) = line.split_once(':')?;
        let fits = |word: &str| (1..=255).contains(&word.len()) && !word.contains(char::is_control);
        (fits(user) && fits(password)).then(|| Self::new(user.as_bytes(), password.as_bytes()))
    }

    fn new(user: &[u8], password: &[u8]) -> Self {
        Self { user: Sha256::digest(user).into(), password: Sha256::digest(password).into() }
    }

    fn is(&self, other: &Self) -> bool {
        bool::from(self.user.ct_eq(&other.user) & self.password.ct_eq(&other.password))
    }
}

/// Reads where a client wants to go, once it has said who it is if there is a login. It is told what is wrong.
///
/// # Errors
/// [`SocksError`]; the connection is of no use then.
pub async fn accept<S: AsyncRead + AsyncWrite + Unpin>(
    client: &mut S,
    login: Option<&Login>,
) -> Result<Target, SocksError> {
    authenticate(client, login).await?;
    let target = request(client).await;
    if let Some(answer) = target.as_ref().err().and_then(SocksError::reply) {
        reply(client, answer, None).await?;
    }
    target
}

/// Answers a request; `bound` is the own address of a connection that was made.
///
/// # Errors
/// When the client went away.
pub async fn reply<S: AsyncWrite + Unpin>(
    client: &mut S,
    reply: Reply,
    bound: Option<SocketAddr>,
) -> Result<(), io::Error> {
    let bound = bound.unwrap_or(SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0));
    let mut message = vec![SOCKS, reply as u8, 0];
    match bound.ip() {
        IpAddr::V4(address) => {
            message.push(V4);
            message.extend(address.octets());
        }
        IpAddr::V6(address) => {
            message.push(V6);
            message.extend(address.octets());
        }
    }
    message.extend(bound.port().to_be_bytes());
    client.write_all(&message).await
}

async fn authenticate<S: AsyncRead + AsyncWrite + Unpin>(
    client: &mut S,
    login: Option<&Login>,
) -> Result<(), SocksError> {
    let [SOCKS] = bytes(client).await? else { return Err(SocksError::Version) };
    let offered = counted(client).await?;
    let wanted = if login.is_some() { BY_PASSWORD } else { BY_NOTHING };
    let is_offered = offered.contains(&wanted);
    client.write_all(&[SOCKS, if is_offered { wanted } else { BY_NO_METHOD }]).await?;
    let login = match login {
        _ if !is_offered => return Err(SocksError::NoMethod),
        None => return Ok(()),
        Some(login) => login,
    };
    let [PASSWORD] = bytes(client).await? else { return Err(SocksError::Version) };
    let (user, password) = (counted(client).await?, counted(client).await?);
    let is_right = login.is(&Login::new(&user, &password));
    client.write_all(&[PASSWORD, u8::from(!is_right)]).await?;
    if is_right { Ok(()) } else { Err(SocksError::Login) }
}

async fn request<S: AsyncRead + Unpin>(client: &mut S) -> Result<Target, SocksError> {
    let [version, command, _, address_type] = bytes(client).await?;
    if version != SOCKS {
        return Err(SocksError::Version);
    }
    let host = match address_type {
        V4 => Some(IpAddr::from(bytes::<4>(client).await?).into()),
        V6 => Some(IpAddr::from(bytes::<16>(client).await?).to_canonical().into()),
        DOMAIN => str::from_utf8(&counted(client).await?).ok().and_then(|name| name.parse().ok()),
        _ => return Err(SocksError::AddressType),
    };
    // All is read before it is judged: closing a connection with bytes unread may take the answer away from the client.
    let port = u16::from_be_bytes(bytes(client).await?);
    let host = host.ok_or(SocksError::Name)?;
    if command == CONNECT { Ok(Target { host, port }) } else { Err(SocksError::Command) }
}

async fn bytes<const N: usize>(client: &mut (impl AsyncRead + Unpin)) -> Result<[u8; N], io::Error> {
    let mut bytes = [0; N];
    client.read_exact(&mut bytes).await?;
    Ok(bytes)
}

/// A byte that says how many follow, and these.
async fn counted(client: &mut (impl AsyncRead + Unpin)) -> Result<Zeroizing<Vec<u8>>, io::Error> {
    let [length] = bytes(client).await?;
    let mut bytes = Zeroizing::new(vec![0; length.into()]);
    client.read_exact(&mut bytes).await?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
    use tokio::runtime::Builder;

    use super::{Login, Reply, SocksError, Target, accept, reply};

    /// What is accepted of these bytes, and what is answered.
    fn said(bytes: &[u8], login: Option<&str>) -> (Result<Target, SocksError>, Vec<u8>) {
        let login = login.map(|text| Login::parse(text).unwrap());
        Builder::new_current_thread().build().unwrap().block_on(async {
            let (mut client, mut server) = duplex(1024);
            client.write_all(bytes).await.unwrap();
            client.shutdown().await.unwrap();
            let target = accept(&mut server, login.as_ref()).await;
            drop(server);
            let mut answer = Vec::new();
            client.read_to_end(&mut answer).await.unwrap();
            (target, answer)
        })
    }

    #[test]
    fn addresses_and_names_are_read_as_the_rfc_has_them() {
        let v6 = "\x04\x20\x01\x0d\u{38}\0\0\0\0\0\0\0\0\0\0\0\x01"; // not 0xb8, which is no character of one byte
        for (address, expected) in [
            ("\x01\x0a\x01\x02\x03", "10.1.2.3:22"),
            ("\x03\x06server", "server:22"),
            ("\x03\x082001:d::", "[2001:d::]:22"),
            (v6, "[2001:d38::1]:22"),
            ("\x04\0\0\0\0\0\0\0\0\0\0\u{7f}\u{7f}\x0a\x01\x02\x03", "[::7f7f:a01:203]:22"),
        ] {
            let (target, answer) = said(format!("\x05\x02\x02\0\x05\x01\0{address}\0\x16").as_bytes(), None);
            assert_eq!(target.unwrap().to_string(), expected);
            assert_eq!(answer, [5, 0]);
        }
        let mapped = [&[5, 1, 0, 5, 1, 0, 4][..], &[0; 10], &[255, 255, 10, 1, 2, 3, 0, 22]].concat();
        assert_eq!(said(&mapped, None).0.unwrap().to_string(), "10.1.2.3:22");
    }

    #[test]
    fn what_is_not_served_is_answered_with_its_code() {
        let request = |command, address: &[u8]| [&[5, 1, 0, 5, command, 0][..], address, &[0, 22]].concat();
        let v4 = [1, 10, 1, 2, 3];
        for (bytes, expected) in [
            (request(2, &v4), Reply::NoSuchCommand),
            (request(3, &v4), Reply::NoSuchCommand),
            (request(1, &[2, 1, 2, 3, 4]), Reply::NoSuchAddressType),
            (request(1, b"\x03\x00"), Reply::HostUnreachable),
            (request(1, b"\x03\x02a\n"), Reply::HostUnreachable),
            (request(1, b"\x03\x01\xff"), Reply::HostUnreachable),
        ] {
            let (target, answer) = said(&bytes, None);
            assert!(target.is_err());
            assert_eq!(answer, [5, 0, 5, expected as u8, 0, 1, 0, 0, 0, 0, 0, 0]);
        }
    }

    #[test]
    fn other_protocols_and_what_ends_too_soon_are_met_with_no_answer() {
        for bytes in [&b""[..], b"\x05", b"\x04\x01\0\x16\x0a\x01\x02\x03\0", b"GET / HTTP/1.1\r\n\r\n", b"\x05\x05\0"]
        {
            let (target, answer) = said(bytes, None);
            assert!(target.is_err());
            assert_eq!(answer, [0_u8; 0]);
        }
    }

    #[test]
    fn with_a_login_only_the_right_one_gets_in_and_nothing_else_is_offered() {
        let request = "\x05\x01\0\x03\x06server\0\x16";
        let by = |user: &str, password: &str| {
            let word = |word: &str| format!("{}{word}", char::from(u8::try_from(word.len()).unwrap()));
            said(format!("\x05\x02\0\x02\x01{}{}{request}", word(user), word(password)).as_bytes(), Some("al:p:w\n"))
        };
        let (target, answer) = by("al", "p:w");
        assert_eq!((target.unwrap().to_string().as_str(), &answer[..]), ("server:22", &[5, 2, 1, 0][..]));
        for (user, password) in [("al", "p:W"), ("a", "p:w"), ("al", ""), ("", ""), ("al:p", "w")] {
            let (target, answer) = by(user, password);
            assert!(matches!(target, Err(SocksError::Login)), "{user} {password}");
            assert_eq!(answer, [5, 2, 1, 1]);
        }
        let (target, answer) = said(format!("\x05\x01\0{request}").as_bytes(), Some("al:p:w"));
        assert!(matches!(target, Err(SocksError::NoMethod)));
        assert_eq!(answer, [5, 0xff]);
        assert_eq!(said(b"\x05\x01\x02", None).1, [5, 0xff], "without a login, nobody is asked for one");
    }

    #[test]
    fn a_login_is_one_line_with_a_colon() {
        let long = "x".repeat(256);
        for text in ["", "alice", ":x", "alice:", "alice:x\nbob:y\n", "alice:x\n\n", "al\tice:x", &format!("a:{long}")]
        {
            assert!(Login::parse(text).is_none(), "{text:?}");
        }
        for text in ["alice:x:y", "alice:x:y\n", "alice:x:y\r\n", "\u{feff}alice:x:y\n"] {
            assert!(Login::parse(text).is_some_and(|login| login.is(&Login::new(b"alice", b"x:y"))), "{text:?}");
        }
    }

    #[test]
    fn a_reply_holds_the_own_address_of_the_connection() {
        let sent = |bound: &str| {
            Builder::new_current_thread().build().unwrap().block_on(async {
                let mut sent = Vec::new();
                reply(&mut sent, Reply::Succeeded, Some(bound.parse().unwrap())).await.unwrap();
                sent
            })
        };
        assert_eq!(sent("10.1.2.3:258"), [5, 0, 0, 1, 10, 1, 2, 3, 1, 2]);
        let v6 = [&[5, 0, 0, 4, 32, 1, 13, 184][..], &[0; 11], &[1, 1, 2]].concat();
        assert_eq!(sent("[2001:db8::1]:258"), v6);
    }
}
