"use strict";
/* The overview of a run: settings, results and curves. */

const CURVES = [
  { title: "Kept tokens", note: "share of the student's tokens", keys: ["mask/kept_share", "mask/exploration_share", "mask/refinement_share"] },
  { title: "Reward of the tokens", note: "nats, teacher − student", keys: ["reward/mean", "reward/clipped_mean"] },
  { title: "Entropy", note: "nats", keys: ["entropy/mean", "entropy/threshold"] },
  { title: "Loss", keys: ["loss"] },
  { title: "Gradient norm", note: "before clipping", keys: ["grad_norm"] },
  { title: "Training episodes", keys: ["rollout/success", "rollout/tool_rate", "rollout/tool_errors"] },
  { title: "Response length", note: "tokens", keys: ["rollout/response_tokens"] },
];
const NO_CURVES = new Set(["kind", "step", "phase", "who", "sampling"]);

function drawOverview(app) {
  const { runs } = app;
  return [
    el("section.facts", { "aria-label": "the runs" }, runs.map((run, i) => runCard(run, i, runs.length))),
    runs.some(run => run.facts.evaluation) ? el("section", null, el("h2", null, "Results"), scroll(resultsTable(runs))) : null,
    runs.some(run => run.metrics.length) ? el("section", null, el("h2", null, "Curves"), curveChooser(app),
      el("div.charts", null, allCharts(app))) : null,
    runs.every(run => !run.metrics.length && !run.rows.length) ? el("p.note", null,
      "This run has written neither metrics nor episodes yet. They appear here as soon as they are written.") : null,
  ];
}

function scroll(child) {
  return el("div.scroll", { tabIndex: 0, role: "region", "aria-label": "table" }, child);
}

function runCard(run, number, total) {
  const facts = run.facts;
  const problems = [...(facts.problems || [])];
  if (run.bad) problems.push(`${count(run.bad, "line")} could not be read and ${run.bad === 1 ? "is" : "are"} left out`);
  if (run.rows.length < run.all) problems.push(`this file holds ${run.rows.length} of the run's ${count(run.all, "episode")}`);
  return el("article.card", null,
    el("h2", null, total > 1 ? el(`span.side.side-${number}`, null, "AB"[number]) : null, total > 1 ? " " : null, facts.name,
      run.live ? el("span.live", { title: "the run has not finished; the page follows it" }, "running") : null),
    el("dl", null, runFacts(run).map(([name, value]) => el("div", null, el("dt", null, name), el("dd", null, value)))),
    problems.map(text => el("p.note", null, text)),
    facts.evaluation ? null : scroll(summaryTable(run)),
    el("details", null, el("summary", null, "Command, versions, configuration"),
      facts.command ? el("pre", null, facts.command) : null,
      facts.versions ? el("pre", null, plain(facts.versions)) : null,
      el("pre", null, plain(facts.config))));
}

function runFacts(run) {
  const { facts } = run;
  const config = facts.config;
  const at = (...path) => path.reduce((value, key) => (value && typeof value === "object" ? value[key] : undefined), config);
  const steps = run.metrics.filter(row => row.kind === "train").length;
  const versions = facts.versions || {};
  const packages = versions.packages || {};
  const pairs = facts.evaluation
    ? [["model", at("checkpoint")], ["benchmarks", Object.keys((facts.results || {}).benchmarks || {}).join(", ")],
      ["judge", at("judge", "name")], ["seed", at("seed")]]
    : [["environment", at("env", "name")], ["objective", at("objective", "name")], ["student", at("model", "student", "path")],
      ["teacher", at("model", "teacher", "path")], ["seed", at("seed")], ["steps", `${steps} of ${show(at("steps"))}`]];
  pairs.push(["episodes here", run.rows.length], ["device", versions.device],
    ["versions", [`reopold ${versions.reopold_agent || "?"}`, ...["torch", "transformers"].filter(n => packages[n]).map(n => `${n} ${packages[n]}`)].join(", ")],
    ["folder", facts.folder]);
  return pairs.filter(([, value]) => value !== undefined && value !== null && value !== "").map(([name, value]) => [name, String(value)]);
}

function plain(value) {
  return JSON.stringify(value, null, 2);
}

