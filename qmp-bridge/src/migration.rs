//! Migration, as far as checkpoints use it: a stream of the machine's memory and devices into a socket of ours.
//!
//! ```text
//! let before = Settings::read(&client).await?;
//! let saved = plan.changes(&before, running)?;     // keep this where a later process finds it
//! plan.apply(&client, &before).await?;
//! migration::start(&client, "/run/…/stream").await?;
//! … events, or migration::progress(&client) …
//! migration::wind_down(&client, &saved).await?;    // whatever has happened since
//! ```

mod plan;
mod run;
mod settings;

pub use plan::{
    BACKGROUND_SNAPSHOT, EVENTS, Mode, PAUSE_BEFORE_SWITCHOVER, Plan, REFUSED_BY_BACKGROUND_SNAPSHOT,
};
pub use run::{Progress, RamProgress, cancel, proceed, progress, settled, start, wind_down};
pub use settings::{Saved, Settings};
