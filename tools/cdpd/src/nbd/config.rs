//! What the configuration says of NBD.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, bail};
use cdp_types::VolumeName;
use nbd_export::{Limits, Listen, Tls, TlsMode};
use serde::{Deserialize, Deserializer};

use crate::config::SocketMode;
use crate::size::ByteSize;

/// How volumes and their instants are exported over NBD: section `[nbd]`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Nbd {
    /// Where it listens; nowhere unless told.
    pub listen: Vec<NbdAddress>,
    /// Its Unix sockets' mode; 0600 unless told otherwise.
    pub mode: Option<SocketMode>,
    /// Whether addresses that other machines can reach may go without TLS and client certificates.
    pub allow_remote: bool,
    /// The volumes whose heads clients may write to; `*` means all.
    pub writable: Vec<String>,
    /// Whether they may even while a guest has the volume.
    pub writable_beside_guests: bool,
    /// Certificates, for TLS.
    pub tls: Option<NbdTls>,
    /// Connections at one time.
    pub connections: Option<usize>,
    /// Memory for payloads of all connections.
    pub memory: Option<ByteSize>,
}

/// Section `[nbd.tls]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NbdTls {
    /// Whether clients that do not ask for TLS are refused; so unless told otherwise.
    #[serde(default = "required")]
    pub required: bool,
    /// A PEM file with the certificate and those that it was signed with.
    pub certificates: PathBuf,
    /// A PEM file with its key.
    pub key: PathBuf,
    /// A PEM file with the authorities of which every client must show a certificate.
    pub client_authorities: Option<PathBuf>,
}

fn required() -> bool {
    true
}

impl NbdTls {
    pub(super) fn to_tls(&self) -> Tls {
        Tls {
            mode: if self.required { TlsMode::Required } else { TlsMode::Allowed },
            certificates: self.certificates.clone(),
            key: self.key.clone(),
            client_authorities: self.client_authorities.clone(),
        }
    }
}

impl Nbd {
    /// Refuses what would let strangers in, and what can only be a mistake.
    ///
    /// # Errors
    /// What is wrong, and what to do.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        let knows_clients =
            self.tls.as_ref().is_some_and(|tls| tls.required && tls.client_authorities.is_some());
        for address in &self.listen {
            if let NbdAddress::Tcp(address) = address
                && !address.ip().is_loopback()
                && !knows_clients
                && !self.allow_remote
            {
                bail!(
                    "others could reach NBD on {address}, and it asks nobody who they are: use a loopback address, \
                     give [nbd.tls] with client_authorities, or say --nbd-allow-remote"
                );
            }
        }
        for name in self.writable.iter().filter(|name| *name != "*") {
            name.parse::<VolumeName>().with_context(|| format!("[nbd] writable: '{name}'"))?;
        }
        Ok(())
    }

    pub(super) fn limits(&self) -> Limits {
        let mut limits = Limits::default();
        limits.connections = self.connections.unwrap_or(limits.connections);
        if let Some(ByteSize(bytes)) = self.memory {
            limits.total_bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
            limits.connection_bytes = limits.connection_bytes.min(limits.total_bytes);
        }
        limits
    }
}

/// An address as the command line and the configuration give it: `unix:PATH` or `tcp:ADDRESS:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NbdAddress {
    /// A Unix socket.
    Unix(PathBuf),
    /// A TCP socket.
    Tcp(SocketAddr),
}

impl NbdAddress {
    pub(super) fn to_listen(&self, mode: Option<SocketMode>) -> Listen {
        match self {
            Self::Unix(path) => Listen::Unix { path: path.clone(), mode: mode.map_or(0o600, |m| m.0) },
            Self::Tcp(address) => Listen::Tcp(*address),
        }
    }
}

impl FromStr for NbdAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("unix", path)) if path.starts_with('/') => Ok(Self::Unix(path.into())),
            Some(("unix", _)) => Err(format!("'{text}': the socket's path must be absolute")),
            Some(("tcp", address)) => address.parse().map(Self::Tcp).map_err(|_| {
                format!(
                    "'{text}': tcp: is followed by ADDRESS:PORT, as in tcp:127.0.0.1:10809 or tcp:[::1]:10809"
                )
            }),
            _ => Err(format!("'{text}': say unix:PATH or tcp:ADDRESS:PORT")),
        }
    }
}

impl<'de> Deserialize<'de> for NbdAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn addresses_are_read_and_what_is_none_is_refused_with_the_reason() {
        assert_eq!("unix:/run/nbd".parse(), Ok(NbdAddress::Unix("/run/nbd".into())));
        assert_eq!("tcp:[::1]:10809".parse(), Ok(NbdAddress::Tcp("[::1]:10809".parse().unwrap())));
        for wrong in ["unix:nbd", "tcp:localhost", "tcp:127.0.0.1", "/run/nbd", "", "udp:1.2.3.4:5"] {
            assert!(wrong.parse::<NbdAddress>().unwrap_err().starts_with(&format!("'{wrong}'")));
        }
    }

    #[test]
    fn an_open_door_must_be_asked_for() {
        let open = Nbd { listen: vec!["tcp:0.0.0.0:10809".parse().unwrap()], ..Nbd::default() };
        assert!(open.check().unwrap_err().to_string().contains("--nbd-allow-remote"));
        assert!(Nbd { allow_remote: true, ..open.clone() }.check().is_ok());
        let tls = |client_authorities: Option<&str>| NbdTls {
            required: true,
            certificates: "/c".into(),
            key: "/k".into(),
            client_authorities: client_authorities.map(PathBuf::from),
        };
        assert!(
            Nbd { tls: Some(tls(None)), ..open.clone() }.check().is_err(),
            "TLS alone asks nobody who they are"
        );
        assert!(Nbd { tls: Some(tls(Some("/ca"))), ..open }.check().is_ok());
        assert!(Nbd { writable: vec!["no/name".to_owned()], ..Nbd::default() }.check().is_err());
        assert!(Nbd { writable: vec!["*".to_owned()], ..Nbd::default() }.check().is_ok());
    }
}