/** Returns the success before and after, and the teacher's: from the summary, or from the rows during the run. */
function summaryTable(run) {
  const config = run.facts.config || {};
  const names = config.steps === 0
    ? [["student, not trained", "before"], ["teacher", "teacher"]]
    : [["student before", "before"], ["student after", "after"], ["teacher", "teacher"]];
  const parts = run.facts.summary || partsSoFar(run);
  const cell = part => (isNumber(part.low) ? `${show3(part.success)} (${show3(part.low)} to ${show3(part.high)})` : show3(part.success));
  const whole = names.filter(([, key]) => parts[key] && typeof parts[key] === "object").map(([label, key]) => [label, key, parts[key]]);
  const rows = whole.concat(environmentsOf(run).flatMap(env => whole.map(([, key, part]) => [`${env}: ${key}`, "", environmentPart(part, env)])));
  if (!rows.length) return el("p.quiet", null, (config.evaluation || {}).tasks === 0 ? "No held-out evaluation." : "No evaluation yet.");
  return el("table.figures", null,
    el("thead", null, el("tr", null, ["held-out success", "sampled (95 %)", "greedy", "tools", "tasks"].map(text => el("th", { scope: "col" }, text)))),
    el("tbody", null, rows.map(([label, key, part]) => el(key === "after" ? "tr.strong" : "tr", null, el("th", { scope: "row" }, label),
      el("td", null, cell(part)), el("td", null, show3((part.greedy || {}).success)),
      el("td", null, show3(part.tool_rate)), el("td", null, show(part.n))))));
}

/** Returns the names of a mixture's environments; none for a run of one. */
function environmentsOf(run) {
  return Object.keys(((run.facts.config || {}).mix || {}).envs || {});
}

/** Returns an environment's part of a summary's part, or of a row of metrics. */
function environmentPart(part, env) {
  if (part.envs) return part.envs[env] || {};
  const of = row => Object.fromEntries(["success", "low", "high", "n", "tool_rate"].map(key => [key, (row || {})[`env/${env}/${key}`]]));
  return { ...of(part), greedy: of(part.greedy) };
}

function partsSoFar(run) {
  const found = {};
  for (const row of run.metrics) {
    if (row.kind !== "eval" || row.curve === true) continue;
    const name = row.who === "teacher" ? "teacher" : row.step === 0 ? "before" : "after";
    found[name] ||= {};
    if (row.sampling === "greedy") found[name].greedy = row;
    else Object.assign(found[name], row);
  }
  return found;
}

function show3(value) {
  return isNumber(value) ? value.toFixed(2) : "–";
}

function resultsTable(runs) {
  const header = ["benchmark", ...(runs.length > 1 ? ["run"] : []), "questions", "accuracy (95 %)", "undecided", "tools", "tool errors", "tokens"];
  const lines = runs.flatMap((run, i) => Object.entries((run.facts.results || {}).benchmarks || {}).map(([name, f]) => ({ name, i, f })));
  lines.sort((a, b) => (a.name < b.name ? -1 : a.name > b.name ? 1 : a.i - b.i));
  if (!lines.length) return el("p.quiet", null, "No benchmark has finished yet.");
  return el("table.figures", null,
    el("thead", null, el("tr", null, header.map(text => el("th", { scope: "col" }, text)))),
    el("tbody", null, lines.map(({ name, i, f }) => el("tr", null, el("th", { scope: "row" }, name),
      runs.length > 1 ? el("td", null, el(`span.side.side-${i}`, null, "AB"[i])) : null,
      [f.samples > 1 ? `${show(f.questions)} × ${show(f.samples)}` : show(f.questions),
        `${fixed(f.accuracy)} (${fixed(f.low)} to ${fixed(f.high)})`, show(f.undecided), fixed(f.tool_rate),
        fixed(f.tool_errors), show(f.tokens_per_answer)].map(text => el("td", null, text))))));
}

function fixed(value) {
  return isNumber(value) ? value.toFixed(3) : "–";
}

// Curves

function allCharts(app) {
  const chosen = app.extraCurves;
  return [successChart(app), ...environmentCharts(app), ...CURVES.map(curve => keyChart(app, curve)), timeChart(app),
    ...[...chosen].sort().map(key => keyChart(app, { title: key, keys: [key], always: true }))].filter(Boolean);
}

