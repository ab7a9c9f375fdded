//! A URL that is posted to, over plain HTTP: there is nobody whom this program could ask for certificates.

use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use bytes::Bytes;
use http_body_util::Full;
use hyper::{Method, Request, Uri, header};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// Where to post.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Url {
    /// As in the header: with the port, if one was given.
    authority: String,
    host: String,
    port: u16,
    path: String,
}

impl FromStr for Url {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let uri: Uri = text.parse().with_context(|| format!("'{text}' is no URL"))?;
        ensure!(uri.scheme_str() == Some("http"), "'{text}': http only, as in http://127.0.0.1:8000/cut");
        let authority = uri.authority().with_context(|| format!("'{text}' names no host"))?;
        ensure!(!authority.as_str().contains('@'), "'{text}': passwords are not sent");
        // One that is no number, or too large a one, is none to `port_u16`, which must not mean 80.
        let port = authority.as_str().strip_prefix(authority.host()).unwrap_or_default();
        ensure!(
            matches!(port, "" | ":") || authority.port_u16().is_some(),
            "'{text}': there is no port '{port}'"
        );
        Ok(Self {
            authority: authority.to_string(),
            host: authority.host().trim_matches(['[', ']']).to_owned(),
            port: authority.port_u16().unwrap_or(80),
            path: uri.path_and_query().map_or_else(|| "/".to_owned(), ToString::to_string),
        })
    }
}

impl Url {
    /// Posts JSON; a status of 200 to 299 is success. What else is answered is not read.
    ///
    /// # Errors
    /// It cannot be reached, answers with another status, or not in time.
    pub(super) async fn post(&self, json: Vec<u8>, timeout: Duration) -> anyhow::Result<()> {
        let posted = tokio::time::timeout(timeout, self.exchange(json)).await;
        posted.unwrap_or_else(|_| Err(anyhow!("not within {timeout:?}"))).with_context(|| self.to_string())
    }

    async fn exchange(&self, json: Vec<u8>) -> anyhow::Result<()> {
        let stream = TcpStream::connect((self.host.as_str(), self.port)).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        // It ends with `sender`, also at the deadline.
        tokio::spawn(connection);
        let request = Request::builder()
            .method(Method::POST)
            .uri(&self.path)
            .header(header::HOST, &self.authority)
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(json)))?;
        let status = sender.send_request(request).await?.status();
        ensure!(status.is_success(), "it answers {status}");
        Ok(())
    }
}

impl std::fmt::Display for Url {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "http://{}{}", self.authority, self.path)
    }
}
