//! Curves over the length of a history: rates as ratios to an empty store, the index, the time to open.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::Point;
use super::pair::Rounds;
use crate::report::Spread;

const WIDTH: u32 = 900;
/// Heights of the three panels, and of the last one's axis.
const RATIOS: u32 = 330;
const PANEL: u32 = 200;
const AXIS: u32 = 30;
const LEFT: u32 = 64;
const MARGIN: u32 = 24;
/// Above each panel: its caption; and above the first one its legend.
const CAPTION: u32 = 30;
const LEGEND: u32 = 26;
const FONT: &str = "sans-serif";
const GRID: RGBColor = RGBColor(225, 225, 225);
const BLUE: RGBColor = RGBColor(0, 68, 136);
const ORANGE: RGBColor = RGBColor(221, 119, 34);

/// A curve: where it is at each point, and how far the rounds go.
struct Curve {
    name: &'static str,
    colour: RGBColor,
    /// Marks are filled; empty ones tell a second curve of the same colour.
    filled: bool,
    points: Vec<(f64, Spread)>,
}

type Drawn<B> = Result<(), DrawingAreaErrorKind<<B as DrawingBackend>::ErrorType>>;

/// Draws points into an SVG file; nothing unless there are two.
///
/// # Errors
/// The file system's.
pub(super) fn draw(points: &[Point], path: &Path) -> Result<()> {
    if points.len() < 2 {
        return Ok(());
    }
    let axis = Axis::of(points.iter().map(|point| point.writes));
    let of = |figure: &dyn Fn(&Point) -> Option<Spread>| -> Vec<(f64, Spread)> {
        points.iter().filter_map(|point| Some((axis.at(point.writes), figure(point)?))).collect()
    };
    let ratios = |name, colour, filled, rounds: fn(&Point) -> &Rounds| Curve {
        name,
        colour,
        filled,
        points: of(&|point| Some(rounds(point).ratio())),
    };
    let rates = [
        ratios("reads", BLUE, true, |point| &point.figures.within.reads),
        ratios("writes", ORANGE, true, |point| &point.figures.within.writes),
        ratios("reads, past the map's budget", BLUE, false, |point| &point.figures.past_budget.reads),
        ratios("writes, past it", ORANGE, false, |point| &point.figures.past_budget.writes),
    ];
    let exactly = |figure: f64| Spread { median: figure, min: figure, max: figure };
    let one = |points| [Curve { name: "", colour: BLUE, filled: true, points }];
    let index = one(of(&|point| point.index_bytes_per_write().map(exactly)));
    let opening = one(of(&|point| Some(point.figures.first_read_ms()[0])));

    let mut drawing = String::new();
    let area = SVGBackend::with_string(&mut drawing, (WIDTH, RATIOS + 2 * PANEL + AXIS)).into_drawing_area();
    panels(&area, &axis, &rates, &index, &opening).map_err(|error| anyhow!("{error}"))?;
    drop(area);
    fs::write(path, drawing).with_context(|| path.display().to_string())
}

fn panels<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    axis: &Axis,
    rates: &[Curve],
    index: &[Curve],
    opening: &[Curve],
) -> Drawn<B> {
    area.fill(&WHITE)?;
    let (first, rest) = area.split_vertically(RATIOS);
    let (second, third) = rest.split_vertically(PANEL);
    legend(&first, rates)?;
    let least = rates.iter().flat_map(|curve| &curve.points).map(|(_, s)| s.min).fold(0.8, f64::min);
    let most = rates.iter().flat_map(|curve| &curve.points).map(|(_, s)| s.max).fold(1.2, f64::max);
    let around = (least * 10.0).floor() / 10.0..(most * 10.0).ceil() / 10.0;
    panel(&first, axis, "4 KiB random, 32 in flight: rate, times that of an empty store", around, rates)?;
    let above = |curves: &[Curve]| {
        0.0..curves.iter().flat_map(|curve| &curve.points).map(|(_, s)| s.max).fold(1.0, f64::max) * 1.1
    };
    panel(&second, axis, "Time index: bytes for each write", above(index), index)?;
    panel(&third, axis, "From starting a killed daemon to its first read, ms", above(opening), opening)?;
    area.present()
}

