//! Why guest memory cannot be guarded, in words that say what cures it.

use std::fmt;

/// Why a window cannot be opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuardRefusal {
    /// No front end is connected, or it has not shared the guest's memory yet.
    NoGuest,
    /// A ring runs: what is in flight on it would be written without a touch. Open the window while all have stopped.
    RingsRunning,
    /// A window is open already.
    AlreadyOpen,
    /// A part of the memory is no regular file, so nobody can tell whose it is.
    NoFile,
    /// A process has the memory, but maps it privately: what we write there is not what the guest sees.
    Private {
        /// The process.
        pid: i32,
    },
    /// No process that we may look at maps the memory where the front end says that it is.
    NoOwner {
        /// Whom the socket names as its peer; 0 if it lives in another PID namespace.
        peer: i32,
    },
    /// The operating system does not let us touch the memory of the process whose it is.
    NoAccess {
        /// The process, or the socket's peer if the process could not even be looked at.
        pid: i32,
    },
    /// The process has ended.
    OwnerGone {
        /// The process.
        pid: i32,
    },
    /// The operating system gives no thread.
    NoThread(String),
}

impl GuardRefusal {
    /// What cures it.
    #[must_use]
    pub fn cure(&self) -> &'static str {
        match self {
            Self::NoGuest => "start it, with its memory shared (share=on)",
            Self::RingsRunning => "open the window when all rings have stopped",
            Self::AlreadyOpen => "take one checkpoint at a time",
            Self::NoFile => "use memory-backend-memfd or memory-backend-file, share=on",
            Self::Private { .. } => "add share=on to its memory backend",
            Self::NoOwner { .. } => "if QEMU runs in another PID namespace, run this server in the same one",
            Self::NoAccess { .. } => {
                "run this server as the same user and set /proc/sys/kernel/yama/ptrace_scope to 0, or give it \
                 CAP_SYS_PTRACE"
            }
            Self::OwnerGone { .. } => "start the guest again",
            Self::NoThread(_) => "raise the limit of threads",
        }
    }

    /// The process that it is about, if it names one.
    #[must_use]
    pub fn pid(&self) -> Option<i32> {
        match *self {
            Self::Private { pid } | Self::NoAccess { pid } | Self::OwnerGone { pid } => Some(pid),
            _ => None,
        }
    }

    /// What is in the way, without its cure.
    #[must_use]
    pub fn what(&self) -> String {
        match self {
            Self::NoGuest => "no guest is connected".to_owned(),
            Self::RingsRunning => "a ring runs".to_owned(),
            Self::AlreadyOpen => "the window is open already".to_owned(),
            Self::NoFile => "a part of guest memory is no regular file".to_owned(),
            Self::Private { pid } => format!("process {pid} maps guest memory privately"),
            Self::NoOwner { peer } => {
                format!("no process maps guest memory where the front end (peer {peer}) says")
            }
            Self::NoAccess { pid } => format!("no ptrace access to process {pid}"),
            Self::OwnerGone { pid } => format!("process {pid}, whose the guest's memory was, has ended"),
            Self::NoThread(why) => format!("the operating system gives no thread: {why}"),
        }
    }
}

impl fmt::Display for GuardRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what(), self.cure())
    }
}

impl std::error::Error for GuardRefusal {}

/// What has gone wrong while a window was open. The checkpoint must be given up: close the migration's connection, so
/// that QEMU lifts the protection from all memory, then close the window.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuardTrouble {
    /// Requests wait for touches, and none has ended for this many milliseconds.
    NoProgress {
        /// Since the last touch that ended.
        waited_ms: u64,
    },
    /// Memory came that is nobody's, or that we may not touch. Nothing is written to it until the window is closed.
    Owner(GuardRefusal),
    /// A page could not be touched although its process lives. Nothing is written to it until the window is closed.
    Touch {
        /// The process.
        pid: i32,
        /// What the operating system said.
        error: String,
    },
    /// The server is being stopped.
    Stopping,
}

impl fmt::Display for GuardTrouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoProgress { waited_ms } => {
                write!(f, "no page was saved for {waited_ms} ms while requests waited")
            }
            Self::Owner(refusal) => refusal.fmt(f),
            Self::Touch { pid, error } => write!(f, "a page of process {pid} cannot be touched: {error}"),
            Self::Stopping => f.write_str("the disk's server is being stopped"),
        }
    }
}
