//! What is done with real QEMUs to record them, with the recordings to test this crate, and with the QEMU that is
//! installed here to test both.

use std::path::Path;
use std::time::Duration;

use qmp_bridge::machine::{self, Machine};
use qmp_bridge::migration::{self, Mode, Plan, Progress, Saved, Settings};
use qmp_bridge::{Backlog, Client, EventKind, MigrationStatus, Notice, Result, control};

/// What a checkpoint's QEMU did.
#[derive(Debug)]
pub struct Taken {
    pub before: Settings,
    pub during: Settings,
    pub after: Settings,
    pub saved: Saved,
    pub progress: Progress,
    /// All events, from before the first command to after the last one.
    pub events: Vec<EventKind>,
}

/// Asks all there is to ask.
pub async fn describe(client: &Client) -> Result<Machine> {
    machine::describe(client).await
}

/// Sends the machine's state into `stream` in `mode`, and puts everything back, also after an error.
pub async fn checkpoint(client: &Client, mode: Mode, stream: &Path) -> Result<Taken> {
    let mut events = client.subscribe(Backlog::default());
    let plan = Plan::new(mode, Duration::from_millis(20));
    let before = Settings::read(client).await?;
    let saved = plan.changes(client, &before, control::run_state(client).await?.running)?;
    let saving = async {
        plan.apply(client, &before).await?;
        let during = Settings::read(client).await?;
        if mode == Mode::Pause {
            control::stop(client).await?;
        }
        migration::start(client, stream).await?;
        let mut seen = Vec::new();
        loop {
            let status = match events.next().await {
                Some(Notice::Event(event)) => {
                    seen.push(event.kind.clone());
                    event.kind
                }
                Some(Notice::Disconnected { reason }) => return Err(reason),
                other => panic!("{other:?} instead of an event"),
            };
            match status {
                EventKind::Migration { status: MigrationStatus::PreSwitchover } => {
                    migration::proceed(client).await?;
                }
                EventKind::Migration { status } if status.has_ended() => return Ok((during, seen)),
                _ => {}
            }
        }
    };
    // A QEMU that says nothing more says no events either.
    let saved_state = tokio::time::timeout(Duration::from_secs(30), saving).await;
    let progress = migration::wind_down(client, &saved).await;
    let (during, mut seen) = match saved_state {
        Ok(done) => done?,
        Err(_) => panic!("no end of the migration, and {progress:?}"),
    };
    let progress = progress?;
    let after = Settings::read(client).await?;
    while let Some(notice) = events.try_next() {
        if let Notice::Event(event) = notice {
            seen.push(event.kind);
        }
    }
    Ok(Taken { before, during, after, saved, progress, events: seen })
}

impl Taken {
    /// What holds of every checkpoint that was taken: it was complete, the mode's settings and no others were in
    /// effect, all are as before, the machine runs, and its cut is where it should be among the events.
    pub fn verify(&self, mode: Mode) {
        assert_eq!(self.progress.status, MigrationStatus::Completed, "{:?}", self.progress);
        let plan = Plan::new(mode, Duration::from_millis(20));
        for (name, on) in &self.during.capabilities {
            assert_eq!(*on, plan.capabilities_on().contains(&name.as_str()), "{name} in mode {mode}");
        }
        for (name, value) in
            plan.parameters().iter().filter(|(name, _)| self.before.parameters.contains_key(*name))
        {
            assert_eq!(&self.during.parameters[name], value, "{name}");
        }
        assert_ne!(self.before, self.during);
        assert_eq!(self.before, self.after);
        assert!(self.saved.running);
        let expected = match mode {
            Mode::Hot => "setup active STOP RESUME completed",
            Mode::Live => "setup active STOP pre-switchover device completed RESUME",
            Mode::Pause => "STOP setup active completed RESUME",
        };
        // Of 7.2 to 10.0, the later ones tell of `device` in mode `pause`, too.
        assert_eq!(in_short(&self.events).replace("active device", "active"), expected);
    }
}

/// The events by which a cut is known, in short: `active STOP RESUME completed`.
fn in_short(events: &[EventKind]) -> String {
    let names = events.iter().filter_map(|event| match event {
        EventKind::Migration { status } => Some(status.to_string()),
        EventKind::Stop | EventKind::Resume => Some(event.name().to_owned()),
        _ => None,
    });
    names.collect::<Vec<_>>().join(" ")
}
