//! The handshake: what a client and we agree on before its first request (NBD, "Handshake").

use std::io;
use std::sync::Arc;

use crate::control::Registered;
use crate::exports::{Export, ExportError, ExportErrorKind, Exports, StatusContext};
use crate::input::Input;
use crate::protocol::{
    ExportQuestion, Headers, INIT_MAGIC, MAX_STRING, OPTION_MAGIC, OptionHeader, OptionReplies,
    handshake_flag, info, option, parse_export, parse_meta, rep, transmission,
};
use crate::transport::Transport;
use crate::{Limits, TlsMode};

/// The longest data of an option that is looked at, in bytes; longer data is skipped.
const MAX_OPTION_DATA: u32 = 32 << 10;
/// The longest data of an option that is skipped; whoever sends more is sent away.
const MAX_OPTION_SKIPPED: u32 = 1 << 20;
/// How many options a client may try.
const MAX_OPTIONS: usize = 1024;
/// How many metadata contexts a client may select.
const MAX_CONTEXTS: usize = 16;

const _: () = assert!(MAX_OPTION_DATA as usize <= Input::CAPACITY);

/// What the handshake needs to know.
pub(crate) struct Terms<'a> {
    pub(crate) exports: &'a Arc<dyn Exports>,
    pub(crate) limits: &'a Limits,
    /// The connection's place among all, which what it has under way keeps.
    pub(crate) registered: &'a Arc<Registered>,
    /// Whether TLS can be had, or must be, on this connection.
    pub(crate) tls: Option<TlsMode>,
    /// Whether TLS is on.
    pub(crate) encrypted: bool,
    /// What the client has asked about last. It is not the handshake's, so that it can be dropped with care even if
    /// the handshake is cut short.
    pub(crate) opened: &'a mut Option<Opened>,
}

/// An export that the client has asked about. It is not opened again under the same name, so that all that is agreed
/// on is about the same instant.
pub(crate) struct Opened {
    /// As the client has it.
    name: String,
    pub(crate) export: Arc<dyn Export>,
    /// Those that are selected. Their ids are their places.
    pub(crate) contexts: Vec<Arc<dyn StatusContext>>,
}

/// How a handshake ended.
pub(crate) enum Outcome {
    /// With requests to come.
    Transmission(Agreement),
    /// With TLS to come, and another handshake inside of it.
    StartTls(Greeting),
    /// The client has gone, or was sent away; why, unless it went by itself.
    Left(Option<String>),
}

/// What client and server have agreed on, about the export that is open.
pub(crate) struct Agreement {
    pub(crate) headers: Headers,
    /// The size that the client was told, in bytes.
    pub(crate) size: u64,
    /// What was received behind the last option.
    pub(crate) input: Input,
}

/// What an option leads to.
enum Next {
    /// Another one.
    Option,
    /// Requests, to an export of this size.
    Transmission(u64),
    /// A TLS handshake.
    StartTls,
    /// The end.
    Leave(Option<&'static str>),
}

/// Greets the client and answers its options until it has made up its mind. `greeted` is whether it has been
/// before: TLS starts over with the options.
pub(crate) async fn negotiate<T: Transport>(
    transport: &T,
    terms: Terms<'_>,
    greeted: Greeting,
) -> io::Result<Outcome> {
    let mut haggling =
        Haggling { transport, terms, input: Input::new(), no_zeroes: false, headers: Headers::Simple };
    match greeted {
        Greeting::Due => {
            if let Some(outcome) = haggling.greet().await? {
                return Ok(outcome);
            }
        }
        Greeting::Done { no_zeroes } => haggling.no_zeroes = no_zeroes,
    }
    haggling.options().await
}

/// Whether the magic numbers and flags have been exchanged.
#[derive(Clone, Copy)]
pub(crate) enum Greeting {
    Due,
    Done { no_zeroes: bool },
}

struct Haggling<'a, T> {
    transport: &'a T,
    terms: Terms<'a>,
    input: Input,
    no_zeroes: bool,
    headers: Headers,
}

