//! Metrics in the Prometheus text format, version 0.0.4.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;

use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use cdp_store::{VolumeInfo, VolumeState};
use cdp_types::VolumeId;
use vhost_blk::{QueueStats, ServerStats};

use super::{App, blocking};
use crate::api::ApiError;

/// One family of metrics under construction. Label values are names, numbers and words of our own: none needs
/// escapes.
struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str, samples: &[(String, f64)]) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (labels, value) in samples {
            let _ = writeln!(self.0, "{name}{labels} {value}");
        }
    }

    fn gauge(&mut self, name: &str, help: &str, value: u64) {
        self.family(name, "gauge", help, &[(String::new(), value as f64)]);
    }
}

/// `GET /v1/metrics`
pub(super) async fn metrics(State(app): State<Arc<App>>) -> Result<impl IntoResponse, ApiError> {
    let text = blocking(&app, |app| {
        let volumes = app.store.volumes();
        let servers = app.servers.stats();
        let mut text = Text(String::new());
        of_store(&mut text, app)?;
        of_volumes(&mut text, &volumes);
        of_servers(&mut text, &volumes, &servers);
        Ok(text.0)
    })
    .await?;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text))
}

fn of_store(text: &mut Text, app: &App) -> Result<(), ApiError> {
    let info = app.store.info()?;
    let labels = format!("{{version=\"{}\",store=\"{}\"}}", app.daemon.version, info.id);
    text.family("cdpd_info", "gauge", "The daemon and its store.", &[(labels, 1.0)]);
    text.gauge("cdpd_store_generation", "Openings of the store.", info.generation.0);
    text.gauge("cdpd_store_log_bytes", "Bytes of the logs.", info.log_bytes);
    text.gauge("cdpd_store_index_bytes", "Bytes of the time index.", info.index_bytes);
    text.gauge("cdpd_store_free_bytes", "Bytes that the file system has left.", info.free_bytes);
    text.gauge("cdpd_store_segments_used", "Segments that hold log.", info.segments);
    text.gauge("cdpd_store_segments_pool", "Segments zero-filled ahead.", info.pool_segments);
    Ok(())
}

fn of_volumes(text: &mut Text, volumes: &[VolumeInfo]) {
    let mut each = |name: &str, kind: &str, help: &str, value: fn(&VolumeInfo) -> f64| {
        let samples: Vec<_> =
            volumes.iter().map(|v| (format!("{{volume=\"{}\"}}", v.name), value(v))).collect();
        text.family(name, kind, help, &samples);
    };
    each("cdpd_volume_size_bytes", "gauge", "The volume's size.", |v| v.size_bytes as f64);
    each("cdpd_volume_head_ordinal", "counter", "Batches in the volume's log.", |v| v.head.ordinal.0 as f64);
    each("cdpd_volume_durable_ordinal", "counter", "Batches that a power cut spares.", |v| {
        v.head.durable_ordinal.0 as f64
    });
    each("cdpd_volume_reads_total", "counter", "Read requests.", |v| v.stats.reads as f64);
    each("cdpd_volume_read_bytes_total", "counter", "Bytes read.", |v| v.stats.read_bytes as f64);
    each("cdpd_volume_writes_total", "counter", "Write requests.", |v| v.stats.writes as f64);
    each("cdpd_volume_written_bytes_total", "counter", "Bytes written.", |v| v.stats.written_bytes as f64);
    each("cdpd_volume_clears_total", "counter", "Discards and write-zeroes.", |v| v.stats.clears as f64);
    each("cdpd_volume_flushes_total", "counter", "Flush requests.", |v| v.stats.flushes as f64);
    each("cdpd_volume_syncs_total", "counter", "Rounds of fdatasync.", |v| v.stats.syncs as f64);
    each("cdpd_volume_batches_total", "counter", "Batches appended.", |v| v.stats.batches as f64);
    each("cdpd_volume_errors_total", "counter", "Requests that failed.", |v| v.stats.errors as f64);
    each("cdpd_volume_leaf_loads_total", "counter", "Map leaves loaded from the index.", |v| {
        v.stats.leaf_loads as f64
    });
    each("cdpd_volume_cached_leaves", "gauge", "Map leaves in memory.", |v| v.stats.cached_leaves as f64);
    each("cdpd_volume_pending_changes", "gauge", "Changes that are not in the time index yet.", |v| {
        v.stats.pending_changes as f64
    });
    each("cdpd_volume_head_seconds", "gauge", "When the newest change was, since 1970.", |v| {
        v.head.time_ns as f64 / 1e9
    });
    each("cdpd_volume_healthy", "gauge", "1 if the volume takes writes, else 0.", |v| {
        f64::from(u8::from(matches!(v.state, VolumeState::Healthy)))
    });
}

fn of_servers(text: &mut Text, volumes: &[VolumeInfo], servers: &BTreeMap<VolumeId, ServerStats>) {
    let served: Vec<_> = volumes.iter().filter_map(|v| Some((v, servers.get(&v.id)?))).collect();
    let mut each = |name: &str, kind: &str, help: &str, value: fn(&ServerStats) -> u64| {
        let sample = |(v, stats): &(&VolumeInfo, &ServerStats)| {
            (format!("{{volume=\"{}\"}}", v.name), value(stats) as f64)
        };
        text.family(name, kind, help, &served.iter().map(sample).collect::<Vec<_>>());
    };
    each("cdpd_vhost_connected", "gauge", "1 if a guest is connected, else 0.", |s| u64::from(s.connected));
    each("cdpd_vhost_connections_total", "counter", "Connections accepted.", |s| s.connections);
    each("cdpd_vhost_refused_total", "counter", "Clients turned away.", |s| s.refused);

    type Field = (&'static str, fn(&QueueStats) -> u64);
    let mut by = |name: &str, kind: &str, help: &str, label: &str, fields: &[Field]| {
        let mut samples = Vec::new();
        for (volume, stats) in &served {
            for (word, value) in fields {
                let labels = if label.is_empty() {
                    format!("{{volume=\"{}\"}}", volume.name)
                } else {
                    format!("{{volume=\"{}\",{label}=\"{word}\"}}", volume.name)
                };
                samples.push((labels, stats.queues.iter().map(value).sum::<u64>() as f64));
            }
        }
        text.family(name, kind, help, &samples);
    };
    by(
        "cdpd_vhost_requests_total",
        "counter",
        "Requests answered.",
        "op",
        &[
            ("read", |q| q.reads),
            ("write", |q| q.writes),
            ("flush", |q| q.flushes),
            ("discard", |q| q.discards),
            ("write_zeroes", |q| q.write_zeroes),
            ("other", |q| q.others),
        ],
    );
    by(
        "cdpd_vhost_bytes_total",
        "counter",
        "Bytes carried.",
        "direction",
        &[("read", |q| q.bytes_read), ("write", |q| q.bytes_written)],
    );
    by("cdpd_vhost_errors_total", "counter", "Requests answered with an error.", "", &[("", |q| q.errors)]);
    by("cdpd_vhost_in_flight", "gauge", "Requests taken and not yet answered.", "", &[("", |q| q.in_flight)]);
    by("cdpd_vhost_interrupts_total", "counter", "Interrupts sent to guests.", "", &[("", |q| q.interrupts)]);
    by("cdpd_vhost_sleeps_total", "counter", "Times that a queue's thread slept.", "", &[("", |q| q.sleeps)]);
    by(
        "cdpd_vhost_recovered_total",
        "counter",
        "Requests in flight at a reconnection.",
        "how",
        &[("completed", |q| q.recovered), ("repeated", |q| q.resubmitted)],
    );
}
