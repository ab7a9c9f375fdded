//! What the configuration says of NBD.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, bail};
use cdp_types::VolumeName;
use nbd_export::{Limits, Listen, Tls, TlsCredentials, TlsMode};
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
    /// Whether addresses that other machines can reach may go without TLS by which clients are known.
    pub allow_remote: bool,
    /// The volumes whose heads clients may write to; `*` means all.
    pub writable: Vec<String>,
    /// Whether they may even while a guest has the volume.
    pub writable_beside_guests: bool,
    /// Certificates or pre-shared keys, for TLS.
    pub tls: Option<NbdTls>,
    /// Connections at one time.
    pub connections: Option<usize>,
    /// Memory for payloads of all connections.
    pub memory: Option<ByteSize>,
}

/// Section `[nbd.tls]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "TlsTable")]
pub struct NbdTls {
    /// Whether clients that do not ask for TLS are refused; so unless told otherwise.
    pub required: bool,
    /// The server's certificates, or the keys that it shares with its clients.
    pub credentials: TlsCredentials,
}

/// Section `[nbd.tls]`, as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TlsTable {
    required: Option<bool>,
    certificates: Option<PathBuf>,
    key: Option<PathBuf>,
    client_authorities: Option<PathBuf>,
    psk_file: Option<PathBuf>,
}

impl TryFrom<TlsTable> for NbdTls {
    type Error = &'static str;

    fn try_from(table: TlsTable) -> Result<Self, Self::Error> {
        let TlsTable { required, certificates, key, client_authorities, psk_file } = table;
        let credentials = match (psk_file, certificates, key, client_authorities) {
            (Some(file), None, None, None) => TlsCredentials::PreSharedKeys { file },
            (Some(_), ..) => {
                return Err(
                    "psk_file stands alone: pre-shared keys, or certificates and their key, not both",
                );
            }
            (None, Some(certificates), Some(key), client_authorities) => {
                TlsCredentials::Certificates { certificates, key, client_authorities }
            }
            (None, ..) => return Err("give certificates and their key, or psk_file"),
        };
        Ok(Self { required: required.unwrap_or(true), credentials })
    }
}

impl NbdTls {
    pub(super) fn to_tls(&self) -> Tls {
        let mode = if self.required { TlsMode::Required } else { TlsMode::Allowed };
        Tls { mode, credentials: self.credentials.clone() }
    }

    /// Whether nobody is served who has not shown who it is.
    fn knows_clients(&self) -> bool {
        let asks = match &self.credentials {
            TlsCredentials::Certificates { client_authorities, .. } => client_authorities.is_some(),
            TlsCredentials::PreSharedKeys { .. } => true,
        };
        self.required && asks
    }
}

impl Nbd {
    /// Refuses what would let strangers in, and what can only be a mistake.
    ///
    /// # Errors
    /// What is wrong, and what to do.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        let knows_clients = self.tls.as_ref().is_some_and(NbdTls::knows_clients);
        for address in &self.listen {
            if let NbdAddress::Tcp(address) = address
                && !address.ip().is_loopback()
                && !knows_clients
                && !self.allow_remote
            {
                bail!(
                    "others could reach NBD on {address}, and it asks nobody who they are: use a loopback address, \
                     give [nbd.tls] with client_authorities or psk_file, or say --nbd-allow-remote"
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
        let with = |tls: &str| Nbd { tls: Some(toml::from_str(tls).unwrap()), ..open.clone() }.check();
        let certificates = "certificates = '/c'\nkey = '/k'\n";
        assert!(with(certificates).is_err(), "TLS alone asks nobody who they are");
        assert!(with(&format!("{certificates}client_authorities = '/ca'")).is_ok());
        assert!(with(&format!("{certificates}client_authorities = '/ca'\nrequired = false")).is_err());
        assert!(with("psk_file = '/p'").is_ok());
        assert!(with("psk_file = '/p'\nrequired = false").is_err());
        assert!(Nbd { writable: vec!["no/name".to_owned()], ..Nbd::default() }.check().is_err());
        assert!(Nbd { writable: vec!["*".to_owned()], ..Nbd::default() }.check().is_ok());
    }

    #[test]
    fn a_server_has_certificates_or_pre_shared_keys() {
        let read = |text: &str| toml::from_str::<NbdTls>(text).map_err(|e| e.to_string());
        let tls = read("psk_file = '/p'").unwrap().to_tls();
        assert_eq!(tls.mode, TlsMode::Required);
        assert!(
            matches!(tls.credentials, TlsCredentials::PreSharedKeys { file } if file.as_os_str() == "/p")
        );
        let tls = read("certificates = '/c'\nkey = '/k'\nrequired = false").unwrap().to_tls();
        assert_eq!(tls.mode, TlsMode::Allowed);
        assert!(matches!(tls.credentials, TlsCredentials::Certificates { client_authorities: None, .. }));
        for extra in ["certificates = '/c'", "key = '/k'", "client_authorities = '/ca'"] {
            let told = read(&format!("psk_file = '/p'\n{extra}")).unwrap_err();
            assert!(told.contains("not both"), "{told}");
        }
        for missing in ["", "certificates = '/c'", "key = '/k'", "client_authorities = '/ca'"] {
            let told = read(missing).unwrap_err();
            assert!(told.contains("certificates and their key, or psk_file"), "{told}");
        }
        assert!(read("psk_file = '/p'\nkeys = '/k'").unwrap_err().contains("keys"));
    }
}
