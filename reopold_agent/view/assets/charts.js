"use strict";
/* Line charts as SVG: axes, bands for intervals, values on hover and by arrow keys. */

const CHART = { width: 420, height: 210, left: 46, right: 10, top: 10, bottom: 24 };

/* Okabe and Ito's colours, which people of every colour vision can distinguish (style.css has them, for
 * a light and a dark page). Each series also has its own dash, for prints and for the rest of us. */
const SERIES_COLOURS = Array.from({ length: 8 }, (_, i) => `var(--s${i})`);
const DASHES = ["", "6 3", "2 3", "8 3 2 3", "1 2", "10 4", "4 4", "3 1"];

/**
 * A chart as a figure.
 * series: [{ name, points: [{ x, y, low, high }], colour (number), dash (number), level }]; points
 * without a number as y are left out; a `level` series of one point is a line across. options: { title, note, marks: [{ x, text }] }.
 */
function lineChart(series, options) {
  const drawn = series
    .map(one => ({ ...one, points: one.points.filter(p => isNumber(p.x) && isNumber(p.y)).sort((a, b) => a.x - b.x) }))
    .filter(one => one.points.length);
  const figure = el("figure.chart", null, el("figcaption", null, options.title,
    options.note ? el("span.quiet", null, ` ${options.note}`) : null));
  if (!drawn.length) return add(figure, [el("p.quiet", null, "no values yet")]);
  const scale = scales(drawn);
  const root = svg("svg", {
    viewBox: `0 0 ${CHART.width} ${CHART.height}`, role: "img", tabindex: 0,
    "aria-label": `${options.title}: ${drawn.map(describe).join("; ")}`,
  });
  add(root, [axes(scale), (options.marks || []).map(mark => markLine(mark, scale)), drawn.map(one => drawSeries(one, scale))]);
  const cursor = svg("line.cursor", { y1: CHART.top, y2: CHART.height - CHART.bottom, visibility: "hidden" });
  const values = el("div.values", { hidden: true });
  root.append(cursor);
  followPointer(root, cursor, values, drawn, scale);
  return add(figure, [el("div.plot", null, root, values), drawn.length > 1 || options.legend ? legend(drawn) : null]);
}

function describe(one) {
  const last = one.points[one.points.length - 1];
  return `${one.name} ${show(one.points[0].y)} to ${show(last.y)} at step ${show(last.x)}`;
}

function scales(drawn) {
  const points = drawn.flatMap(one => one.points);
  const ys = points.flatMap(p => [p.y, ...(isNumber(p.low) ? [p.low, p.high] : [])]);
  const [x0, x1] = spread(points.map(p => p.x));
  const ticks = niceTicks(...spread(ys));
  const [y0, y1] = [Math.min(ticks[0], smallest(ys)), Math.max(ticks[ticks.length - 1], largest(ys))];
  const width = CHART.width - CHART.left - CHART.right;
  const height = CHART.height - CHART.top - CHART.bottom;
  return {
    ticks, xTicks: niceTicks(x0, x1).filter(v => v >= x0 && v <= x1),
    x: value => CHART.left + (value - x0) / (x1 - x0) * width,
    y: value => CHART.top + (y1 - value) / (y1 - y0) * height,
  };
}

/* Not Math.min(...values): a long run has more points than a call may have arguments. */
const smallest = values => values.reduce((a, b) => Math.min(a, b), Infinity);
const largest = values => values.reduce((a, b) => Math.max(a, b), -Infinity);

function spread(values) {
  const [low, high] = [smallest(values), largest(values)];
  if (high > low) return [low, high];
  const room = Math.abs(low) * 0.1 || 0.5;
  return [low - room, high + room];
}

function niceTicks(low, high) {
  const rough = (high - low) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find(m => m * power >= rough * 0.999);
  const ticks = [];
  const first = Math.floor(low / step + 1e-9);
  for (let i = first; i <= first + 12 && (i - 1) * step < high - 1e-9 * step; i += 1) ticks.push(i * step);
  return ticks.map(v => Number(v.toPrecision(12)));
}

function axes(scale) {
  const bottom = CHART.height - CHART.bottom;
  return svg("g.axes", null,
    scale.ticks.map(v => svg("line", { x1: CHART.left, x2: CHART.width - CHART.right, y1: scale.y(v), y2: scale.y(v) })),
    scale.ticks.map(v => svg("text", { x: CHART.left - 5, y: scale.y(v) + 4, "text-anchor": "end" }, show(v))),
    scale.xTicks.map(v => svg("text", { x: scale.x(v), y: bottom + 16, "text-anchor": "middle" }, show(v))));
}

