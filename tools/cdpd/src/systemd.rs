//! What systemd is told, if it has started the daemon.

pub use sd_notify::NotifyState;

/// Tells systemd, if it asked (sd_notify(3)). That it cannot be told is no reason to fail.
pub fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "cannot notify systemd");
    }
}
