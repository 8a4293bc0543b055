// The live page of a sink: follows /api/events and draws what comes, once a second. Where there is no stream left for it,
// it asks /api/live. No framework, no network but its own.
"use strict";

const KEEP = 600; // samples, as many as the sink keeps
const SVG = "http://www.w3.org/2000/svg";
const $ = (id) => document.getElementById(id);

// ---- words and numbers

const group = (n) => n.toLocaleString("en-US");
const round = (n) => (n >= 100 ? Math.round(n) : n >= 10 ? n.toFixed(1) : n.toFixed(n === 0 ? 0 : 2));

function rate(n) {
  if (n >= 1e6) return `${round(n / 1e6)} M`;
  return n >= 1e4 ? `${round(n / 1e3)} k` : group(Math.round(n));
}

function octets(n) {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (n < 1000) return `${unit === "B" ? n : round(n)} ${unit}`;
    n /= 1000;
  }
  return `${round(n)} TB`;
}

function duration(ns) {
  if (ns < 1e3) return "< 1 µs";
  if (ns < 1e6) return `${Math.round(ns / 1e3)} µs`;
  return ns < 1e9 ? `${round(ns / 1e6)} ms` : `${round(ns / 1e9)} s`;
}

function clock(seconds) {
  const whole = Math.floor(seconds);
  const parts = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  return parts.map((part) => String(part).padStart(2, "0")).join(":");
}

// Make an element: attributes, then children; a text is never taken for HTML.
function make(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key in made && typeof value !== "string") made[key] = value;
    else made.setAttribute(key === "className" ? "class" : key, value);
  }
  made.append(...children);
  return made;
}