/** Returns label and colour of a series: one colour per series, or per run if there are two. */
function styled(app, run, series, label) {
  return app.runs.length > 1 ? { name: `${"AB"[run]} ${label}`, colour: run, dash: series } : { name: label, colour: series, dash: series };
}

function successChart(app) {
  const kinds = [["student", "sampled"], ["student", "greedy"], ["teacher", "sampled"]];
  const series = app.runs.flatMap((run, i) => kinds.map(([who, sampling], k) => {
    const byStep = new Map();
    for (const row of run.metrics) {
      if (row.kind === "eval" && row.who === who && row.sampling === sampling) byStep.set(row.step, row);
    }
    const points = [...byStep.values()].map(row => ({ x: row.step, y: row.success, low: row.low, high: row.high }));
    return { ...styled(app, i, k, `${who}, ${sampling}`), points, level: who === "teacher" };
  }));
  return series.some(one => one.points.length) ? lineChart(series, { title: "Held-out success", note: "with 95 % interval", legend: true }) : null;
}

/** Draws what a mixture's environments have in held-out success and in the update, one series for each. */
function environmentCharts(app) {
  const chart = (title, note, key, fits) => {
    const series = app.runs.flatMap((run, i) => environmentsOf(run).map((env, k) => ({
      ...styled(app, i, k, env), points: run.metrics.filter(fits).map(row => ({ x: row.step, y: row[`env/${env}/${key}`] })),
    })));
    return series.some(one => one.points.some(p => isNumber(p.y))) ? lineChart(series, { title, note, legend: true }) : null;
  };
  return [chart("Held-out success by environment", "student, sampled", "success", row => row.kind === "eval" && row.who === "student" && row.sampling === "sampled"),
    chart("Kept tokens by environment", "share of all kept tokens", "kept_share", row => row.kind === "train")];
}

function keyChart(app, { title, note, keys, always }) {
  const series = app.runs.flatMap((run, i) => keys.map((key, k) => ({
    ...styled(app, i, k, key), points: run.metrics.filter(row => always || row.kind === "train").map(row => ({ x: row.step, y: row[key] })),
  })));
  if (!series.some(one => one.points.some(p => isNumber(p.y)))) return null;
  return lineChart(series, { title, note, legend: app.runs.length > 1, marks: title === "Kept tokens" ? phaseMarks(app) : [] });
}

function phaseMarks(app) {
  if (app.runs.length > 1) return [];
  const rows = app.runs[0].metrics.filter(row => row.kind === "train" && typeof row.phase === "string");
  return rows.filter((row, i) => i > 0 && rows[i - 1].phase !== row.phase).map(row => ({ x: row.step, text: row.phase }));
}

function timeChart(app) {
  const parts = new Set(app.runs.flatMap(run => run.metrics.flatMap(row => Object.keys(row))).filter(key => key.startsWith("time/") && key !== "time/step"));
  const series = app.runs.flatMap((run, i) => [...parts].map((key, k) => ({
    ...styled(app, i, k, key.slice(5)),
    points: run.metrics.filter(row => row["time/step"] > 0).map(row => ({ x: row.step, y: isNumber(row[key]) ? row[key] / row["time/step"] : null })),
  })));
  const worth = series.filter(one => one.points.some(p => p.y >= 0.01));
  return worth.length ? lineChart(worth, { title: "Where the time goes", note: "share of a step", legend: true }) : null;
}

function curveChooser(app) {
  const shown = new Set(CURVES.flatMap(curve => curve.keys));
  const keys = new Set();
  for (const run of app.runs) {
    for (const row of run.metrics) {
      for (const [key, value] of Object.entries(row)) if (isNumber(value) && !NO_CURVES.has(key) && !shown.has(key)) keys.add(key);
    }
  }
  const box = key => el("label", null, el("input", {
    type: "checkbox", checked: app.extraCurves.has(key),
    onchange: event => app.chooseCurve(key, event.target.checked),
  }), ` ${key}`);
  return el("details.chooser", { open: app.chooserOpen, ontoggle: event => { app.chooserOpen = event.target.open; } },
    el("summary", null, `More curves (${keys.size})`), el("div.choices", null, [...keys].sort().map(box)));
}
