"use strict";
/* The list of episodes: filters, order, and pairs of episodes if two runs are compared. */

const FIRST_ROWS = 100;
const FILTER_NAMES = ["from", "to", "who", "env", "benchmark", "category", "verdict", "tools", "stop", "q", "sort"];

const TOOL_FILTERS = [["used", "a tool was used"], ["none", "no tool"], ["error", "a tool failed"], ["clean", "used, none failed"]];

const ORDERS = {
  "": ["as played", null],
  step: ["step, last first", entry => -(entry.first.step ?? 0)],
  task: ["task", entry => entry.first.index ?? 0],
  ratio: ["teacher's disagreement, most first", entry => entry.first.ratio ?? Infinity],
  entropy: ["entropy, highest first", entry => -(entry.first.entropy ?? -Infinity)],
  tokens: ["tokens, most first", entry => -(entry.first.tokens ?? 0)],
  seconds: ["seconds, most first", entry => -(entry.first.seconds ?? 0)],
};

/** Returns all entries: { key, rows: [row of run A or null, of run B], first }. Pairs come first. */
function allEntries(runs) {
  const entries = new Map();
  runs.forEach((run, i) => {
    for (const row of run.rows) {
      if (!entries.has(row.key)) entries.set(row.key, { key: row.key, rows: runs.map(() => null), first: row });
      entries.get(row.key).rows[i] = row;
    }
  });
  const all = [...entries.values()];
  if (runs.length === 1) return all;
  return [...all.filter(e => e.rows.every(Boolean)), ...all.filter(e => !e.rows.every(Boolean))];
}

/** Returns the entries that pass the filters, in order. */
function chosenEntries(runs, params) {
  const words = (params.get("q") || "").toLowerCase().trim();
  const from = Number(params.get("from") || -Infinity);
  const to = Number(params.get("to") || Infinity);
  const verdict = params.get("verdict") || "";
  const tests = [
    row => !(isNumber(row.step) && (row.step < from || row.step > to)),
    row => same(row, "who", params) && same(row, "env", params) && same(row, "benchmark", params) && same(row, "category", params) && same(row, "stop", params),
    row => toolsFit(row, params.get("tools")),
    row => !words || [row.question, row.answer, row.id, row.error].some(text => String(text).toLowerCase().includes(words)),
    row => !verdict || verdict.includes("-") || row.verdict === verdict,
  ];
  const found = allEntries(runs).filter(entry => verdictsFit(entry, verdict) &&
    entry.rows.some(row => row && tests.every(test => test(row))));
  const order = (ORDERS[params.get("sort") || ""] || ORDERS[""])[1];
  return order ? found.map((e, i) => [order(e), i, e]).sort((a, b) => (a[0] < b[0] ? -1 : a[0] > b[0] ? 1 : a[1] - b[1])).map(t => t[2]) : found;
}

function same(row, name, params) {
  return !params.get(name) || String(row[name] ?? "") === params.get(name);
}

function toolsFit(row, wanted) {
  const fits = { used: row.tools > 0, none: row.tools === 0, error: row.tool_errors > 0, clean: row.tools > 0 && row.tool_errors === 0 };
  return !wanted || fits[wanted];
}

/* "right-wrong": run A right and run B wrong; "differ": not the same. */
function verdictsFit(entry, verdict) {
  if (!verdict.includes("-")) return true;
  const [a, b] = entry.rows.map(row => row && row.verdict);
  if (!a || !b) return false;
  return verdict === "they-differ" ? a !== b : `${a}-${b}` === verdict;
}

function drawList(app) {
  const rows = app.runs.flatMap(run => run.rows);
  return [filterBar(app, rows), el("p.quiet", { id: "count", role: "status" }), el("div", { id: "rows" })];
}