function draw(name, attributes, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// ---- plots

const PLOTS = [
  {
    title: "Throughput",
    unit: (n) => `${rate(n)}/s`,
    series: [{ name: "messages", mark: "a", of: (s) => s.messages / s.seconds }],
  },
  {
    title: "Latency of messages, dot to reply",
    unit: duration,
    logarithmic: true,
    series: [
      { name: "p50", mark: "a", of: (s) => s.p50 || null },
      { name: "p90", mark: "b", of: (s) => s.p90 || null },
      { name: "p99", mark: "c", of: (s) => s.p99 || null },
    ],
  },
  {
    title: "Sessions",
    unit: rate,
    series: [
      { name: "open", mark: "d", of: (s) => s.sessions },
      { name: "new a second", mark: "b", of: (s) => s.connected / s.seconds },
    ],
  },
  {
    title: "Replies by code",
    unit: (n) => `${rate(n)}/s`,
    stacked: true,
    series: [
      { name: "5yz, others", mark: "c", of: (s) => codes(s, "5", "0") },
      { name: "4yz", mark: "b", of: (s) => codes(s, "4") },
      { name: "2yz, 3yz", mark: "a", of: (s) => codes(s, "2", "3") },
    ],
  },
  { title: "Octets received", unit: (n) => `${octets(n)}/s`, series: [{ name: "received", mark: "d", of: (s) => s.received / s.seconds }] },
  { title: "Faults applied", unit: (n) => `${rate(n)}/s`, series: [{ name: "faults", mark: "e", of: (s) => s.faults / s.seconds }] },
];

function codes(sample, ...classes) {
  let sum = 0;
  for (const [code, count] of Object.entries(sample.codes)) if (classes.includes(code[0])) sum += count;
  return sum / sample.seconds;
}

class Plot {
  static HEIGHT = 168;
  static LEFT = 58;
  static BOTTOM = 20;
  static TOP = 8;

  constructor(settings) {
    this.settings = settings;
    this.samples = [];
    this.cursor = null;
    this.when = make("span", { className: "when" });
    this.keys = settings.series.map((each) => {
      const value = make("b");
      return { value, node: make("span", { className: `key s-${each.mark}` }, `${each.name} `, value) };
    });
    this.svg = draw("svg", { role: "img", tabindex: "0" });
    const title = make("span", { className: "title" }, settings.title, this.when);
    this.node = make("figure", { className: "plot" }, make("figcaption", {}, title, ...this.keys.map((key) => key.node)), this.svg);
    this.svg.addEventListener("pointermove", (event) => this.point(event.offsetX));
    this.svg.addEventListener("pointerleave", () => this.look(null));
    this.svg.addEventListener("blur", () => this.look(null));
    this.svg.addEventListener("keydown", (event) => this.key(event));
  }

  show(samples, seconds) {
    this.samples = samples.slice(-seconds);
    this.seconds = seconds;
    this.paint();
  }

  point(x) {
    const width = this.svg.clientWidth - Plot.LEFT;
    const back = Math.round((1 - (x - Plot.LEFT) / width) * (this.seconds - 1));
    this.look(Math.max(0, Math.min(back, this.samples.length - 1)));
  }

  key(event) {
    const step = { ArrowLeft: 1, ArrowRight: -1, PageUp: 10, PageDown: -10 }[event.key];
    if (event.key === "Escape") this.look(null);
    else if (event.key === "Home") this.look(this.samples.length - 1);
    else if (event.key === "End") this.look(0);
    else if (step) this.look(Math.max(0, Math.min((this.cursor ?? 0) + step, this.samples.length - 1)));
    else return;
    event.preventDefault();
  }

  // The cursor counts seconds back from the newest one, so that it stays where it is while the plot moves.
  look(back) {
    this.cursor = this.samples.length ? back : null;
    this.paint();
  }

  values() {
    return this.settings.series.map((each) => this.samples.map(each.of));
  }

  scale(values, height) {
    const { stacked, logarithmic } = this.settings;
    const flat = values.flat().filter((n) => n !== null);
    if (logarithmic) {
      const low = Math.floor(Math.log10(Math.max(1e3, Math.min(...flat, 1e12))) + 1e-9);
      const least = flat.length ? low : 4;
      const most = flat.length ? Math.max(least + 1, Math.ceil(Math.log10(Math.max(...flat, 1e3)) - 1e-9)) : 7;
      const ticks = Array.from({ length: most - least + 1 }, (_, i) => 10 ** (least + i));
      return { ticks, y: (n) => height * (1 - (Math.log10(Math.max(n, 10 ** least)) - least) / (most - least)) };
    }
    const sums = stacked ? this.samples.map((_, i) => values.reduce((sum, row) => sum + row[i], 0)) : flat;
    const top = Math.max(1, ...sums);
    const power = 10 ** Math.floor(Math.log10(top / 4));
    const step = Math.max(1, [1, 2, 5, 10].find((each) => each * power * 4 >= top) * power);
    const ticks = [];
    for (let n = 0; n < top + step * 0.999; n += step) ticks.push(n);
    const most = ticks[ticks.length - 1];
    return { ticks, y: (n) => height * (1 - n / most) };
  }

  paint() {
    const width = Math.max(160, this.svg.clientWidth || 400);
    const inner = width - Plot.LEFT - 4;
    const height = Plot.HEIGHT - Plot.TOP - Plot.BOTTOM;
    const values = this.values();
    const { ticks, y } = this.scale(values, height);
    const count = this.samples.length;
    const x = (i) => Plot.LEFT + inner * (1 - (count - 1 - i) / (this.seconds - 1));
    const up = (n) => Plot.TOP + y(n);
    const nodes = [];
    for (const tick of ticks) {
      nodes.push(draw("line", { class: tick === ticks[0] ? "base" : "grid", x1: Plot.LEFT, x2: width - 4, y1: up(tick), y2: up(tick) }));
      nodes.push(draw("text", { x: Plot.LEFT - 8, y: up(tick) + 4, "text-anchor": "end" }, this.settings.unit(tick).replace(".00 ", " ").replace(".0 ", " ")));
    }
    for (const [share, anchor] of [[0, "start"], [0.5, "middle"], [1, "end"]]) {
      const back = (1 - share) * this.seconds;
      const label = back ? `−${back >= 120 ? `${back / 60} min` : `${back} s`}` : "now";
      nodes.push(draw("text", { x: Plot.LEFT + inner * share, y: Plot.HEIGHT - 4, "text-anchor": anchor }, label));
    }
    if (count) this.lines(nodes, values, x, up);
    const back = this.cursor;
    const at = count - 1 - (back ?? 0);
    if (back !== null && count) {
      nodes.push(draw("line", { class: "cursor", x1: x(at), x2: x(at), y1: Plot.TOP, y2: Plot.TOP + height }));
      if (!this.settings.stacked) {
        values.forEach((row, i) => {
          if (row[at] !== null) nodes.push(draw("circle", { class: `dot s-${this.settings.series[i].mark}`, cx: x(at), cy: up(row[at]), r: 4 }));
        });
      }
    }
    this.svg.setAttribute("viewBox", `0 0 ${width} ${Plot.HEIGHT}`);
    this.svg.replaceChildren(...nodes);
    const shown = values.map((row) => (count && row[at] !== null ? this.settings.unit(row[at]) : "–"));
    this.keys.forEach((key, i) => (key.value.textContent = shown[i]));
    this.when.textContent = back ? `${back} s ago` : count ? "now" : "no sample yet";
    const said = this.settings.series.map((each, i) => `${each.name} ${shown[i]}`).join(", ");
    this.svg.setAttribute("aria-label", `${this.settings.title}, ${this.when.textContent}: ${said}`);
  }

  lines(nodes, values, x, up) {
    const { series, stacked } = this.settings;
    let below = this.samples.map(() => 0);
    series.forEach((each, i) => {
      const mark = `s-${each.mark}`;
      if (stacked) {
        const above = below.map((n, at) => n + values[i][at]);
        const there = above.map((n, at) => `${x(at).toFixed(1)},${up(n).toFixed(1)}`);
        const back = below.map((n, at) => `${x(at).toFixed(1)},${up(n).toFixed(1)}`).reverse();
        nodes.push(draw("polygon", { class: `stack ${mark}`, points: [...there, ...back].join(" ") }));
        // A few refusals among thousands of replies are what one looks for: they have a line whatever their height.
        for (const run of runs(values[i].map((n) => n || null))) {
          const edge = run.map((at) => there[at]);
          nodes.push(draw("polyline", { class: `line solid ${mark}`, points: (run.length > 1 ? edge : [edge[0], edge[0]]).join(" ") }));
        }
        below = above;
        return;
      }
      for (const run of runs(values[i])) {
        const points = run.map((at) => `${x(at).toFixed(1)},${up(values[i][at]).toFixed(1)}`);
        const foot = Plot.HEIGHT - Plot.BOTTOM;
        if (series.length === 1 || i === 0) {
          const area = [`${x(run[0]).toFixed(1)},${foot}`, ...points, `${x(run[run.length - 1]).toFixed(1)},${foot}`];
          nodes.push(draw("polygon", { class: `area ${mark}`, points: area.join(" ") }));
        }
        if (run.length === 1) nodes.push(draw("circle", { class: `dot ${mark}`, cx: x(run[0]), cy: up(values[i][run[0]]), r: 2.5 }));
        else nodes.push(draw("polyline", { class: `line ${mark}`, points: points.join(" ") }));
      }
    });
  }
}

// The stretches of a row that have values.
function runs(row) {
  const found = [];
  row.forEach((value, at) => {
    if (value === null) return;
    const last = found[found.length - 1];
    if (last && last[last.length - 1] === at - 1) last.push(at);
    else found.push([at]);
  });
  return found;
}

// ---- numbers and tables

function fact(name, value, unit, under, isBad = false) {
  const dd = make("dd", {}, value, unit ? make("small", {}, ` ${unit}`) : "");
  return make("div", { className: isBad ? "fact bad" : "fact" }, make("dt", {}, name), dd, make("dd", { className: "under" }, under));
}

function facts(live, sample) {
  const { report } = live;
  const lost = report.sequences.runs.reduce((sum, run) => sum + run.missing, 0);
  const twice = report.sequences.runs.reduce((sum, run) => sum + run.duplicates, 0);
  const applied = live.faults.reduce((sum, each) => sum + each.count, 0);
  const { accepted, unheard, refused, lost: broken } = report.messages;
  const taken = accepted + unheard;
  const trouble = refused + broken + unheard;
  const said = `${group(refused)} refused, ${group(broken)} lost${unheard ? `, ${group(unheard)} unheard` : ""}`;
  $("facts").replaceChildren(
    fact("Messages a second", sample ? rate(sample.messages / sample.seconds) : "–", "/s", `${rate(taken / Math.max(report.seconds, 1))}/s since the start`),
    fact("Messages", group(taken), "", `${octets(report.messages.octets)} in ${clock(report.seconds)}`),
    fact("Open sessions", group(report.sessions.open), "", `peak ${group(report.sessions.peak)}, ${group(report.sessions.total)} in all`),
    fact("p99, dot to reply", sample?.p99 ? duration(sample.p99) : "–", "", `p50 ${sample?.p50 ? duration(sample.p50) : "–"}`),
    fact("Not accepted", group(trouble), "", said, trouble > 0),
    fact("Missing or twice", group(lost + twice), "", report.sequences.runs.length ? `${group(lost)} missing, ${group(twice)} twice` : "no marked messages", lost + twice > 0),
    fact("Faults", group(applied), "", live.has_plan ? `${group(sample ? sample.faults : 0)} in the last second` : "no fault plan"),
  );
}

function head(...names) {
  const cells = names.map(([name, kind]) => make("th", { scope: "col", className: kind ?? "" }, name));
  return make("thead", {}, make("tr", {}, ...cells));
}

// The order in which a session meets them.
const ORDER = ["banner", "tls", "HELO", "EHLO", "LHLO", "STARTTLS", "AUTH", "MAIL", "RCPT", "DATA", "BDAT", "text", "message", "RSET", "NOOP", "QUIT", "think"];
const place = (phase) => (ORDER.includes(phase) ? ORDER.indexOf(phase) : ORDER.length);

const number = (text) => make("td", { className: "number" }, text);
const title = (text, className = "") => make("th", { scope: "row", className }, text);

function latencies(report) {
  const all = Object.entries(report.latencies).sort(([one], [other]) => place(one) - place(other));
  const low = Math.log10(Math.max(1e3, Math.min(1e9, ...all.map(([, each]) => each.p50 || 1e9))) * 0.8);
  const high = Math.log10(Math.max(1e4, ...all.map(([, each]) => each.p99)) * 1.2);
  const where = (ns) => Math.max(0, Math.min(100, ((Math.log10(Math.max(ns, 1)) - low) / (high - low)) * 100));
  const rows = all.map(([phase, each]) => {
    const range = make("div", { className: "range" });
    for (const [from, to, className] of [[each.p50, each.p99, ""], [each.p50, each.p90, "core"]]) {
      const bar = make("i", { className });
      bar.style.left = `${where(from)}%`;
      bar.style.width = `max(4px, ${where(to) - where(from)}%)`;
      range.append(bar);
    }
    const cells = [group(each.count), duration(each.p50), duration(each.p90), duration(each.p99), duration(each.max)];
    const row = make("tr", {}, title(phase), ...cells.map(number), make("td", { className: "bar-cell", "aria-hidden": "true" }, range));
    row.children[3].classList.add("less");
    return row;
  });
  const names = [["phase"], ["count", "number"], ["p50", "number"], ["p90", "number less"], ["p99", "number"], ["max", "number"], ["p50 – p90 – p99", "bar-cell"]];
  $("latencies").replaceChildren(head(...names), make("tbody", {}, ...rows));
}

function replies(report) {
  const most = Math.max(1, ...report.replies.map((each) => each.count));
  const sorted = [...report.replies].sort((one, other) => place(one.phase) - place(other.phase) || one.code - other.code);
  const rows = sorted.map((each) => {
    const kind = String(each.code)[0];
    const fill = make("div", { className: `fill s-${{ 4: "b", 5: "c", 0: "c" }[kind] ?? "a"}` });
    fill.style.width = `max(3px, ${(each.count / most) * 100}%)`;
    const said = [each.code || "–", each.status, each.garbled].filter((word) => word).join(" ");
    return make(
      "tr", {}, title(each.phase), make("td", { className: `code code-${kind}` }, said), number(group(each.count)),
      make("td", { className: "bar-cell", "aria-hidden": "true" }, make("div", { className: "track" }, fill)),
    );
  });
  $("replies").replaceChildren(head(["to"], ["code"], ["count", "number"], ["share", "bar-cell"]), make("tbody", {}, ...rows));
}

function sequences(report) {
  const { runs: all, unmarked, expected, source } = report.sequences;
  if (!all.length) {
    const why = `No message so far has a mark in its ${source}; penstock load writes one.`;
    $("sequences").replaceChildren(make("p", { className: "empty" }, why));
    return;
  }
  const isWhole = all.every((run) => !run.missing && !run.duplicates);
  const verdict = make("p", { className: `verdict ${isWhole ? "good" : "bad"}` }, isWhole ? "Nothing missing, nothing twice" : "Not whole");
  const rows = all.map((run) => {
    const counts = [run.distinct, run.missing, run.duplicates, run.out_of_order, run.highest];
    const row = make("tr", {}, title(run.run || "(no name)"), ...counts.map((n) => number(group(n))));
    row.lastChild.classList.add("less");
    return row;
  });
  const names = [["run"], ["numbers", "number"], ["missing", "number"], ["twice", "number"], ["out of order", "number"], ["highest", "number less"]];
  const about = `${expected ? `${group(expected)} expected in a run. ` : ""}${group(unmarked)} messages without a mark.`;
  const table = make("div", { className: "scroll" }, make("table", {}, head(...names), make("tbody", {}, ...rows)));
  const gone = all.filter((run) => run.missing).map((run) => `${run.run}: ${run.missing_examples.slice(0, 12).join(", ")}${run.missing > 12 ? " …" : ""}`);
  const examples = gone.length ? [make("p", { className: "note" }, `Missing of ${gone.join("; ")}`)] : [];
  $("sequences").replaceChildren(verdict, table, ...examples, make("p", { className: "note" }, about));
}

function faults(live) {
  $("control").hidden = !live.has_plan;
  const waiting = Object.entries(live.pending).map(([phase, count]) => `${group(count)} × ${phase}`);
  const nodes = waiting.length ? [make("p", { className: "note" }, `Still to fail: ${waiting.join(", ")}`)] : [];
  if (!live.faults.length) {
    nodes.push(make("p", { className: "empty" }, live.has_plan ? "No fault was applied so far." : "This sink has no fault plan: start it with --faults PLAN.toml."));
  } else {
    const rows = live.faults.map((each) => make("tr", {}, title(each.rule), make("td", {}, each.phase), make("td", { className: "code" }, each.action), number(group(each.count))));
    nodes.push(make("div", { className: "scroll" }, make("table", {}, head(["rule"], ["phase"], ["what was done"], ["count", "number"]), make("tbody", {}, ...rows))));
  }
  $("faults").replaceChildren(...nodes);
}

// ---- messages

const shown = { query: "", list: [], isSearched: false };

function when(seconds) {
  const at = new Date(seconds * 1000);
  const time = at.toLocaleTimeString("en-GB");
  return at.toDateString() === new Date().toDateString() ? time : `${at.toLocaleDateString("en-CA")} ${time}`;
}

function line(message) {
  const to = message.recipients.join(", ") || "–";
  const subject = message.subject ? [message.subject] : [make("span", { className: "none" }, "no subject")];
  const button = make(
    "button", { type: "button", "data-id": message.id }, make("span", { className: "when" }, when(message.received_at)),
    make("span", { className: "from", title: message.sender }, message.sender || "<>"), make("span", { className: "to", title: to }, to),
    make("span", { className: "subject" }, ...subject), make("span", { className: "size" }, octets(message.size)),
  );
  button.addEventListener("click", () => open(message.id));
  return make("li", {}, button);
}

function list(messages) {
  const same = messages.length === shown.list.length && messages.every((each, i) => each.id === shown.list[i].id);
  if (same) return;
  const focused = document.activeElement?.dataset?.id;
  shown.list = messages;
  $("list").replaceChildren(...messages.map(line));
  if (focused) $("list").querySelector(`[data-id="${CSS.escape(focused)}"]`)?.focus();
}

function kept(live) {
  $("kept").textContent = live.keeps ? `${group(live.kept)} of at most ${group(live.keeps)} kept` : "";
  $("search").hidden = $("forget").hidden = !live.keeps;
  $("more").hidden = !live.keeps || live.kept <= shown.list.length || shown.isSearched;
  if (!live.keeps) {
    $("messages-said").textContent = "Messages are counted and not kept. To see them here, start the sink with --keep last:1000.";
  } else if (!shown.isSearched && !shown.isOlder) {
    $("messages-said").textContent = live.messages.length ? "" : "No message so far.";
    list(live.messages);
  }
}

async function ask(path, options = {}) {
  const answer = await fetch(path, { ...options, cache: "no-store" });
  const body = answer.headers.get("content-type")?.startsWith("application/json") ? await answer.json() : await answer.text();
  if (!answer.ok) throw new Error(body.error ?? answer.statusText);
  return body;
}

async function search() {
  const query = $("query").value.trim();
  shown.query = query;
  shown.isSearched = query !== "";
  shown.isOlder = false;
  if (!query) {
    if (state.live) kept(state.live);
    return;
  }
  try {
    const found = await ask(`/api/messages?limit=100&q=${encodeURIComponent(query)}`);
    if (query !== shown.query) return;
    list(found.messages);
    const count = found.messages.length;
    $("messages-said").textContent = count ? `${count === 100 ? "The newest 100" : group(count)} found` : "Nothing found";
  } catch (error) {
    $("messages-said").textContent = error.message;
  }
}

async function older() {
  const last = shown.list[shown.list.length - 1];
  const found = await ask(`/api/messages?limit=50${last ? `&before=${encodeURIComponent(last.id)}` : ""}`);
  shown.isOlder = true;
  list([...shown.list, ...found.messages]);
  $("messages-said").textContent = "Older messages are shown, new ones wait: clear the search to go on.";
  if (!found.messages.length) $("more").hidden = true;
}

function part(message, each) {
  const path = `/api/messages/${encodeURIComponent(message.id)}/parts/${each.number}`;
  const name = each.filename || { text: "text", html: "HTML, without programs and without the network" }[each.shown_as] || "attachment";
  const about = make("p", {}, `${each.type} · ${name} · ${octets(each.size)}`, make("a", { href: path, target: "_blank", rel: "noopener", download: each.filename || `part-${each.number}` }, "save"));
  const inside = {
    text: () => make("pre", { tabindex: "0" }, each.text),
    html: () => make("iframe", { sandbox: "", src: path, title: `HTML part ${each.number}`, referrerpolicy: "no-referrer" }),
    image: () => make("img", { src: path, alt: name }),
  }[each.shown_as];
  return make("div", { className: "part" }, about, ...(inside ? [inside()] : []));
}

async function open(id) {
  const viewer = $("viewer");
  try {
    const message = await ask(`/api/messages/${encodeURIComponent(id)}`);
    $("viewer-title").textContent = message.subject || "(no subject)";
    const envelope = [["From", message.sender || "<>"], ["To", message.recipients.join(", ")], ["Received", when(message.received_at)], ["Size", `${octets(message.size)}${message.is_cut ? ", its beginning is kept" : ""}`], ["Id", message.id]];
    const table = make("table", {}, make("tbody", {}, ...envelope.map(([name, value]) => make("tr", {}, title(name), make("td", {}, value)))));
    const fields = make("table", {}, make("tbody", {}, ...message.headers.map(([name, value]) => make("tr", {}, title(name), make("td", {}, value)))));
    const parts = message.parts.filter((each) => each.shown_as !== "multipart").map((each) => part(message, each));
    const raw = make("a", { href: `/api/messages/${encodeURIComponent(id)}/raw`, target: "_blank", rel: "noopener" }, "the text as it was received");
    const trouble = message.trouble ? [make("p", { className: "said bad" }, `It can not be read: ${message.trouble}`)] : [];
    $("viewer-body").replaceChildren(table, ...trouble, ...parts, make("details", {}, make("summary", {}, `Header, ${message.headers.length} fields`), make("div", { className: "scroll" }, fields)), make("p", { className: "note" }, raw));
  } catch (error) {
    $("viewer-title").textContent = "Not there";
    $("viewer-body").replaceChildren(make("p", { className: "said bad" }, error.message));
  }
  if (!viewer.open) viewer.showModal();
}

// ---- faults, changed

function said(text, isGood) {
  $("control-said").textContent = text;
  $("control-said").className = `said ${isGood ? "good" : "bad"}`;
}

async function change(path, options, done) {
  try {
    await ask(path, options);
    said(done, true);
  } catch (error) {
    said(error.message, false);
  }
}

function control() {
  const phases = ["rcpt", "mail", "data", "dot", "ehlo", "banner", "starttls", "auth", "rset", "noop", "vrfy", "expn", "help", "quit"];
  $("fail").elements.phase.append(...phases.map((phase) => make("option", { value: phase }, phase)));
  $("fail").addEventListener("submit", (event) => {
    event.preventDefault();
    const { phase, reply, count } = event.target.elements;
    const wanted = { phase: phase.value, reply: reply.value, count: Number(count.value) };
    change("/api/fail-next", { method: "POST", body: JSON.stringify(wanted) }, `The next ${wanted.count} in ${wanted.phase} will hear ${wanted.reply}`);
  });
  $("plan").addEventListener("submit", (event) => {
    event.preventDefault();
    change("/api/plan", { method: "PUT", body: $("plan-text").value }, "The plan is in force");
  });
  const load = async () => ($("plan-text").value = await ask("/api/plan"));
  $("plan-load").addEventListener("click", load);
  $("control").addEventListener("toggle", () => {
    if ($("control").open && !$("plan-text").value) load();
  });
}

// ---- the second

const state = { samples: [], last: 0, event: "", whose: null, live: null, isPaused: false, plots: PLOTS.map((each) => new Plot(each)) };

function take(live) {
  // A sink that was started anew, or whose counters were, has other samples: what is known of the old ones is forgotten.
  const whose = `${live.generation} ${live.report.started_at}`;
  if (whose !== state.whose) {
    state.samples = [];
    state.last = 0;
    state.whose = whose;
  } else if (live.last < state.last) {
    return; // an answer that was overtaken by an event
  }
  const twice = Math.max(0, state.last - (live.last - live.samples.length));
  state.samples = [...state.samples.slice(0, Math.max(0, state.samples.length - twice)), ...live.samples].slice(-KEEP);
  state.last = live.last;
  state.live = live;
  paint();
  if (!state.isPaused) tell("live", "live");
}

function paint() {
  const { live, samples } = state;
  const sample = samples[samples.length - 1];
  $("where").textContent = live.report.listen.join("  ");
  facts(live, sample);
  plots();
  latencies(live.report);
  replies(live.report);
  sequences(live.report);
  faults(live);
  kept(live);
}

function plots() {
  const seconds = Number($("window").value);
  for (const plot of state.plots) plot.show(state.samples, seconds);
}

function tell(text, className) {
  if ($("state").textContent === text) return;
  $("state").textContent = text;
  $("state").className = `state ${className}`;
}

// One stream, or one timer: what was there before ends.
function follow() {
  rest();
  if (state.isPaused || document.hidden) return;
  const source = new EventSource(`/api/events?after=${encodeURIComponent(state.event)}`);
  state.source = source;
  source.addEventListener("message", (event) => {
    state.event = event.lastEventId;
    take(JSON.parse(event.data));
  });
  source.addEventListener("error", () => {
    if (source.readyState !== EventSource.CLOSED) tell("no connection to the sink", "gone"); // the browser tries again
    else if (state.source === source) poll();
  });
}

function rest() {
  state.source?.close();
  clearInterval(state.timer);
  clearTimeout(state.trial);
}

// There are only so many streams. Somebody may have left in a while.
function poll() {
  rest();
  state.timer = setInterval(look, 1000);
  state.trial = setTimeout(follow, 30000);
  look();
}

async function look() {
  try {
    take(await ask(`/api/live?after=${state.last}`));
  } catch (error) {
    tell(error instanceof TypeError ? "no connection to the sink" : error.message, "gone");
  }
}

function begin() {
  $("plots").append(...state.plots.map((plot) => plot.node));
  new ResizeObserver(() => plots()).observe($("plots"));
  $("window").addEventListener("change", plots);
  $("pause").addEventListener("click", () => {
    state.isPaused = !state.isPaused;
    $("pause").setAttribute("aria-pressed", String(state.isPaused));
    follow();
    if (state.isPaused) tell("paused", "");
  });
  $("reset").addEventListener("click", async () => {
    if (window.confirm("Start all counters over?")) {
      await ask("/api/receipts/reset", { method: "POST" });
      look();
    }
  });
  $("forget").addEventListener("click", async () => {
    if (window.confirm("Forget all kept messages?")) {
      await ask("/api/messages", { method: "DELETE" });
      look();
    }
  });
  let timer;
  $("query").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(search, 250);
  });
  $("search").addEventListener("submit", (event) => {
    event.preventDefault();
    search();
  });
  $("more").addEventListener("click", older);
  $("viewer-close").addEventListener("click", () => $("viewer").close());
  $("viewer").addEventListener("click", (event) => {
    if (event.target === $("viewer")) $("viewer").close();
  });
  document.addEventListener("visibilitychange", follow);
  control();
  follow();
}

begin();
