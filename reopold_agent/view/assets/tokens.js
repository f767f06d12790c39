"use strict";
/* The student's tokens, coloured by reward, mask (whether they were trained on) or entropy. The
 * pointer, the focus or the arrow keys show the numbers of a token. */

const COLOURINGS = { none: "plain", reward: "reward", mask: "mask", entropy: "entropy" };

/** Orange to blue, which people of every colour vision can distinguish. */
const NEGATIVE = "213, 94, 0";
const POSITIVE = "0, 114, 178";
const UNCERTAIN = "0, 140, 105";

/**
 * Collects the values of each token of a training record: { start, list: [{ text, logp, teacher, ratio,
 * reward, clipped, kept, entropy }] by position, range, floor, how, most }. Returns null without tokens.
 */
function tokenFacts(record, metrics) {
  const texts = record.tokens;
  const mask = record.loss_mask;
  if (!Array.isArray(texts) || !Array.isArray(mask) || !Array.isArray(record.logp)) return null;
  const row = stepRow(record, metrics);
  const floor = isNumber(row["reward/floor"]) ? row["reward/floor"] : null;
  const recorded = Array.isArray(record.token_reward) && Array.isArray(record.kept);
  const trained = recorded || record.token_reward === undefined;
  const list = texts.map((text, i) => {
    if (!mask[i]) return null;
    const token = { text: String(text), logp: record.logp[i], entropy: at(record.entropy, i), teacher: at(record.teacher_logp, i) };
    token.ratio = isNumber(token.logp) && isNumber(token.teacher) ? token.teacher - token.logp : null;
    token.reward = recorded ? record.token_reward[i] : trained ? clip(token.ratio, floor) : null;
    token.kept = recorded ? Boolean(record.kept[i]) : trained ? keptBy(token, row, floor) : false;
    const unclipped = recorded ? token.reward : token.ratio;
    token.clipped = floor !== null && isNumber(unclipped) && Math.fround(unclipped) <= Math.fround(floor);
    return token;
  });
  const sampled = list.filter(Boolean);
  const reward = t => (isNumber(t.reward) ? t.reward : t.ratio);
  return {
    list, floor, threshold: isNumber(row["entropy/threshold"]) ? row["entropy/threshold"] : null, phase: row.phase,
    how: recorded ? "recorded" : trained ? "derived" : "untrained",
    range: floor !== null ? -floor : Math.max(1e-6, largest(sampled.map(t => Math.abs(reward(t) ?? 0)))),
    most: Math.max(1e-6, largest(sampled.map(t => t.entropy ?? 0))),
  };
}

const at = (values, i) => (Array.isArray(values) ? values[i] : null);
const clip = (value, floor) => (isNumber(value) && floor !== null ? Math.max(value, floor) : value);

function stepRow(record, metrics) {
  if (record.kind !== "train") return {};
  return metrics.findLast(row => row.kind === "train" && row.step === record.step) || {};
}

/* Derives the paper's masks from the step's threshold and floor, for runs that did not record them. */
function keptBy(token, row, floor) {
  if (row.phase === "exploration" && floor !== null && isNumber(token.ratio)) return Math.fround(token.ratio) > Math.fround(floor);
  if (row.phase === "refinement" && isNumber(row["entropy/threshold"]) && isNumber(token.entropy)) {
    return Math.fround(token.entropy) >= Math.fround(row["entropy/threshold"]);
  }
  return row["mask/kept_share"] === 1 ? true : null;
}

/** Gives both sides of a comparison one scale, so that a colour means the same on both. */
function shareScale(sides) {
  const known = sides.filter(Boolean);
  for (const facts of known) {
    facts.range = smallest(known.map(other => other.range));
    facts.most = largest(known.map(other => other.most));
  }
}

/** Draws the tokens from start to end as spans. */
function drawTokens(facts, start, end, colouring) {
  const spans = [];
  for (let i = start; i < end; i += 1) {
    const token = facts.list[i];
    if (token) spans.push(drawToken(token, i, facts, colouring));
  }
  if (spans.length) spans[0].tabIndex = 0;
  return el("div.tokens", { role: "group", "aria-label": "tokens; arrow keys move to the next token and read out its numbers", onkeydown: moveFocus }, spans);
}