function filterBar(app, rows) {
  const { params } = app;
  const select = (name, label, options, all) => {
    if (options.length < 2) return null;
    const box = el("select", { id: `filter-${name}`, onchange: event => app.filter(name, event.target.value) },
      all === null ? null : el("option", { value: "" }, all),
      options.map(([value, text]) => el("option", { value }, text)));
    box.value = params.get(name) || "";
    return el("div.field", null, el("label", { for: `filter-${name}` }, label), box);
  };
  const values = name => [...new Set(rows.map(row => String(row[name] ?? "")))].filter(Boolean).sort().map(v => [v, v]);
  const verdicts = values("verdict");
  if (app.runs.length > 1) {
    verdicts.push(["they-differ", "A and B differ"], ["wrong-right", "A wrong, B right"], ["right-wrong", "A right, B wrong"]);
  }
  const step = (name, label) => el("div.field.short", null, el("label", { for: `filter-${name}` }, label), el("input", {
    id: `filter-${name}`, type: "number", min: 0, value: params.get(name) || "", oninput: event => app.filter(name, event.target.value),
  }));
  const search = el("div.field.grow", null, el("label", { for: "search" }, "search (/)"), el("input", {
    id: "search", type: "search", value: params.get("q") || "", placeholder: "in question, answer, task id",
    oninput: event => app.filter("q", event.target.value),
  }));
  return el("form.filters", { role: "search", onsubmit: event => event.preventDefault() },
    rows.some(row => isNumber(row.step)) ? [step("from", "from step"), step("to", "to step")] : null,
    select("who", "who", values("who"), "all"), select("env", "environment", values("env"), "all"), select("benchmark", "benchmark", values("benchmark"), "all"),
    select("category", "category", values("category"), "all"), select("verdict", "outcome", verdicts, "all"),
    select("tools", "tools", TOOL_FILTERS, "all"), select("stop", "ended by", values("stop"), "all"), search,
    select("sort", "order", Object.entries(ORDERS).map(([value, [text]]) => [value, text]), null),
    el("button", { type: "button", onclick: () => app.clearFilters() }, "Clear"));
}

/** Draws the rows below the filters, and leaves the filters alone: the user may be typing there. */
function drawRows(app) {
  const place = document.getElementById("rows");
  if (!place) return;
  const entries = app.entries();
  const total = allEntries(app.runs).length;
  document.getElementById("count").textContent = entries.length === total ? count(total, "episode") : `${entries.length} of ${count(total, "episode")}`;
  const shown = entries.slice(0, app.shownRows);
  const body = el("tbody", null, shown.map(entry => listRow(app, entry)));
  const names = ["outcome", ...(app.runs[0].facts.evaluation ? ["benchmark"] : ["step"]), "task", "question", "answer", "tools", "tokens", ...(app.runs[0].facts.evaluation ? [] : ["teacher"]), "ended by"];
  const table = el("table.list", null, el("thead", null, el("tr", null, names.map(name => el("th", { scope: "col", title: HEADINGS[name] || "" }, name)))), body);
  place.replaceChildren(entries.length ? table : el("p.note", null, total ? "No episode matches these filters." : "No episodes have been written yet."));
  if (entries.length > shown.length) {
    place.append(el("button", { type: "button", onclick: () => app.showMore() }, `Show more (${entries.length - shown.length} left)`));
  }
}

const HEADINGS = { teacher: "mean of log teacher − log student over the student's tokens, nats", tokens: "that the student sampled" };

function listRow(app, entry) {
  const { first } = entry;
  const both = app.runs.length > 1;
  const each = (draw, joiner) => {
    const drawn = entry.rows.map(row => (row ? draw(row) : "–"));
    return both && drawn[0] !== drawn[1] ? [drawn[0], joiner, drawn[1]] : [drawn[0]];
  };
  const verdicts = both
    ? entry.rows.map((row, i) => el("span.pair", null, el(`span.side.side-${i}`, null, "AB"[i]), row ? verdictMark(row.verdict) : "–", " "))
    : verdictMark(first.verdict);
  const cell = (name, ...children) => el(`td.c-${name}`, { data: { label: name } }, ...children);
  const link = el("a", { href: app.address({ view: "episode", key: entry.key }) }, `${first.id || show(first.index)}`, first.sample ? ` #${first.sample}` : "");
  return el(entry.key === app.selected ? "tr.selected" : "tr", { data: { key: entry.key }, onclick: event => { if (!event.target.closest("a")) app.open(entry.key); } },
    cell("outcome", verdicts), first.benchmark === undefined ? cell("step", first.who && first.who !== "student" ? `${show(first.step)} ${first.who}` : show(first.step)) : cell("benchmark", first.benchmark, first.category ? ` · ${first.category}` : ""),
    cell("task", link), cell("question", shorten(String(first.question).split("\n\n")[0], 140)),
    cell("answer", both ? entry.rows.map((row, i) => el("div", null, el(`span.side.side-${i}`, null, "AB"[i]), " ", row ? shorten(row.answer, 90) : "–")) : shorten(first.answer, 140)),
    cell("tools", each(row => (row.tool_errors ? el("span.warn", { title: `${row.tool_errors} failed` }, `${row.tools} (${row.tool_errors} ✗)`) : row.tools), " | ")),
    cell("tokens", each(row => show(row.tokens), " | ")), app.runs[0].facts.evaluation ? null : cell("teacher", each(row => (isNumber(row.ratio) ? row.ratio.toFixed(2) : "–"), " | ")),
    cell("stop", each(row => (row.error ? el("span.warn", { title: row.error }, row.stop) : row.stop), " | ")));
}

function shorten(text, most) {
  const line = String(text ?? "").replace(/\s+/g, " ");
  return line.length > most ? `${line.slice(0, most)}…` : line;
}