function markLine(mark, scale) {
  const x = scale.x(mark.x);
  return svg("g.mark", null,
    svg("line", { x1: x, x2: x, y1: CHART.top, y2: CHART.height - CHART.bottom }),
    svg("text", { x: x + 4, y: CHART.height / 2 }, mark.text));
}

function drawSeries(one, scale) {
  const colour = SERIES_COLOURS[one.colour % SERIES_COLOURS.length];
  const at = (p, y) => `${scale.x(p.x).toFixed(1)},${scale.y(y).toFixed(1)}`;
  const banded = one.points.filter(p => isNumber(p.low) && isNumber(p.high));
  const parts = [];
  if (banded.length > 1) {
    const outline = [...banded.map(p => at(p, p.high)), ...banded.reverse().map(p => at(p, p.low))];
    parts.push(svg("polygon", { points: outline.join(" "), fill: colour, opacity: 0.15 }));
  } else {
    parts.push(banded.map(p => svg("line", {
      x1: scale.x(p.x), x2: scale.x(p.x), y1: scale.y(p.low), y2: scale.y(p.high), stroke: colour, opacity: 0.4,
    })));
  }
  parts.push(svg("polyline", {
    points: one.points.map(p => at(p, p.y)).join(" "), fill: "none", stroke: colour, "stroke-width": 1.8,
    "stroke-dasharray": DASHES[one.dash % DASHES.length], "stroke-linejoin": "round",
  }));
  if (isLevel(one)) {
    const y = scale.y(one.points[0].y);
    parts.push(svg("line", { x1: CHART.left, x2: CHART.width - CHART.right, y1: y, y2: y, stroke: colour, "stroke-dasharray": DASHES[one.dash % DASHES.length], "stroke-width": 1.5 }));
  } else if (one.points.length <= 30) {
    parts.push(one.points.map(p => svg("circle", { cx: scale.x(p.x), cy: scale.y(p.y), r: one.points.length > 1 ? 2.2 : 4, fill: colour })));
  }
  return svg("g.series", null, parts);
}

function isLevel(one) {
  return one.level && one.points.length === 1;
}

function legend(drawn) {
  return el("ul.legend", null, drawn.map(one => el("li", null, swatch(one), one.name)));
}

function swatch(one) {
  return svg("svg.swatch", { viewBox: "0 0 22 6", "aria-hidden": true }, svg("line", {
    x1: 0, x2: 22, y1: 3, y2: 3, stroke: SERIES_COLOURS[one.colour % SERIES_COLOURS.length],
    "stroke-width": 2.5, "stroke-dasharray": DASHES[one.dash % DASHES.length],
  }));
}

function followPointer(root, cursor, values, drawn, scale) {
  const xs = [...new Set(drawn.flatMap(one => one.points.map(p => p.x)))].sort((a, b) => a - b);
  let at = -1;
  const move = to => {
    at = Math.max(0, Math.min(xs.length - 1, to));
    const x = scale.x(xs[at]);
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, x);
    cursor.setAttribute("visibility", "visible");
    values.hidden = false;
    values.replaceChildren(el("b", null, `step ${show(xs[at])}`), ...drawn.map(one => valueLine(one, xs[at])).filter(Boolean));
    const right = x > CHART.width / 2;
    values.style.left = right ? "" : `${(x + 8) / CHART.width * 100}%`;
    values.style.right = right ? `${100 - (x - 8) / CHART.width * 100}%` : "";
  };
  const leave = () => {
    cursor.setAttribute("visibility", "hidden");
    values.hidden = true;
  };
  root.addEventListener("pointermove", event => {
    const box = root.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * CHART.width;
    const gaps = xs.map(v => Math.abs(scale.x(v) - x));
    move(gaps.indexOf(smallest(gaps)));
  });
  root.addEventListener("pointerleave", leave);
  root.addEventListener("blur", leave);
  root.addEventListener("keydown", event => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    move(at + step);
  });
}

function valueLine(one, x) {
  const point = isLevel(one) ? one.points[0] : one.points.find(p => p.x === x);
  if (!point) return null;
  const interval = isNumber(point.low) ? ` (${show(point.low)} to ${show(point.high)})` : "";
  return el("div", null, swatch(one), `${one.name} ${show(point.y)}${interval}`);
}
