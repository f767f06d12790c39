"use strict";
/* Where the page's data comes from: the server that shows a run, or the exported file itself.
 * Both kinds have `facts`, `rows` (summaries), `metrics`, `bad`, and the methods below. */

const PICTURE_NAME = /^pictures\/[\w-][\w.-]*$/;

class ServedRun {
  constructor(number) {
    this.number = number;
    this.facts = null;
    this.rows = [];
    this.metrics = [];
    this.bad = 0;
    this.generation = "";
    this.stamp = "";
    this.all = 0;
  }

  /** Fetches new data; returns whether there was any. `onPage` is called between pages. */
  async refresh(onPage) {
    let changed = false;
    for (;;) {
      const query = new URLSearchParams({
        run: this.number, rows: this.rows.length, metrics: this.metrics.length,
        generation: this.generation, facts: this.stamp,
      });
      const news = await fetchJson(`api/news?${query}`);
      const again = news.generation !== this.generation;
      changed ||= (again && this.generation !== "") || news.rows.length > 0 || news.metrics.length > 0 ||
        news.facts !== null;
      this.rows.length = news.start.rows;
      this.metrics.length = news.start.metrics;
      this.rows.push(...news.rows);
      this.metrics.push(...news.metrics);
      this.all = this.rows.length;
      this.bad = news.bad;
      this.generation = news.generation;
      this.stamp = news.facts_stamp;
      if (news.facts !== null) this.facts = news.facts;
      if (!news.more) return changed;
      if (onPage) onPage();
    }
  }

  record(number) {
    return fetchJson(`api/record?${new URLSearchParams({ run: this.number, n: number })}`);
  }

  picture(name) {
    if (!PICTURE_NAME.test(name)) return "";
    return `api/picture?${new URLSearchParams({ run: this.number, name })}`;
  }

  /** Whether the run has not finished. */
  get live() {
    return !(this.facts && (this.facts.evaluation ? this.facts.results && this.facts.results.judge
      : this.facts.summary));
  }
}

class EmbeddedRun {
  constructor(data) {
    Object.assign(this, { facts: data.facts, rows: data.rows, metrics: data.metrics, bad: data.bad });
    this.all = data.all;
    this.records = data.records;
    this.pictures = data.pictures;
    this.generation = "embedded";
    this.live = false;
  }

  async refresh() { return false; }

  async record(number) { return this.records[number]; }

  picture(name) { return Object.hasOwn(this.pictures, name) ? this.pictures[name] : ""; }
}

async function fetchJson(address) {
  const response = await fetch(address, { cache: "no-store" });
  if (!response.ok) throw new Error(await response.text());
  return response.json();
}

/** Opens the runs of this page, one or two. */
async function openRuns() {
  const data = document.getElementById("data");
  if (data) return JSON.parse(data.textContent).runs.map(run => new EmbeddedRun(run));
  const { runs } = await fetchJson("api/runs");
  return Array.from({ length: runs }, (_, number) => new ServedRun(number));
}