fn panel<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    axis: &Axis,
    caption: &str,
    range: std::ops::Range<f64>,
    curves: &[Curve],
) -> Drawn<B> {
    area.draw(&Text::new(caption.to_owned(), (MARGIN as i32, 8), (FONT, 15)))?;
    let legend = if curves.len() > 1 { LEGEND } else { 0 };
    let bottom = area.dim_in_pixel().1 > PANEL && curves.len() == 1;
    let mut chart = ChartBuilder::on(area)
        .margin_top(CAPTION + legend)
        .margin_right(MARGIN)
        .x_label_area_size(if bottom { AXIS } else { 4 })
        .y_label_area_size(LEFT)
        .build_cartesian_2d(axis.range(), range.clone())?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .x_labels(0)
        .y_labels(6)
        .y_label_style((FONT, 13))
        .y_label_formatter(&|y| format!("{:.*}", usize::from(range.end < 5.0), y))
        .draw()?;
    if range.contains(&1.0) && curves.len() > 1 {
        let line = vec![(axis.range().start, 1.0), (axis.range().end, 1.0)];
        chart.draw_series([PathElement::new(line, BLACK.stroke_width(1))])?;
    }
    for (nth, curve) in curves.iter().enumerate() {
        // Marks of several curves at one point stand beside each other.
        let aside = (nth as f64 - (curves.len() as f64 - 1.0) / 2.0) * 0.03;
        let at = |(x, y): &(f64, Spread)| (x + aside, y.median);
        let line: Vec<(f64, f64)> = curve.points.iter().map(at).collect();
        chart.draw_series([PathElement::new(line, curve.colour.mix(0.5).stroke_width(1))])?;
        for (x, spread) in &curve.points {
            let bar = vec![(x + aside, spread.min), (x + aside, spread.max)];
            chart.draw_series([PathElement::new(bar, curve.colour.stroke_width(2))])?;
            let place = (x + aside, spread.median);
            chart.draw_series([Circle::new(
                place,
                4,
                if curve.filled { curve.colour } else { WHITE }.filled(),
            )])?;
            chart.draw_series([Circle::new(place, 4, curve.colour.stroke_width(2))])?;
        }
    }
    if bottom {
        let style = (FONT, 13).into_text_style(area).pos(Pos::new(HPos::Center, VPos::Top));
        for &writes in &axis.writes {
            let (x, y) = chart.backend_coord(&(axis.at(writes), range.start));
            let (left, top) = area.get_base_pixel();
            area.draw(&Text::new(label(writes), (x - left, y - top + 8), style.clone()))?;
        }
    }
    Ok(())
}

fn legend<B: DrawingBackend>(area: &DrawingArea<B, Shift>, curves: &[Curve]) -> Drawn<B> {
    let mut x = LEFT as i32;
    for curve in curves {
        let fill = if curve.filled { curve.colour } else { WHITE };
        area.draw(&Circle::new((x + 5, 41), 4, fill.filled()))?;
        area.draw(&Circle::new((x + 5, 41), 4, curve.colour.stroke_width(2)))?;
        area.draw(&Text::new(curve.name, (x + 16, 34), (FONT, 13)))?;
        x += 44 + 7 * curve.name.len() as i32;
    }
    Ok(())
}

/// Lengths of histories on a logarithmic axis, on which none at all stands a decade before the shortest.
struct Axis {
    writes: Vec<u64>,
    least: f64,
}

impl Axis {
    fn of(writes: impl Iterator<Item = u64>) -> Self {
        let writes: Vec<u64> = writes.collect();
        let shortest = writes.iter().copied().filter(|&writes| writes > 0).min().unwrap_or(1);
        Self { writes, least: (shortest as f64).log10() - 1.0 }
    }

    fn at(&self, writes: u64) -> f64 {
        if writes == 0 { self.least } else { (writes as f64).log10() }
    }

    fn range(&self) -> std::ops::Range<f64> {
        let most = self.writes.iter().map(|&writes| self.at(writes)).fold(self.least, f64::max);
        self.least - 0.3..most + 0.3
    }
}

/// A length for people.
fn label(writes: u64) -> String {
    match writes {
        0 => "no history".to_owned(),
        _ if writes.is_multiple_of(1_000_000) => format!("{} million writes", writes / 1_000_000),
        _ if writes.is_multiple_of(1000) => format!("{} thousand writes", writes / 1000),
        _ => format!("{writes} writes"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::growth::Figures;
    use crate::growth::pair::{Cold, Phase, Rates, Touch};
    use crate::growth::segments::LogUse;
    use crate::growth::subject::Opening;

    fn point(writes: u64, slower: f64) -> Point {
        let phases = |rates: [f64; 2]| {
            rates.map(|iops| Phase { iops, p50_us: 1.0, p99_us: 2.0, settled: true }).to_vec()
        };
        let rates = |slower: f64| {
            let rounds = || Rounds { aged: phases([90.0, 100.0 * slower]), young: phases([100.0, 95.0]) };
            Rates { reads: rounds(), writes: rounds() }
        };
        let opening =
            |first_read_ms| Opening { in_flight: 1, first_read_ms, rss_bytes: 1, rss_anon_max_bytes: 1 };
        let touch = Touch { p50_us: 1.0, p99_us: 2.0 };
        let cold = Cold { blocks: 1, settled: true, opened: touch, first: touch, again: touch };
        let figures = Figures {
            openings: [vec![opening(100.0 / slower), opening(130.0)], vec![opening(80.0)]],
            within: rates(slower),
            log: LogUse { payload_bytes: 100, log_bytes: 106 },
            index_growth_bytes: 2,
            rss_anon_max_bytes: 1,
            past_budget: rates(slower * 0.8),
            cold: [vec![cold], vec![cold]],
        };
        Point { writes, index_bytes: writes * 70, rss_anon_max_writing_bytes: 1, figures }
    }

    #[test]
    fn every_length_and_curve_is_drawn() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("curve.svg");
        draw(&[point(0, 1.0)], &path).unwrap();
        assert!(!path.exists());
        draw(&[point(0, 1.0), point(1_000_000, 0.97), point(100_000_000, 0.93)], &path).unwrap();
        let drawn = fs::read_to_string(&path).unwrap();
        for text in ["no history", "1 million writes", "100 million writes", "writes, past it", "Time index"]
        {
            assert!(drawn.contains(text), "{text}");
        }
        // Two circles a mark: legend, four curves of three points, the index without the first, three openings.
        assert_eq!(drawn.matches("<circle").count(), 2 * (4 + 12 + 2 + 3));
    }
}
