//! A drawing of the ratios: a row for each workload, a mark for each server that ours is compared with.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use serde::Deserialize;
use serde_json::Value;

use crate::growth;
use crate::report::Spread;

const WIDTH: u32 = 900;
const ROW: u32 = 34;
/// Above the rows: the caption and the legend. Below them: the axis.
const HEAD: u32 = 62;
const FOOT: u32 = 48;
/// Left of the rows, for the workloads' names.
const NAMES: u32 = 220;
const MARGIN: u32 = 24;
const FONT: &str = "sans-serif";
/// One for each server, in their order; they differ in lightness, too.
const COLOURS: [RGBColor; 3] = [RGBColor(0, 68, 136), RGBColor(221, 119, 34), RGBColor(120, 120, 120)];

/// Which reports to draw, and where.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Reports of `compare` (--json), whose workloads are drawn in this order, or one of `growth`
    #[arg(value_name = "REPORT", required = true)]
    reports: Vec<PathBuf>,
    /// The file to draw into
    #[arg(long, value_name = "FILE")]
    svg: PathBuf,
}

/// The part of a report that is drawn.
#[derive(Deserialize)]
struct Drawn {
    workloads: Vec<Row>,
}

#[derive(Deserialize)]
struct Row {
    workload: Named,
    targets: Vec<Named>,
    ratios: Vec<Ratio>,
}

#[derive(Deserialize)]
struct Named {
    name: String,
    /// Everybody has the same rate then: there is nothing to draw.
    #[serde(default)]
    paced: bool,
}

#[derive(Deserialize)]
struct Ratio {
    to: String,
    #[serde(flatten)]
    spread: Spread,
}

/// Draws several reports as one.
///
/// # Errors
/// A file is no report, or cannot be read or written.
pub(crate) fn run(args: &Args) -> Result<()> {
    let read = |path: &PathBuf| -> Result<Value> { Ok(serde_json::from_reader(File::open(path)?)?) };
    let reports = args.reports.iter().map(|path| read(path).with_context(|| path.display().to_string()));
    let mut reports: Vec<Value> = reports.collect::<Result<_>>()?;
    match reports.first_mut().and_then(|report| report.get_mut("points")) {
        Some(points) => growth::draw(points.take(), &args.svg),
        None => ratios(reports, &args.svg),
    }
}

/// Draws the ratios of reports into an SVG file; nothing if only one server was measured.
///
/// # Errors
/// What is given are no reports; the file system's.
pub(crate) fn ratios(reports: Vec<Value>, path: &Path) -> Result<()> {
    let mut rows = Vec::new();
    for report in reports {
        rows.extend(serde_json::from_value::<Drawn>(report).context("not a report of compare")?.workloads);
    }
    rows.retain(|row| !row.ratios.is_empty() && !row.workload.paced);
    if rows.is_empty() {
        return Ok(());
    }
    ensure!(rows.iter().all(|row| !row.targets.is_empty()), "a workload without servers");
    let mut drawing = String::new();
    let height = HEAD + FOOT + ROW * rows.len() as u32;
    let area = SVGBackend::with_string(&mut drawing, (WIDTH, height)).into_drawing_area();
    draw(&area, &rows).map_err(|error| anyhow!("{error}"))?;
    drop(area);
    fs::write(path, drawing).with_context(|| path.display().to_string())
}

/// The servers that ours is compared with, in the order in which they first occur.
fn servers(rows: &[Row]) -> Vec<&str> {
    let mut servers: Vec<&str> = Vec::new();
    for ratio in rows.iter().flat_map(|row| &row.ratios) {
        if !servers.contains(&ratio.to.as_str()) {
            servers.push(&ratio.to);
        }
    }
    servers
}

