// The view of the run: tiles, plots, and tables of latencies, replies, faults and losses.

import { $, ask, attempt, clock, complain, duration, group, head, make, number, octets, plural, rate, title } from "./dom.js";
import { Plots } from "./plots.js";

// The order in which a session meets the phases.
const ORDER = ["banner", "tls", "HELO", "EHLO", "LHLO", "STARTTLS", "AUTH", "MAIL", "RCPT", "DATA", "BDAT", "text", "message", "RSET", "NOOP", "QUIT", "think"];
const place = (phase) => (ORDER.includes(phase) ? ORDER.indexOf(phase) : ORDER.length);
const sum = (list, of) => list.reduce((total, each) => total + of(each), 0);

function tile(name, value, under, kind = "") {
  const lines = under.map((line) => make("dd", { className: "under" }, line));
  return make("div", { className: `fact ${kind}` }, make("dt", {}, name), make("dd", {}, value), ...lines);
}

// Replies of a class ("4", "5"), in all and by phase.
function refusals(report, digit) {
  const found = report.replies.filter((each) => String(each.code)[0] === digit);
  const phases = new Map();
  for (const each of found) phases.set(each.phase, (phases.get(each.phase) ?? 0) + each.count);
  const sorted = [...phases].sort(([one], [other]) => place(one) - place(other));
  return { count: sum(found, (each) => each.count), text: sorted.map(([phase, count]) => `${phase} ${group(count)}`).join(", ") || "none" };
}

function tiles(live, samples, name) {
  const { report } = live;
  const { accepted, unheard, refused, lost, octets: size } = report.messages;
  const runs = report.sequences.runs;
  const [missing, twice] = [sum(runs, (run) => run.missing), sum(runs, (run) => run.duplicates) + (report.sequences.message_ids?.duplicates ?? 0)];
  const faulted = sum(live.faults, (each) => each.count);
  const [permanent, temporary] = [refusals(report, "5"), refusals(report, "4")];
  const seconds = Math.max(sum(samples, (each) => each.seconds), 1);
  const of = (digit) => sum(samples, (each) => sum(Object.entries(each.codes), ([code, count]) => (code[0] === digit ? count : 0)));
  const recent = sum(samples, (each) => each.messages);
  const worst = Math.max(0, ...samples.map((each) => each.p99));
  const whole = report.latencies.message;
  const gone = [lost && `${group(lost)} in broken connections`, missing && `${group(missing)} missing`, twice && `${group(twice)} duplicates`];
  $("facts").replaceChildren(
    tile("Accepted", group(accepted), [
      `${rate(accepted / Math.max(report.seconds, 1))}/s in ${clock(report.seconds)}, ${octets(size)}`,
      `${name}: ${group(recent)}, ${rate(recent / seconds)}/s`,
    ]),
    tile("Refused (5xx)", group(permanent.count), [permanent.text, `${name}: ${group(of("5"))}`], permanent.count ? "bad" : ""),
    tile("Deferred (4xx)", group(temporary.count), [temporary.text, `${name}: ${group(of("4"))}`], temporary.count ? "warn" : ""),
    tile("Faults", group(faulted), [
      unheard ? `${group(unheard)} accepted without a readable 250` : live.has_plan ? "by the fault plan" : "no fault plan",
      `${name}: ${group(sum(samples, (each) => each.faults))}`,
    ]),
    tile("Lost", group(lost + missing), [
      gone.filter((each) => each).join(", ") || (runs.length ? "none missing, no duplicates" : report.sequences.message_ids ? "no duplicates" : "no sequence tags"),
      `${group(refused)} refused after their text`,
    ], lost + missing + twice ? "bad" : ""),
    tile("Latency p99", whole ? duration(whole.p99) : "–", [`p50 ${whole ? duration(whole.p50) : "–"}, end of message to reply`, `${name}: at most ${worst ? duration(worst) : "–"}`]),
    tile("Sessions", group(report.sessions.open), [`peak ${group(report.sessions.peak)}, ${group(report.sessions.total)} in all`, `${group(report.sessions.tls)} with TLS, ${group(report.sessions.tls_failed)} handshakes failed`]),
  );
}

function latencies(report) {
  const all = Object.entries(report.latencies).sort(([one], [other]) => place(one) - place(other));
  if (!all.length) return empty("latencies", "No command so far.");
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
  $("latencies").replaceChildren(make("div", { className: "scroll" }, make("table", {}, head(...names), make("tbody", {}, ...rows))));
}

function empty(id, text) {
  $(id).replaceChildren(make("p", { className: "empty" }, text));
}

function replies(report) {
  if (!report.replies.length) return empty("replies", "No reply so far.");
  const most = Math.max(1, ...report.replies.map((each) => each.count));
  const sorted = [...report.replies].sort((one, other) => place(one.phase) - place(other.phase) || one.code - other.code);
  const rows = sorted.map((each) => {
    const kind = String(each.code)[0];
    const fill = make("div", { className: `fill s-${{ 4: "b", 5: "c", 0: "c" }[kind] ?? "a"}` });
    fill.style.width = `max(3px, ${(each.count / most) * 100}%)`;
    const code = [each.code || "–", each.status, each.garbled].filter((word) => word).join(" ");
    return make(
      "tr", {}, title(each.phase), make("td", { className: `code code-${kind}` }, code), number(group(each.count)),
      make("td", { className: "bar-cell", "aria-hidden": "true" }, make("div", { className: "track" }, fill)),
    );
  });
  const table = make("table", {}, head(["phase"], ["reply"], ["count", "number"], ["share", "bar-cell"]), make("tbody", {}, ...rows));
  $("replies").replaceChildren(make("div", { className: "scroll" }, table));
}

