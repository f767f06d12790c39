"use strict";
/* Makes elements. All text of a model, a tool or a data set reaches the page as a text node or
 * as one of the attributes set here, never as markup. */

/** Makes an element; strings among the children become text. A class may follow the tag: "p.quiet". */
function el(tag, properties, ...children) {
  const [name, ...classes] = tag.split(".");
  const element = document.createElement(name);
  element.classList.add(...classes);
  for (const [key, value] of Object.entries(properties || {})) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "data") Object.assign(element.dataset, value);
    else if (key.startsWith("aria-") || key === "role" || key === "for") element.setAttribute(key, value);
    else element[key] = value;
  }
  add(element, children);
  return element;
}

function add(element, children) {
  for (const child of children.flat(2)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : String(child));
  }
  return element;
}

/** Makes an SVG element. */
function svg(tag, attributes, ...children) {
  const [name, ...classes] = tag.split(".");
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  if (classes.length) element.setAttribute("class", classes.join(" "));
  for (const [key, value] of Object.entries(attributes || {})) element.setAttribute(key, value);
  return add(element, children);
}

function isNumber(value) {
  return typeof value === "number" && Number.isFinite(value);
}

/** Formats a number with at most four significant digits; "–" if there is none. */
function show(value) {
  if (!isNumber(value)) return value === null || value === undefined ? "–" : String(value);
  if (value === 0 || Number.isInteger(value)) return String(value);
  const size = Math.abs(value);
  return size < 1e-3 || size >= 1e6 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

/** Formats a probability from its logarithm. */
function probability(logp) {
  return isNumber(logp) ? show(Math.exp(logp)) : "–";
}

/** Formats a count with its noun: "1 turn", "2 turns". */
function count(number, word) {
  return `${number} ${word}${number === 1 ? "" : "s"}`;
}

const VERDICT_MARKS = { right: "✓", wrong: "✗", undecided: "?", unknown: "·" };

/** Makes a mark that shows the outcome by sign, word and colour. */
function verdictMark(verdict, long) {
  const sign = VERDICT_MARKS[verdict] || "·";
  const mark = el(`span.verdict.${verdict in VERDICT_MARKS ? verdict : "unknown"}`, { title: verdict }, sign);
  return add(mark, [long ? ` ${verdict}` : el("span.hidden", null, ` ${verdict}`)]);
}
