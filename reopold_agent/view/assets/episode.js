"use strict";
/* Shows one episode as a conversation, or two side by side. */

const PICTURE_MARK = "\ufffc";
const ROLE_NAMES = { system: "system", user: "question", assistant: "student", tool: "tool" };

/**
 * A row of a training (trajectories.jsonl) or of an evaluation (responses.jsonl) in one form:
 * { parts: [{ role, text, numbers, call, callNumber, start, end }], pictures, boxes }.
 */
function conversation(run, record) {
  const turns = (Array.isArray(record.turns) ? record.turns : []).filter(turn => turn && typeof turn === "object")
    .map(turn => ({ ...turn, call: turn.tool_call ?? turn.tool ?? null, observation: String(turn.observation ?? "") }));
  const pictures = picturesOf(run, record);
  const shown = turns.map(turn => turn.observation.split(PICTURE_MARK).length - 1);
  let next = Math.max(0, pictures.length - shown.reduce((a, b) => a + b, 0)) + 1;
  const first = Array.from({ length: next - 1 }, (_, i) => i + 1);
  const results = shown.map(n => Array.from({ length: n }, () => next++));
  const parts = promptParts(record);
  const question = parts.findLast(part => part.role !== "system");
  if (question) question.numbers = first;
  let calls = 0;
  turns.forEach((turn, t) => {
    const call = turn.call && typeof turn.call === "object" ? turn.call : null;
    if (call) calls += 1;
    parts.push({ role: turn.role || "assistant", text: String(turn.text ?? ""), numbers: [], call, callNumber: calls, start: turn.start, end: turn.end, cut: turn.finish === "length" });
    if (turn.observation) parts.push({ role: "tool", text: turn.observation, numbers: results[t], failed: call && call.ok === false });
    else if (call && call.error) parts.push({ role: "tool", text: String(call.error), numbers: [], failed: true });
  });
  return { parts, pictures, boxes: boxesOf(turns, results) };
}

function picturesOf(run, record) {
  if (Array.isArray(record.pictures)) {
    return record.pictures.map(name => ({ name: String(name), source: run.picture(String(name)), size: "" }));
  }
  return (Array.isArray(record.images) ? record.images : []).map(image => {
    const { picture, width, height, tokens } = image || {};
    const size = isNumber(width) ? `${width} × ${height}, ${count(tokens, "token")}` : "";
    return picture ? { name: String(picture), source: run.picture(String(picture)), size } : { name: "", source: "", size };
  });
}

/**
 * System and question. They are told apart by the control tokens themselves: where a question only
 * spells "<|im_end|>", that is several tokens and stays text.
 */
function promptParts(record) {
  if (typeof record.question === "string") {
    const options = Array.isArray(record.options) && record.options.length ? `\n\n${record.options.join("\n")}` : "";
    return [{ role: "user", text: record.question + options, numbers: [] }];
  }
  const tokens = Array.isArray(record.tokens) ? record.tokens.slice(0, record.prompt_length).map(String) : null;
  const text = typeof record.prompt === "string" ? record.prompt : "";
  if (!tokens) return text ? [{ role: "user", text, numbers: [] }] : [];
  const parts = [];
  let open = null;
  for (const token of tokens) {
    if (token === "<|im_start|>") parts.push(open = { text: "", numbers: [] });
    else if (token === "<|im_end|>") open = null;
    else if (open && !/^<\|(vision_start|vision_end|image_pad|video_pad)\|>$/.test(token)) open.text += token;
  }
  for (const part of parts) {
    const [, role, rest] = /^(\w+)\n?([^]*)$/.exec(part.text) || [null, "user", part.text];
    Object.assign(part, { role: role in ROLE_NAMES ? role : "user", text: rest.trim() });
  }
  const said = parts.filter(part => part.text);
  // Only the prompt shows a character that is split over tokens as a whole.
  return said.length && !said.some(part => part.text.includes("\ufffd")) ? said : [{ role: "user", text, numbers: [] }];
}

/** Draws the page of an episode; `records` holds one record per run, or null if the run lacks the episode. */
function drawEpisode(app, entry, records) {
  const entries = app.entries();
  const place = entries.findIndex(e => e.key === entry.key);
  const neighbour = (offset, label, key) => {
    const other = place < 0 ? undefined : entries[place + offset];
    return other ? el("a.button", { href: app.address({ view: "episode", key: other.key }), title: `key ${key}` }, label) : el("span.button.off", null, label);
  };
  const { first } = entry;
  return [
    el("nav.episode-bar", { "aria-label": "episodes" },
      el("a.button", { href: app.address({ view: "list", key: "" }) }, "← list"), neighbour(-1, "‹ previous", "k"), neighbour(1, "next ›", "j"),
      el("span.quiet", null, place < 0 ? "not among the filtered episodes" : `${place + 1} of ${entries.length}`),
      app.tokenFacts.some(Boolean) ? colourSwitch(app) : null),
    el("h1", null, first.id || `task ${show(first.index)}`, el("span.quiet", null, [
      first.benchmark, first.category, isNumber(first.step) ? `step ${first.step}` : null, first.who, first.sample ? `sample ${first.sample}` : null,
    ].filter(Boolean).map(text => ` · ${text}`))),
    el(records.length > 1 ? "div.columns" : "div", null, records.map((record, i) => drawSide(app, i, entry.rows[i], record, app.tokenFacts[i]))),
  ];
}

