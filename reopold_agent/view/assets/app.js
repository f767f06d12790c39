"use strict";
/* The page's state is kept in the address after "#" (view, filters, episode, colouring); the page is drawn from it. */

const FOLLOW_MS = 2000;
const FOLLOW_FINISHED_MS = 15000;

const KEYS = [["j / k", "next, previous episode"], ["Enter", "open the marked episode"], ["Esc or u", "back to the list"], ["/", "search"],
  ["1 2 3 4", "colour tokens: none, reward, mask, entropy"], ["← →", "move along the tokens or the curve that has the focus"], ["g, o", "overview, list of episodes"], ["?", "this help"]];

class App {
  constructor(runs) {
    this.runs = runs;
    this.extraCurves = new Set();
    this.chooserOpen = false;
    this.shownRows = FIRST_ROWS;
    this.selected = "";
    this.readParams();
  }

  readParams() {
    this.params = new URLSearchParams(location.hash.slice(1));
    this.view = ["overview", "list", "episode"].includes(this.params.get("view")) ? this.params.get("view") : "overview";
    this.colouring = this.params.get("colour") in COLOURINGS ? this.params.get("colour") : "reward";
  }

  /** Returns this address with some parameters changed; empty ones are removed. */
  address(changes) {
    const params = new URLSearchParams(this.params);
    for (const [name, value] of Object.entries(changes)) {
      if (value === "" || value === null) params.delete(name);
      else params.set(name, value);
    }
    return `#${params}`;
  }

  entries() {
    if (!this.cachedEntries) this.cachedEntries = chosenEntries(this.runs, this.params);
    return this.cachedEntries;
  }

  // User actions

  open(key) { location.hash = this.address({ view: "episode", key }); }

  filter(name, value) {
    history.replaceState(null, "", this.address({ [name]: value }));
    this.readParams();
    this.cachedEntries = null;
    this.shownRows = FIRST_ROWS;
    drawRows(this);
    this.drawTop();
  }

  clearFilters() {
    location.hash = this.address(Object.fromEntries(FILTER_NAMES.map(name => [name, ""])));
  }

  showMore() {
    this.shownRows += 5 * FIRST_ROWS;
    drawRows(this);
  }

  colourBy(value) {
    history.replaceState(null, "", this.address({ colour: value }));
    this.readParams();
    document.querySelectorAll(`input[name=colour]`).forEach(input => { input.checked = input.value === value; });
    document.querySelectorAll("section.column[data-run]").forEach(section => {
      const facts = this.tokenFacts[section.dataset.run];
      if (!facts) return;
      section.querySelectorAll(".token[data-position]").forEach(span => colour(span, facts.list[span.dataset.position], facts, value));
      section.querySelector(".legend-place").replaceChildren(colourLegend(facts, value));
    });
    for (const link of document.querySelectorAll("nav.episode-bar a")) link.href = this.sameColour(link.getAttribute("href"));
  }

  sameColour(address) {
    const params = new URLSearchParams(address.slice(1));
    params.set("colour", this.colouring);
    return `#${params}`;
  }

  chooseCurve(key, chosen) {
    if (chosen) this.extraCurves.add(key);
    else this.extraCurves.delete(key);
    document.querySelector(".charts").replaceChildren(...allCharts(this));
  }

  // Drawing

  drawTop() {
    const names = this.runs.map(run => (run.facts ? run.facts.name : ""));
    const tab = (view, label) => el("a", { href: this.address({ view, key: "" }), "aria-current": (view === "list" ? this.view !== "overview" : this.view === view) ? "page" : "false" }, label);
    document.getElementById("top").replaceChildren(el("nav", { "aria-label": "pages" }, el("span.brand", null, "Reopold"), tab("overview", "Overview"), tab("list", "Episodes")),
      el("span.names", null, names.map((name, i) => [i ? " vs " : null, names.length > 1 ? el(`span.side.side-${i}`, null, "AB"[i]) : null, names.length > 1 ? " " : null, name])),
      el("button.quiet", { type: "button", title: "keyboard (?)", onclick: showHelp }, "keys"));
    document.title = `${names.join(" vs ")} – Reopold`;
  }

  async draw() {
    hideToken();
    this.readParams();
    this.cachedEntries = null;
    this.drawTop();
    const main = document.getElementById("main");
    if (this.view === "overview") main.replaceChildren(...drawOverview(this).filter(Boolean));
    else if (this.view === "list") {
      main.replaceChildren(...drawList(this));
      drawRows(this);
    } else await this.drawOne(main);
  }

