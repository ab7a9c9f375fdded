//! TLS over another transport, by `rustls`.

use std::cell::RefCell;
use std::fs;
use std::io::{self, BufRead, Write};
use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection};
use tokio_uring::BufResult;
use tokio_uring::buf::BoundedBufMut;

use super::Transport;
use crate::outgoing::Piece;
use crate::{Error, ErrorKind, TlsMode};

/// Bytes of a TLS record and more: what is received at a time.
const RECEIVED: usize = 64 << 10;
/// Plaintext that is encrypted before it is sent.
const ENCRYPTED: usize = 256 << 10;

/// What is needed to offer TLS.
pub(crate) struct TlsSettings {
    pub(crate) mode: TlsMode,
    pub(crate) config: Arc<ServerConfig>,
}

impl TlsSettings {
    pub(crate) fn load(tls: &crate::Tls) -> Result<Self, Error> {
        let failed = |path: &Path, source: Box<dyn std::error::Error + Send + Sync>| {
            Error::because(ErrorKind::Tls, path.display(), source)
        };
        let certificates = read_certificates(&tls.certificates)?;
        let pem = fs::read(&tls.key).map_err(|e| failed(&tls.key, e.into()))?;
        let key = PrivateKeyDer::from_pem_slice(&pem).map_err(|e| failed(&tls.key, e.into()))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|e| failed(&tls.certificates, e.into()))?;
        let builder = match &tls.client_authorities {
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
        let config =
            builder.with_single_cert(certificates, key).map_err(|e| failed(&tls.certificates, e.into()))?;
        Ok(Self { mode: tls.mode, config: Arc::new(config) })
    }
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

/// A transport inside of another one.
pub(crate) struct Tls<T> {
    inner: T,
    /// Never borrowed while something is waited for.
    connection: RefCell<ServerConnection>,
    received: RefCell<Received>,
}

/// What has been received and not been given to `rustls` yet, which takes only so much at a time.
#[derive(Default)]
struct Received {
    /// Lent away while something is received into it; nothing is left in it then.
    memory: Vec<u8>,
    start: usize,
}

impl<T: Transport> Tls<T> {
    /// Does the handshake.
    pub(crate) async fn accept(inner: T, config: Arc<ServerConfig>) -> io::Result<Self> {
        let connection = ServerConnection::new(config).map_err(io::Error::other)?;
        let tls = Self { inner, connection: RefCell::new(connection), received: RefCell::default() };
        loop {
            tls.flush().await?;
            if !tls.connection.borrow().is_handshaking() {
                return Ok(tls);
            }
            match tls.receive().await {
                Ok(true) => {}
                Ok(false) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Err(error) => {
                    // The alert that says why.
                    let _ = tls.flush().await;
                    return Err(error);
                }
            }
        }
    }

    /// Decrypts what has been received, or receives more; false at the end of the stream below.
    async fn receive(&self) -> io::Result<bool> {
        if self.decrypt()? {
            return Ok(true);
        }
        let mut memory = std::mem::take(&mut self.received.borrow_mut().memory);
        memory.clear();
        memory.reserve(RECEIVED);
        let (result, memory) = self.inner.read(memory).await;
        *self.received.borrow_mut() = Received { memory, start: 0 };
        Ok(result? > 0)
    }

    /// Gives `rustls` as much as it takes of what has been received; false if there is none.
    fn decrypt(&self) -> io::Result<bool> {
        let mut received = self.received.borrow_mut();
        let mut bytes = &received.memory[received.start..];
        if bytes.is_empty() {
            return Ok(false);
        }
        let before = bytes.len();
        let mut connection = self.connection.borrow_mut();
        let taken = connection.read_tls(&mut bytes)?;
        let left = bytes.len();
        received.start += before - left;
        connection.process_new_packets().map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
        if taken == 0 {
            // It has seen the end of the client's stream: what follows is nothing to it.
            received.start = received.memory.len();
        }
        Ok(true)
    }

    /// Moves decrypted bytes over, if there are any; 0 at a proper end of the client's stream.
    fn decrypted<B: BoundedBufMut>(&self, into: &mut B) -> Option<io::Result<usize>> {
        let mut connection = self.connection.borrow_mut();
        let mut reader = connection.reader();
        match reader.fill_buf() {
            Ok(bytes) => {
                let count = bytes.len().min(into.bytes_total());
                into.put_slice(&bytes[..count]);
                reader.consume(count);
                Some(Ok(count))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(error) => Some(Err(error)),
        }
    }

    /// Sends what has been encrypted.
    async fn flush(&self) -> io::Result<()> {
        let mut bytes = Vec::new();
        {
            let mut connection = self.connection.borrow_mut();
            while connection.wants_write() {
                connection.write_tls(&mut bytes)?;
            }
        }
        if bytes.is_empty() {
            return Ok(());
        }
        self.inner.send(vec![bytes.into()]).await.0
    }

    async fn send_all(&self, batch: &[Piece]) -> io::Result<()> {
        let mut encrypted = 0;
        for piece in batch {
            let mut rest = piece.bytes();
            while !rest.is_empty() {
                let count = self.connection.borrow_mut().writer().write(rest)?;
                rest = &rest[count..];
                encrypted += count;
                // It takes no more before some of it is sent.
                if count == 0 || encrypted >= ENCRYPTED {
                    self.flush().await?;
                    encrypted = 0;
                }
            }
        }
        self.flush().await
    }
}

impl<T: Transport> Transport for Tls<T> {
    async fn read<B: BoundedBufMut>(&self, mut into: B) -> BufResult<usize, B> {
        loop {
            if let Some(result) = self.decrypted(&mut into) {
                return (result, into);
            }
            match self.receive().await {
                Ok(true) => {}
                // Without the alert that ends a TLS stream properly; requests are whole or not, so nothing is lost.
                Ok(false) => return (Ok(0), into),
                Err(error) => return (Err(error), into),
            }
        }
    }

    async fn send(&self, batch: Vec<Piece>) -> (io::Result<()>, Vec<Piece>) {
        (self.send_all(&batch).await, batch)
    }

    async fn farewell(&self) {
        self.connection.borrow_mut().send_close_notify();
        // Whoever is gone needs no farewell.
        let _ = self.flush().await;
        self.inner.farewell().await;
    }
}
