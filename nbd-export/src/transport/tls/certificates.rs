//! TLS by X.509 certificates, with `rustls`.

use std::fs;
use std::io::{self, BufRead, Write};
use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection};

use super::{Engine, Received};
use crate::{Error, ErrorKind};

/// See [`crate::TlsCredentials::Certificates`].
pub(super) fn load(
    certificates: &Path,
    key: &Path,
    client_authorities: Option<&Path>,
) -> Result<Arc<ServerConfig>, Error> {
    let failed = |path: &Path, source: Box<dyn std::error::Error + Send + Sync>| {
        Error::because(ErrorKind::Tls, path.display(), source)
    };
    let chain = read_certificates(certificates)?;
    let pem = fs::read(key).map_err(|e| failed(key, e.into()))?;
    let private_key = PrivateKeyDer::from_pem_slice(&pem).map_err(|e| failed(key, e.into()))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|e| failed(certificates, e.into()))?;
    let builder = match client_authorities {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for authority in read_certificates(path)? {
                roots.add(authority).map_err(|e| failed(path, e.into()))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
            builder.with_client_cert_verifier(verifier.build().map_err(|e| failed(path, e.into()))?)
        }
    };
    let config = builder.with_single_cert(chain, private_key).map_err(|e| failed(certificates, e.into()))?;
    Ok(Arc::new(config))
}

fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let failed = |source: Box<dyn std::error::Error + Send + Sync>| {
        Error::because(ErrorKind::Tls, path.display(), source)
    };
    let pem = fs::read(path).map_err(|e| failed(e.into()))?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match certificates {
        Ok(certificates) if certificates.is_empty() => Err(failed("there is no certificate in it".into())),
        result => result.map_err(|e| failed(e.into())),
    }
}

/// One connection.
pub(super) struct Connection {
    connection: ServerConnection,
    received: Received,
}

impl Connection {
    pub(super) fn new(config: Arc<ServerConfig>) -> io::Result<Self> {
        let connection = ServerConnection::new(config).map_err(io::Error::other)?;
        Ok(Self { connection, received: Received::default() })
    }

    /// Gives `rustls` as much as it takes of what has been received; false if there is none.
    fn digest(&mut self) -> io::Result<bool> {
        let mut bytes = self.received.bytes();
        let before = bytes.len();
        if before == 0 {
            return Ok(false);
        }
        let taken = self.connection.read_tls(&mut bytes)?;
        let left = bytes.len();
        // It takes none once it has seen the end of the client's stream: what follows is nothing to it.
        self.received.consume(if taken == 0 { before } else { before - left });
        self.connection.process_new_packets().map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
        Ok(true)
    }
}

impl Engine for Connection {
    fn received(&mut self) -> &mut Received {
        &mut self.received
    }

    fn shake_hands(&mut self) -> io::Result<bool> {
        while self.connection.is_handshaking() {
            if !self.digest()? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn decrypt(&mut self, most: usize, sink: &mut dyn FnMut(&[u8])) -> io::Result<Option<usize>> {
        loop {
            let mut reader = self.connection.reader();
            match reader.fill_buf() {
                Ok(bytes) => {
                    let count = bytes.len().min(most);
                    sink(&bytes[..count]);
                    reader.consume(count);
                    return Ok(Some(count));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            if !self.digest()? {
                return Ok(None);
            }
        }
    }

    fn encrypt(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.connection.writer().write(bytes)
    }

    fn close(&mut self) {
        self.connection.send_close_notify();
    }

    fn outgoing(&mut self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        while self.connection.wants_write() {
            self.connection.write_tls(&mut bytes)?;
        }
        Ok(bytes)
    }
}