  async drawOne(main) {
    const key = this.params.get("key") || "";
    const entry = allEntries(this.runs).find(e => e.key === key);
    if (!entry) {
      main.replaceChildren(el("p.note", null, `There is no episode “${key}” here. An exported file holds only some episodes.`));
      return;
    }
    this.selected = key;
    const records = await Promise.all(entry.rows.map((row, i) => (row ? this.runs[i].record(row.n) : null)));
    if (this.params.get("key") !== key || this.view !== "episode") return; // the user has opened another episode meanwhile
    this.tokenFacts = records.map((record, i) => record && tokenFacts(record, this.runs[i].metrics));
    shareScale(this.tokenFacts);
    main.replaceChildren(...drawEpisode(this, entry, records));
    scrollTo(0, 0);
  }

  /** Updates the view after new rows; keeps the focus and open menus. */
  redraw() {
    this.cachedEntries = null;
    if (this.view === "list") drawRows(this);
    else if (this.view === "overview") {
      const focused = document.activeElement && document.activeElement.closest("figure, details, input");
      if (!focused) this.draw();
    }
  }
}

function showHelp() {
  const dialog = document.getElementById("help");
  dialog.replaceChildren(el("h2", null, "Keyboard"), el("dl", null, KEYS.map(([keys, what]) => el("div", null, el("dt", null, el("kbd", null, keys)), el("dd", null, what)))),
    el("form", { method: "dialog" }, el("button", { type: "submit" }, "Close")));
  dialog.showModal();
}

function onKey(app, event) {
  const typing = event.target.closest("input:not([type=radio]):not([type=checkbox]), select, textarea");
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (event.key === "Escape" && typing) typing.blur();
  if (typing) return;
  const actions = {
    j: () => step(app, 1), k: () => step(app, -1), "?": showHelp, "/": () => search(app),
    Enter: () => { if (app.view === "list" && app.selected && event.target === document.body) app.open(app.selected); },
    Escape: () => back(app), u: () => back(app),
    g: () => { location.hash = app.address({ view: "overview", key: "" }); }, o: () => { location.hash = app.address({ view: "list", key: "" }); },
  };
  Object.keys(COLOURINGS).forEach((name, i) => { actions[i + 1] = () => { if (app.view === "episode" && app.tokenFacts) app.colourBy(name); }; });
  if (!Object.hasOwn(actions, event.key)) return;
  if (event.key !== "Enter") event.preventDefault();
  actions[event.key]();
}

function back(app) {
  if (app.view === "episode") location.hash = app.address({ view: "list", key: "" });
}

function step(app, offset) {
  const entries = app.entries();
  const place = entries.findIndex(e => e.key === app.selected);
  const next = entries[place < 0 ? (offset > 0 ? 0 : entries.length - 1) : place + offset];
  if (!next) return;
  if (app.view === "episode") return app.open(next.key);
  if (app.view !== "list") return;
  app.selected = next.key;
  if (entries.indexOf(next) >= app.shownRows) app.showMore();
  else drawRows(app);
  const row = document.querySelector("tr.selected");
  if (row) row.scrollIntoView({ block: "nearest" });
}

async function search(app) {
  if (app.view !== "list") {
    history.pushState(null, "", app.address({ view: "list", key: "" }));
    await app.draw();
  }
  document.getElementById("search").focus();
}

function showProblem(text) {
  let line = document.getElementById("problem");
  if (!line) {
    line = el("p.note", { id: "problem", role: "alert" });
    document.getElementById("top").after(line);
  }
  line.textContent = text;
  line.hidden = !text;
}

async function follow(app) {
  try {
    let changed = false;
    for (const run of app.runs) changed = (await run.refresh()) || changed;
    showProblem("");
    if (changed) app.redraw();
  } catch (error) {
    showProblem(`The viewer's server does not answer: ${error.message}. The page shows the last data it received.`);
  }
  setTimeout(() => follow(app), app.runs.some(run => run.live) ? FOLLOW_MS : FOLLOW_FINISHED_MS);
}

async function start() {
  let runs;
  try {
    runs = await openRuns();
    for (const run of runs) {
      await run.refresh(() => { document.getElementById("main").replaceChildren(el("p.quiet", null, `Reading the run … ${count(run.rows.length, "episode")}`)); });
    }
  } catch (error) {
    document.getElementById("main").replaceChildren(el("p.note", { role: "alert" }, `The run cannot be read: ${error.message}`));
    return;
  }
  const app = new App(runs);
  addEventListener("hashchange", () => { app.shownRows = FIRST_ROWS; draw(app); });
  addEventListener("popstate", () => app.readParams());
  addEventListener("keydown", event => onKey(app, event));
  addEventListener("scroll", hideToken, { passive: true });
  document.getElementById("skip").addEventListener("click", event => { event.preventDefault(); document.getElementById("main").focus(); });
  await draw(app);
  if (runs[0] instanceof ServedRun) setTimeout(() => follow(app), FOLLOW_MS);
}

async function draw(app) {
  try {
    await app.draw();
  } catch (error) {
    document.getElementById("main").replaceChildren(el("p.note", { role: "alert" }, `This could not be shown: ${error.message}`));
  }
}

start();