function colourSwitch(app) {
  return el("fieldset.switch", null, el("legend", null, "colour tokens by"), Object.entries(COLOURINGS).map(([value, label], i) => el("label", { title: `key ${i + 1}` },
    el("input", { type: "radio", name: "colour", value, checked: app.colouring === value, onchange: () => app.colourBy(value) }), label)));
}

function drawSide(app, number, row, record, facts) {
  const run = app.runs[number];
  const title = app.runs.length > 1 ? el("h2", null, el(`span.side.side-${number}`, null, "AB"[number]), ` ${run.facts.name}`) : null;
  if (!record) return el("section.column", null, title, el("p.note", null, "This run has no such episode."));
  const talk = conversation(run, record);
  return el("section.column", { data: { run: number } }, title, outcome(row, record),
    facts ? el("div.legend-place", null, colourLegend(facts, app.colouring)) : null,
    talk.parts.map(part => drawPart(app, part, talk, facts)),
    verdictCard(row, record), details(record));
}

function outcome(row, record) {
  const failed = row.error ? el("span.warn", null, row.error) : null;
  const facts = [["reward", record.reward], ["advantage", record.advantage], ["ended by", row.stop], ["turns", row.turns],
    ["tokens", row.tokens], ["tool calls", row.tool_errors ? `${row.tools}, ${row.tool_errors} failed` : row.tools],
    ["seconds", isNumber(row.seconds) ? row.seconds.toFixed(2) : null], ["teacher − student", isNumber(row.ratio) ? `${show(row.ratio)} nats per token` : null],
    ["kept", isNumber(row.kept) ? `${Math.round(row.kept * 100)} % of tokens` : null]];
  return el("p.outcome", null, verdictMark(row.verdict, true), facts.filter(([, v]) => v !== null && v !== undefined && v !== "").map(([name, value]) => el("span.fact", null, el("span.quiet", null, name), ` ${show(value)}`)), failed);
}

function drawPart(app, part, talk, facts) {
  const article = el(`article.turn.${part.role in ROLE_NAMES ? part.role : "assistant"}`, null,
    el("h3", null, ROLE_NAMES[part.role] || "student", part.cut ? el("span.warn", null, " cut off at the token limit") : null, part.failed ? el("span.warn", null, " error") : null));
  if (part.role === "system") {
    return add(article, [el("details", null, el("summary", null, shorten(part.text, 80)), el("div.said", null, part.text))]);
  }
  const numbers = [...part.numbers];
  const text = part.role === "tool" ? part.text.replaceAll(PICTURE_MARK, () => (numbers.length ? `[picture ${numbers.shift()}]` : "[picture]")) : part.text;
  const tokens = facts && isNumber(part.start) && isNumber(part.end) ? drawTokens(facts, part.start, part.end, app.colouring) : null;
  const pictures = part.numbers.length ? drawPictures(talk.pictures, part.numbers, talk.boxes) : null;
  // The model reads pictures before the text of a question, and after the text of a tool's result.
  add(article, [part.role === "user" ? pictures : null, tokens || el("div.said", null, text || "(nothing)")]);
  if (tokens && /\ufffd/.test(tokens.textContent) && !part.text.includes("\ufffd")) {
    add(article, [el("details", null, el("summary", null, "as text (some characters are split over tokens)"), el("div.said", null, part.text))]);
  }
  if (part.call) add(article, [callCard(part.call, part.callNumber)]);
  return add(article, [part.role === "user" ? null : pictures]);
}

function callCard(call, number) {
  const seconds = isNumber(call.seconds) ? `${call.seconds.toFixed(3)} s` : "";
  return el(call.ok === false ? "div.call.failed" : "div.call", null,
    el("div", null, callBadge(number), el("b", null, String(call.name || "(no tool named)")), ` ${call.ok === false ? "failed" : "ok"} `, el("span.quiet", null, seconds)),
    el("pre", null, plainCall(call.arguments)), call.error ? el("div.warn", null, String(call.error)) : null);
}

/** Formats arguments, one per line; a list of numbers stays on one line. */
function plainCall(given) {
  if (!given || typeof given !== "object" || Array.isArray(given)) return JSON.stringify(given);
  return Object.entries(given).map(([name, value]) => `${name}: ${JSON.stringify(value)}`).join("\n");
}

function verdictCard(row, record) {
  const answers = Array.isArray(record.answers) ? record.answers.join(" or ") : null;
  const judge = record.judge && typeof record.judge === "object" ? record.judge : null;
  const lines = [["expected", answers], ["understood", record.extracted], ["graded by", record.how], ["kind", record.kind !== "train" && record.kind !== "eval" ? record.kind : null],
    ["judge", judge && `${judge.judge ?? ""}: ${judge.said ?? judge.error ?? judge.how ?? ""}`]];
  const known = lines.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return el(`article.turn.final.${VERDICT_MARKS[row.verdict] ? row.verdict : "unknown"}`, null, el("h3", null, "outcome ", verdictMark(row.verdict, true)),
    known.length ? el("dl.inline", null, known.map(([name, value]) => el("div", null, el("dt", null, name), el("dd", null, String(value))))) : null);
}

function details(record) {
  const long = new Set(["ids", "loss_mask", "logp", "entropy", "teacher_logp", "token_reward", "kept", "tokens", "prompt", "turns"]);
  const rest = Object.fromEntries(Object.entries(record).filter(([key]) => !long.has(key)));
  return el("details", null, el("summary", null, "The rest of the record"), el("pre", null, JSON.stringify(rest, null, 2)));
}