fn draw<B: DrawingBackend>(
    area: &DrawingArea<B, plotters::coord::Shift>,
    rows: &[Row],
) -> Result<(), DrawingAreaErrorKind<B::ErrorType>> {
    area.fill(&WHITE)?;
    let caption = format!("{}: operations per second, times those of", rows[0].targets[0].name);
    area.draw(&Text::new(caption, (MARGIN as i32, 12), (FONT, 16)))?;
    let servers = servers(rows);
    legend(area, &servers)?;
    let (least, most) = bounds(rows);
    let count = rows.len() as f64;
    let mut chart = ChartBuilder::on(area)
        .margin_top(HEAD)
        .margin_right(MARGIN)
        .margin_bottom(FOOT - 24)
        .x_label_area_size(24)
        .margin_left(NAMES)
        .build_cartesian_2d((least..most).log_scale().base(2.0), count..0.0)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(RGBColor(225, 225, 225))
        .x_label_style((FONT, 13))
        .x_label_formatter(&|ratio| format!("{ratio}"))
        .y_labels(0)
        .draw()?;
    chart.draw_series([PathElement::new(vec![(1.0, 0.0), (1.0, count)], BLACK.stroke_width(2))])?;
    let right = Pos::new(HPos::Right, VPos::Center);
    for (index, row) in rows.iter().enumerate() {
        let (_, y) = chart.backend_coord(&(1.0, index as f64 + 0.5));
        let style = (FONT, 14).into_text_style(area).pos(right);
        area.draw(&Text::new(row.workload.name.clone(), (NAMES as i32 - 10, y), style))?;
        for Ratio { to, spread } in &row.ratios {
            let nth = servers.iter().position(|server| server == to).unwrap_or_default();
            let y = index as f64 + (nth as f64 + 1.0) / (servers.len() as f64 + 1.0);
            let colour = COLOURS[nth % COLOURS.len()];
            let span = vec![(spread.min, y), (spread.max, y)];
            chart.draw_series([PathElement::new(span, colour.stroke_width(2))])?;
            chart.draw_series([Circle::new((spread.median, y), 4, colour.filled())])?;
        }
    }
    area.present()
}

fn legend<B: DrawingBackend>(
    area: &DrawingArea<B, plotters::coord::Shift>,
    names: &[&str],
) -> Result<(), DrawingAreaErrorKind<B::ErrorType>> {
    let mut x = MARGIN as i32;
    for (name, colour) in names.iter().zip(COLOURS) {
        area.draw(&Circle::new((x + 5, 44), 5, colour.filled()))?;
        area.draw(&Text::new((*name).to_owned(), (x + 16, 37), (FONT, 14)))?;
        x += 50 + 8 * name.len() as i32;
    }
    Ok(())
}

/// Powers of two around everything that is drawn, and 1.
fn bounds(rows: &[Row]) -> (f64, f64) {
    let all = || rows.iter().flat_map(|row| &row.ratios);
    let least = all().map(|ratio| ratio.spread.min).fold(0.5, f64::min);
    let most = all().map(|ratio| ratio.spread.max).fold(2.0, f64::max);
    (least.log2().floor().exp2(), most.log2().ceil().exp2())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::*;

    #[test]
    fn every_workload_and_server_of_every_report_is_drawn() {
        let report = |workload: &str, least: f64| {
            let ratio = |to: &str| json!({"to": to, "median": 1.5, "min": least, "max": 9.0});
            let targets = json!([{"name": "ours"}, {"name": "theirs"}, {"name": "the limit"}]);
            let ratios = json!([ratio("theirs"), ratio("the limit")]);
            json!({"workloads": [{"workload": {"name": workload}, "targets": targets, "ratios": ratios}]})
        };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ratios.svg");
        ratios(vec![report("read", 0.9), report("write", 0.3)], &path).unwrap();
        let drawn = fs::read_to_string(&path).unwrap();
        for text in ["ours", "theirs", "the limit", "read", "write", "0.25", "16"] {
            assert!(drawn.contains(text), "{text}: {drawn}");
        }
        assert_eq!(drawn.matches("<circle").count(), 2 + 4);
        assert!(ratios(vec![json!({})], &path).is_err());
    }
}
