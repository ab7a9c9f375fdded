//! TLS over another transport: by `rustls` where the server has certificates, by OpenSSL where it shares keys with its
//! clients, which `rustls` does not offer. What both have in common is here.

mod certificates;
mod key_file;
mod pre_shared_keys;

use std::cell::RefCell;
use std::io;
use std::sync::Arc;

use rustls::ServerConfig;
use tokio_uring::BufResult;
use tokio_uring::buf::BoundedBufMut;

use self::pre_shared_keys::PreSharedKeys;
use super::Transport;
use crate::outgoing::Piece;
use crate::{Error, TlsCredentials, TlsMode};

/// Bytes of a TLS record and more: what is received at a time.
const RECEIVED: usize = 64 << 10;
/// Plaintext that is encrypted before it is sent.
const ENCRYPTED: usize = 256 << 10;

/// What is needed to offer TLS.
pub(crate) struct TlsSettings {
    pub(crate) mode: TlsMode,
    library: Library,
}

enum Library {
    Rustls(Arc<ServerConfig>),
    OpenSsl(PreSharedKeys),
}

impl TlsSettings {
    /// Reads the files, once and for all.
    pub(crate) fn load(tls: &crate::Tls) -> Result<Self, Error> {
        let library = match &tls.credentials {
            TlsCredentials::Certificates { certificates, key, client_authorities } => {
                Library::Rustls(certificates::load(certificates, key, client_authorities.as_deref())?)
            }
            TlsCredentials::PreSharedKeys { file } => Library::OpenSsl(PreSharedKeys::load(file)?),
        };
        Ok(Self { mode: tls.mode, library })
    }

    fn engine(&self) -> io::Result<Box<dyn Engine>> {
        Ok(match &self.library {
            Library::Rustls(config) => Box::new(certificates::Connection::new(Arc::clone(config))?),
            Library::OpenSsl(keys) => Box::new(keys.connect()?),
        })
    }
}

/// The server's side of one TLS connection, as a library has it: bytes in, bytes out, and nothing that waits.
///
/// An error ends the connection. An alert that tells the client may be among the outgoing bytes then.
trait Engine {
    /// Where the client's bytes go before [`Engine::shake_hands`] or [`Engine::decrypt`] look at them.
    fn received(&mut self) -> &mut Received;

    /// Goes on with the handshake; false if it needs more from the client.
    fn shake_hands(&mut self) -> io::Result<bool>;

    /// Gives up to `most` decrypted bytes to `sink`, in one call, and returns how many; 0 at a proper end of the
    /// client's stream, None if it needs more from the client.
    fn decrypt(&mut self, most: usize, sink: &mut dyn FnMut(&[u8])) -> io::Result<Option<usize>>;

    /// Encrypts some of `bytes` and returns how many; 0 if the outgoing bytes must be taken first.
    fn encrypt(&mut self, bytes: &[u8]) -> io::Result<usize>;

    /// Says that nothing follows: the alert `close_notify`.
    fn close(&mut self);

    /// Takes what is to be sent.
    fn outgoing(&mut self) -> io::Result<Vec<u8>>;
}

/// What has been received and not been used yet, since a library takes only so much at a time.
#[derive(Default)]
struct Received {
    /// Lent away while something is received into it; nothing is left in it then.
    memory: Vec<u8>,
    start: usize,
}

impl Received {
    fn bytes(&self) -> &[u8] {
        &self.memory[self.start..]
    }

    fn consume(&mut self, count: usize) {
        self.start += count;
    }

    fn lend(&mut self) -> Vec<u8> {
        let mut memory = std::mem::take(self).memory;
        memory.clear();
        memory.reserve(RECEIVED);
        memory
    }

    fn give_back(&mut self, memory: Vec<u8>) {
        *self = Self { memory, start: 0 };
    }
}

/// A transport inside of another one.
pub(crate) struct Tls<T> {
    inner: T,
    /// Never borrowed while something is waited for.
    engine: RefCell<Box<dyn Engine>>,
}

impl<T: Transport> Tls<T> {
    /// Does the handshake.
    pub(crate) async fn accept(inner: T, settings: &TlsSettings) -> io::Result<Self> {
        let tls = Self { inner, engine: RefCell::new(settings.engine()?) };
        loop {
            let done = tls.engine.borrow_mut().shake_hands();
            // In case of an error it is the alert that tells of it, and the error is the more interesting one.
            let sent = tls.flush().await;
            let done = done?;
            sent?;
            if done {
                return Ok(tls);
            }
            if !tls.receive().await? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// Receives more, once everything before has been used; false at the end of the stream below.
    async fn receive(&self) -> io::Result<bool> {
        let memory = self.engine.borrow_mut().received().lend();
        let (result, memory) = self.inner.read(memory).await;
        self.engine.borrow_mut().received().give_back(memory);
        Ok(result? > 0)
    }

    /// Sends what has been encrypted.
    async fn flush(&self) -> io::Result<()> {
        let bytes = self.engine.borrow_mut().outgoing()?;
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
                let most = rest.len().min(ENCRYPTED - encrypted);
                let count = self.engine.borrow_mut().encrypt(&rest[..most])?;
                rest = &rest[count..];
                encrypted += count;
                // It takes no more before some of it is sent.
                if count == 0 || encrypted == ENCRYPTED {
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
            let most = into.bytes_total();
            let decrypted = self.engine.borrow_mut().decrypt(most, &mut |bytes| into.put_slice(bytes));
            match decrypted {
                Ok(Some(count)) => return (Ok(count), into),
                Ok(None) => {}
                Err(error) => return (Err(error), into),
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
        self.engine.borrow_mut().close();
        // Whoever is gone needs no farewell.
        let _ = self.flush().await;
        self.inner.farewell().await;
    }
}