function faults(live) {
  const waiting = Object.entries(live.pending).map(([phase, count]) => `${group(count)} × ${phase}`);
  const nodes = waiting.length ? [make("p", { className: "note" }, `Still to fail: ${waiting.join(", ")}`)] : [];
  if (!live.faults.length) {
    nodes.push(make("p", { className: "empty" }, live.has_plan ? "No fault was applied so far." : "This sink injects no faults."));
  } else {
    const rows = live.faults.map((each) => make("tr", {}, title(each.rule), make("td", {}, each.phase), make("td", { className: "code" }, each.action), number(group(each.count))));
    nodes.push(make("div", { className: "scroll" }, make("table", {}, head(["rule"], ["phase"], ["action"], ["count", "number"]), make("tbody", {}, ...rows))));
  }
  $("faults").replaceChildren(...nodes);
}

function sequences(report) {
  const { runs: all, unmarked, expected, source, message_ids: ids } = report.sequences;
  const byId = ids ? messageIds(ids) : [];
  if (!all.length) {
    const about = `No message so far has a sequence tag in its ${source}. penstock load writes them.`;
    $("sequences").replaceChildren(...byId, make("p", { className: "empty" }, about));
    return;
  }
  const isWhole = all.every((run) => !run.missing && !run.duplicates);
  const verdict = make("p", { className: `verdict ${isWhole ? "good" : "bad"}` }, isWhole ? "None missing, no duplicates" : "Messages are missing or duplicated");
  const rows = all.map((run) => {
    const row = make("tr", {}, title(run.run || "(no name)"), ...[run.distinct, run.missing, run.duplicates, run.out_of_order, run.highest].map((n) => number(group(n))));
    row.lastChild.classList.add("less");
    return row;
  });
  const names = [["run"], ["distinct", "number"], ["missing", "number"], ["duplicates", "number"], ["out of order", "number"], ["highest", "number less"]];
  const about = `${expected ? `${group(expected)} expected per run. ` : ""}${plural(unmarked, "message")} without a tag.`;
  const gone = all.filter((run) => run.missing).map((run) => `${run.run}: ${run.missing_examples.slice(0, 12).join(", ")}${run.missing > 12 ? " …" : ""}`);
  $("sequences").replaceChildren(
    verdict, make("div", { className: "scroll" }, make("table", {}, head(...names), make("tbody", {}, ...rows))),
    ...(gone.length ? [make("p", { className: "note" }, `Missing from ${gone.join("; ")}`)] : []), make("p", { className: "note" }, about), ...byId,
  );
}

// Duplicates of messages without tags, by their Message-ID.
function messageIds(ids) {
  const names = [["Message-IDs"], ["distinct", "number"], ["duplicates", "number"], ["without", "number"]];
  const row = make("tr", {}, title(ids.duplicates ? "duplicated" : "no duplicates"), ...[ids.distinct, ids.duplicates, ids.missing_id].map((n) => number(group(n))));
  return [make("div", { className: "scroll" }, make("table", {}, head(...names), make("tbody", {}, row)))];
}

// ---- the view

export class Run {
  constructor(isPaused, pause) {
    this.plots = new Plots($("plots"));
    this.live = null;
    this.samples = [];
    this.whole = null; // {generation, span, samples} of the whole run
    this.isAsking = false;
    this.isShown = false;
    new ResizeObserver(() => this.paint()).observe($("plots"));
    $("window").addEventListener("change", () => this.paint());
    $("pause").addEventListener("click", () => {
      pause(!isPaused());
      $("pause").setAttribute("aria-pressed", String(isPaused()));
    });
    $("reset").addEventListener("click", () => {
      if (window.confirm("Reset all counters?")) attempt(() => ask("api/receipts/reset", { method: "POST" }));
    });
  }

  take(live, samples) {
    Object.assign(this, { live, samples });
    this.paint();
  }

  show(isShown) {
    this.isShown = isShown;
    this.paint();
  }

  paint() {
    if (!this.isShown || !this.live) return;
    const { live } = this;
    const seconds = Number($("window").value);
    const samples = seconds ? this.samples : this.wholeRun();
    const last = samples[samples.length - 1]?.at ?? 0;
    const shown = seconds ? samples.filter((each) => each.at > last - seconds) : samples;
    tiles(live, shown, seconds ? `Last ${seconds / 60} min` : "Whole run");
    this.plots.show(samples, seconds);
    latencies(live.report);
    replies(live.report);
    faults(live);
    sequences(live.report);
  }

  // The sink keeps the whole run in few samples; the page follows it at their pace.
  wholeRun() {
    const { live, whole } = this;
    const isCurrent = whole && whole.generation === live.generation && live.last - whole.last < whole.span;
    if (!isCurrent && !this.isAsking) {
      this.isAsking = true;
      ask("api/history")
        .then((answer) => (this.whole = { ...answer, last: live.last }))
        .catch(complain)
        .finally(() => {
          this.isAsking = false;
          this.paint();
        });
    }
    return whole && whole.generation === live.generation ? whole.samples : this.samples;
  }
}