impl<T: Transport> Haggling<'_, T> {
    async fn send(&self, bytes: Vec<u8>) -> io::Result<()> {
        self.transport.send(vec![bytes.into()]).await.0
    }

    async fn greet(&mut self) -> io::Result<Option<Outcome>> {
        let known = handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES;
        let mut greeting = INIT_MAGIC.to_be_bytes().to_vec();
        greeting.extend(OPTION_MAGIC.to_be_bytes());
        greeting.extend(known.to_be_bytes());
        self.send(greeting).await?;
        if !self.input.want(self.transport, 4).await? {
            return Ok(Some(Outcome::Left(None)));
        }
        let flags = self.input.bytes().first_chunk().map_or(0, |raw| u32::from_be_bytes(*raw));
        self.input.consume(4);
        if flags & !u32::from(known) != 0 {
            return Ok(Some(Outcome::Left(Some(format!("unknown client flags {flags:#x}")))));
        }
        self.no_zeroes = flags & u32::from(handshake_flag::NO_ZEROES) != 0;
        Ok(None)
    }

    async fn options(mut self) -> io::Result<Outcome> {
        let left = |why: &str| Ok(Outcome::Left(Some(why.to_owned())));
        for _ in 0..MAX_OPTIONS {
            if !self.input.want(self.transport, OptionHeader::LEN).await? {
                return Ok(Outcome::Left(None));
            }
            let Some(header) = OptionHeader::parse(self.input.bytes()) else {
                return left("an option without its magic number");
            };
            self.input.consume(OptionHeader::LEN);
            let Some(data) = self.data(header).await? else {
                return left("an option that is too long, or cut short");
            };
            let next = match data {
                Ok(data) => self.answer(header.option, &data).await?,
                Err(()) => self.too_long(header.option).await?,
            };
            match next {
                Next::Option => {}
                Next::Leave(why) => return Ok(Outcome::Left(why.map(str::to_owned))),
                // Nothing that came before the encryption may count as if it had come under it.
                Next::StartTls if !self.input.bytes().is_empty() => {
                    return left("plain text behind NBD_OPT_STARTTLS");
                }
                Next::StartTls => {
                    return Ok(Outcome::StartTls(Greeting::Done { no_zeroes: self.no_zeroes }));
                }
                Next::Transmission(size) => {
                    let Self { headers, input, .. } = self;
                    return Ok(Outcome::Transmission(Agreement { headers, size, input }));
                }
            }
        }
        left("too many options")
    }

    /// An option's data; `Err` if it was too long and has been skipped; None if the client is to be left.
    async fn data(&mut self, header: OptionHeader) -> io::Result<Option<Result<Vec<u8>, ()>>> {
        if header.length > MAX_OPTION_DATA {
            let skipped = header.length <= MAX_OPTION_SKIPPED
                && self.input.skip(self.transport, u64::from(header.length)).await?;
            return Ok(skipped.then_some(Err(())));
        }
        let length = header.length as usize;
        if !self.input.want(self.transport, length).await? {
            return Ok(None);
        }
        let data = self.input.bytes()[..length].to_vec();
        self.input.consume(length);
        Ok(Some(Ok(data)))
    }

    async fn too_long(&mut self, option: u32) -> io::Result<Next> {
        if option == option::EXPORT_NAME {
            return Ok(Next::Leave(Some("an export name that is too long")));
        }
        if option == option::SET_META_CONTEXT {
            self.select(Vec::new());
        }
        self.refuse(option, rep::ERR_TOO_BIG, "the option's data is too long").await
    }

    async fn refuse(&self, option: u32, kind: u32, message: &str) -> io::Result<Next> {
        let mut replies = OptionReplies::to(option);
        replies.error(kind, message);
        self.send(replies.into_bytes()).await?;
        Ok(Next::Option)
    }

    async fn ack(&self, option: u32) -> io::Result<()> {
        let mut replies = OptionReplies::to(option);
        replies.ack();
        self.send(replies.into_bytes()).await
    }

    async fn answer(&mut self, option: u32, data: &[u8]) -> io::Result<Next> {
        let must_encrypt = self.terms.tls == Some(TlsMode::Required) && !self.terms.encrypted;
        if must_encrypt && !matches!(option, option::STARTTLS | option::ABORT) {
            return match option {
                option::EXPORT_NAME => Ok(Next::Leave(Some("no TLS, which is required"))),
                _ => self.refuse(option, rep::ERR_TLS_REQD, "TLS is required: start it first").await,
            };
        }
        let bare = matches!(
            option,
            option::LIST | option::STARTTLS | option::STRUCTURED_REPLY | option::EXTENDED_HEADERS
        );
        if bare && !data.is_empty() {
            return self.refuse(option, rep::ERR_INVALID, "this option has no data").await;
        }
        match option {
            option::EXPORT_NAME => self.export_name(data).await,
            option::ABORT => {
                // The client may be gone already, and then need not hear it.
                let _ = self.ack(option).await;
                Ok(Next::Leave(None))
            }
            option::LIST => self.list().await,
            option::STARTTLS => self.start_tls().await,
            option::INFO | option::GO => match parse_export(data) {
                Some(question) => self.info(option, &question).await,
                None => self.refuse(option, rep::ERR_INVALID, "the data is not as it should be").await,
            },
            option::STRUCTURED_REPLY if self.headers == Headers::Extended => {
                self.refuse(option, rep::ERR_EXT_HEADER_REQD, "extended headers are on already").await
            }
            option::STRUCTURED_REPLY => {
                self.headers = Headers::Structured;
                self.ack(option).await?;
                Ok(Next::Option)
            }
            option::EXTENDED_HEADERS if self.headers == Headers::Extended => {
                self.refuse(option, rep::ERR_INVALID, "extended headers are on already").await
            }
            option::EXTENDED_HEADERS => {
                self.headers = Headers::Extended;
                self.ack(option).await?;
                Ok(Next::Option)
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.meta_contexts(option, data).await,
            _ => self.refuse(option, rep::ERR_UNSUP, "this server does not know the option").await,
        }
    }

    async fn start_tls(&mut self) -> io::Result<Next> {
        let option = option::STARTTLS;
        if self.terms.encrypted {
            return self.refuse(option, rep::ERR_INVALID, "TLS is on already").await;
        }
        if self.terms.tls.is_none() {
            return self.refuse(option, rep::ERR_POLICY, "this server is not set up for TLS").await;
        }
        // Before the answer, with which honest clients start to send their part of the TLS handshake.
        if !self.input.bytes().is_empty() {
            return Ok(Next::StartTls);
        }
        self.ack(option).await?;
        Ok(Next::StartTls)
    }

    /// Opens an export, unless it is the one that is open.
    async fn open(&mut self, name: &str) -> Result<Arc<dyn Export>, ExportError> {
        if let Some(opened) = &self.terms.opened
            && opened.name == name
        {
            return Ok(Arc::clone(&opened.export));
        }
        self.terms.registered.control.set_export(None);
        let (exports, wanted, old) =
            (Arc::clone(self.terms.exports), name.to_owned(), self.terms.opened.take());
        let export = blocking(self.terms.registered, move || {
            drop(old);
            exports.open(&wanted)
        })
        .await?;
        self.terms.registered.control.set_export(Some(&*export));
        let opened = Opened { name: name.to_owned(), export: Arc::clone(&export), contexts: Vec::new() };
        *self.terms.opened = Some(opened);
        Ok(export)
    }

    fn select(&mut self, contexts: Vec<Arc<dyn StatusContext>>) {
        if let Some(opened) = self.terms.opened.as_mut() {
            opened.contexts = contexts;
        }
    }

    async fn list(&mut self) -> io::Result<Next> {
        let exports = Arc::clone(self.terms.exports);
        let mut replies = OptionReplies::to(option::LIST);
        match blocking(self.terms.registered, move || exports.list()).await {
            Ok(entries) => {
                for entry in entries.iter().filter(|entry| entry.name.len() <= MAX_STRING) {
                    replies.server(&entry.name, &entry.description);
                }
                replies.ack();
            }
            Err(error) => {
                replies.error(reply_kind(error.kind()), error.message());
            }
        }
        self.send(replies.into_bytes()).await?;
        Ok(Next::Option)
    }

    async fn info(&mut self, option: u32, question: &ExportQuestion<'_>) -> io::Result<Next> {
        let export = match self.open(question.name).await {
            Ok(export) => export,
            Err(error) => return self.refuse(option, reply_kind(error.kind()), error.message()).await,
        };
        let device = export.device().info();
        let mut replies = OptionReplies::to(option);
        replies.export(device.capacity, self.flags(&*export, device.read_only));
        let preferred =
            device.physical_block_size.max(device.logical_block_size).max(512).next_power_of_two();
        // One figure for reads and writes: what is told is what both can have.
        let writable = export.writable() && !device.read_only;
        let longest_write = if writable { device.max_write_bytes } else { u64::MAX };
        let longest = longest_write.min(self.terms.limits.max_request as u64);
        replies.block_size(device.logical_block_size, preferred, longest as u32);
        if question.infos.contains(&info::NAME) {
            replies.text(info::NAME, export.name());
        }
        if question.infos.contains(&info::DESCRIPTION) {
            replies.text(info::DESCRIPTION, export.description());
        }
        replies.ack();
        self.send(replies.into_bytes()).await?;
        Ok(match option {
            option::GO => Next::Transmission(device.capacity),
            _ => Next::Option,
        })
    }

    async fn export_name(&mut self, data: &[u8]) -> io::Result<Next> {
        if self.headers == Headers::Extended {
            return Ok(Next::Leave(Some("NBD_OPT_EXPORT_NAME with extended headers")));
        }
        let name = match std::str::from_utf8(data) {
            Ok(name) if name.len() <= MAX_STRING && !name.contains('\0') => name,
            _ => return Ok(Next::Leave(Some("an export name that is none"))),
        };
        let Ok(export) = self.open(name).await else {
            return Ok(Next::Leave(Some("an export that cannot be had")));
        };
        let device = export.device().info();
        let mut reply = device.capacity.to_be_bytes().to_vec();
        reply.extend(self.flags(&*export, device.read_only).to_be_bytes());
        if !self.no_zeroes {
            reply.extend([0; 124]);
        }
        self.send(reply).await?;
        Ok(Next::Transmission(device.capacity))
    }

    /// The transmission flags.
    fn flags(&self, export: &dyn Export, read_only: bool) -> u16 {
        let mut flags = transmission::HAS_FLAGS
            | transmission::SEND_FLUSH
            | transmission::SEND_FUA
            | transmission::SEND_CACHE;
        flags |= match export.writable() && !read_only {
            true => transmission::SEND_TRIM | transmission::SEND_WRITE_ZEROES | transmission::SEND_FAST_ZERO,
            false => transmission::READ_ONLY,
        };
        if export.multi_conn() {
            flags |= transmission::CAN_MULTI_CONN;
        }
        if self.headers != Headers::Simple {
            flags |= transmission::SEND_DF;
        }
        let selected = self.terms.opened.as_ref().is_some_and(|opened| !opened.contexts.is_empty());
        if self.headers == Headers::Extended && selected {
            flags |= transmission::BLOCK_STATUS_PAYLOAD;
        }
        flags
    }

    async fn meta_contexts(&mut self, option: u32, data: &[u8]) -> io::Result<Next> {
        let select = option == option::SET_META_CONTEXT;
        if select {
            self.select(Vec::new());
        }
        let Some(question) = parse_meta(data) else {
            return self.refuse(option, rep::ERR_INVALID, "the data is not as it should be").await;
        };
        if self.headers == Headers::Simple {
            return self.refuse(option, rep::ERR_INVALID, "structured replies come first").await;
        }
        if question.queries.iter().any(|query| !query.contains(':')) {
            return self.refuse(option, rep::ERR_INVALID, "a query without a namespace").await;
        }
        let export = match self.open(question.name).await {
            Ok(export) => export,
            Err(error) => return self.refuse(option, reply_kind(error.kind()), error.message()).await,
        };
        let queries: Vec<String> = question.queries.iter().map(|&query| query.to_owned()).collect();
        let registered = self.terms.registered;
        let found = match select {
            true => {
                let selected = blocking(registered, move || select_contexts(&*export, &queries)).await;
                selected.map(|contexts| {
                    let names: Vec<String> =
                        contexts.iter().map(|context| context.name().to_owned()).collect();
                    self.select(contexts);
                    names
                })
            }
            false => blocking(registered, move || list_contexts(&*export, &queries)).await,
        };
        let mut replies = OptionReplies::to(option);
        match found {
            Ok(names) => {
                for (id, name) in (0..).zip(&names) {
                    replies.meta_context(if select { id } else { 0 }, name);
                }
                replies.ack();
            }
            Err(error) => {
                replies.error(reply_kind(error.kind()), error.message());
            }
        }
        self.send(replies.into_bytes()).await?;
        Ok(Next::Option)
    }
}