function drawToken(token, position, facts, colouring) {
  const text = token.text.replace(/\n/g, "↵\n");
  const span = el("span.token", { tabIndex: -1, data: { position } }, text);
  if (/^<\|.*\|>$/.test(token.text)) span.classList.add("control");
  colour(span, token, facts, colouring);
  const tell = () => tellToken(token, facts, span);
  span.addEventListener("pointerenter", tell);
  span.addEventListener("focus", tell);
  span.addEventListener("pointerleave", hideToken);
  span.addEventListener("blur", hideToken);
  return span;
}

function colour(span, token, facts, colouring) {
  span.classList.toggle("dropped", colouring === "mask" && token.kept === false);
  span.classList.toggle("kept", colouring === "mask" && token.kept === true);
  span.classList.toggle("clipped", colouring === "reward" && token.clipped);
  span.style.backgroundColor = background(token, facts, colouring);
}

function background(token, facts, colouring) {
  const shade = (rgb, share) => `rgba(${rgb}, ${(0.65 * Math.min(1, share)).toFixed(3)})`;
  if (colouring === "mask") return token.kept ? shade(POSITIVE, 0.4) : "";
  if (colouring === "entropy") return isNumber(token.entropy) ? shade(UNCERTAIN, token.entropy / facts.most) : "";
  if (colouring !== "reward") return "";
  const reward = isNumber(token.reward) ? token.reward : token.ratio;
  return isNumber(reward) ? shade(reward < 0 ? NEGATIVE : POSITIVE, Math.abs(reward) / facts.range) : "";
}

/** Draws the legend of the colours, with numbers. */
function colourLegend(facts, colouring) {
  const step = (rgb, share, text) => {
    const box = el("span.key");
    box.style.backgroundColor = `rgba(${rgb}, ${0.65 * share})`;
    return [box, ` ${text} `];
  };
  const parts = {
    none: ["Hover over a token, or focus the text and use the arrow keys, for its numbers."],
    reward: [step(NEGATIVE, 1, `−${show(facts.range)} or less`), step(NEGATIVE, 0.4, ""), step(POSITIVE, 0, "0"), step(POSITIVE, 0.4, ""), step(POSITIVE, 1, `+${show(facts.range)} or more; nats, log teacher − log student`),
      facts.floor === null ? null : [el("span.token.clipped.sample", null, "abc"), ` raised to the floor, ${show(facts.floor)}`]],
    mask: [el("span.token.kept.sample", null, "abc"), " trained on ", el("span.token.dropped.sample", null, "abc"), " left out", facts.phase ? ` (${facts.phase}${facts.phase === "refinement" && facts.threshold !== null ? `: entropy of at least ${show(facts.threshold)}` : ""})` : ""],
    entropy: [step(UNCERTAIN, 0, "0"), step(UNCERTAIN, 0.5, ""), step(UNCERTAIN, 1, `${show(facts.most)} nats, most here`), facts.threshold === null ? null : `; threshold of the step ${show(facts.threshold)}`],
  };
  const how = { recorded: null, derived: " Derived from the step's floor and threshold; this run did not record it per token.", untrained: " This episode was not trained on." }[facts.how];
  return el("p.legend-line", null, parts[colouring], colouring === "mask" || colouring === "reward" ? how : null);
}

function tellToken(token, facts, span) {
  const box = document.getElementById("token-box");
  const line = (name, value) => el("div", null, el("dt", null, name), el("dd", null, value));
  const trained = token.kept === null ? "not known" : token.kept ? "yes" : facts.how === "untrained" ? "no, the episode was left out" : "no, masked";
  box.replaceChildren(el("code", null, JSON.stringify(token.text)), el("dl", null,
    line("student", `p ${probability(token.logp)}`), line("teacher", `p ${probability(token.teacher)}`),
    line("log ratio", show(token.ratio)), line("reward", `${show(token.reward)}${token.clipped ? " (clipped by the floor)" : ""}`),
    line("entropy", `${show(token.entropy)} nats`), line("trained on", trained)));
  box.hidden = false;
  const place = span.getBoundingClientRect();
  const below = place.bottom + 12 + box.offsetHeight < innerHeight;
  box.style.top = `${below ? place.bottom + 8 : Math.max(4, place.top - box.offsetHeight - 8)}px`;
  box.style.left = `${Math.max(4, Math.min(place.left, innerWidth - box.offsetWidth - 8))}px`;
}

function hideToken() {
  document.getElementById("token-box").hidden = true;
}

/* The Tab key reaches one token of a turn; the arrow keys move among its tokens. */
function moveFocus(event) {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step) return;
  const spans = [...event.currentTarget.children];
  const next = spans[spans.indexOf(document.activeElement) + step];
  if (!next) return;
  event.preventDefault();
  document.activeElement.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}