/// A query that ends in a colon stands for all that begins with it; only in lists.
fn is_wildcard(query: &str) -> bool {
    query.ends_with(':')
}

fn too_many() -> ExportError {
    ExportError::new(ExportErrorKind::Invalid, format!("at most {MAX_CONTEXTS} contexts can be selected"))
}

fn select_contexts(
    export: &dyn Export,
    queries: &[String],
) -> Result<Vec<Arc<dyn StatusContext>>, ExportError> {
    let mut selected: Vec<Arc<dyn StatusContext>> = Vec::new();
    for query in queries.iter().filter(|query| !is_wildcard(query)) {
        let Some(context) = export.context(query)? else { continue };
        if selected.iter().any(|other| other.name() == context.name()) {
            continue;
        }
        if selected.len() == MAX_CONTEXTS {
            return Err(too_many());
        }
        selected.push(context);
    }
    Ok(selected)
}

fn list_contexts(export: &dyn Export, queries: &[String]) -> Result<Vec<String>, ExportError> {
    let all = export.contexts();
    if queries.is_empty() {
        return Ok(all);
    }
    if queries.len() > MAX_CONTEXTS {
        return Err(too_many());
    }
    let mut names: Vec<String> = Vec::new();
    for query in queries {
        let found = match is_wildcard(query) {
            true => all.iter().filter(|name| name.starts_with(query.as_str())).cloned().collect(),
            false => Vec::from_iter(export.context(query)?.map(|context| context.name().to_owned())),
        };
        for name in found {
            if !names.contains(&name) {
                names.push(name);
            }
        }
    }
    Ok(names)
}

fn reply_kind(kind: ExportErrorKind) -> u32 {
    match kind {
        ExportErrorKind::Unknown => rep::ERR_UNKNOWN,
        ExportErrorKind::Invalid => rep::ERR_INVALID,
        ExportErrorKind::Policy | ExportErrorKind::Busy => rep::ERR_POLICY,
        ExportErrorKind::Shutdown => rep::ERR_SHUTDOWN,
        ExportErrorKind::Failed => rep::ERR_PLATFORM,
    }
}

/// Runs what may block on a thread that may. The connection counts until that has come to its end, though its client may have
/// been sent away by then: else there could be any number of them under way.
async fn blocking<R: Send + 'static>(
    registered: &Arc<Registered>,
    work: impl FnOnce() -> Result<R, ExportError> + Send + 'static,
) -> Result<R, ExportError> {
    let registered = Arc::clone(registered);
    // In this order: what nobody waits for any more goes before the connection's place does.
    match tokio::task::spawn_blocking(move || (work(), registered)).await {
        Ok((result, _)) => result,
        Err(error) => {
            tracing::error!("an export's code has ended unexpectedly: {error}");
            Err(ExportError::new(ExportErrorKind::Failed, "an error inside of the server"))
        }
    }
}
