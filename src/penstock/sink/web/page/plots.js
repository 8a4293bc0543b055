// Plots of the samples: one SVG each, drawn anew with every sample.

import { clock, draw, duration, make, octets, rate } from "./dom.js";

const codes = (sample, ...classes) => {
  let sum = 0;
  for (const [code, count] of Object.entries(sample.codes)) if (classes.includes(code[0])) sum += count;
  return sum / sample.seconds;
};

const PLOTS = [
  {
    title: "Messages accepted",
    unit: (n) => `${rate(n)}/s`,
    series: [{ name: "messages", mark: "a", of: (s) => s.messages / s.seconds }],
  },
  {
    title: "Latency, end of message to reply",
    unit: duration,
    isLatency: true,
    series: [
      { name: "p50", mark: "a", of: (s) => s.p50 || null },
      { name: "p90", mark: "b", of: (s) => s.p90 || null },
      { name: "p99", mark: "c", of: (s) => s.p99 || null },
    ],
  },
  {
    title: "Replies by class",
    unit: (n) => `${rate(n)}/s`,
    isStacked: true,
    series: [
      { name: "5xx, broken", mark: "c", of: (s) => codes(s, "5", "0") },
      { name: "4xx", mark: "b", of: (s) => codes(s, "4") },
      { name: "2xx, 3xx", mark: "a", of: (s) => codes(s, "2", "3") },
    ],
  },
  { title: "Faults applied", unit: (n) => `${rate(n)}/s`, series: [{ name: "faults", mark: "e", of: (s) => s.faults / s.seconds }] },
  {
    title: "Sessions",
    unit: rate,
    series: [
      { name: "open", mark: "d", of: (s) => s.sessions },
      { name: "new per second", mark: "b", of: (s) => s.connected / s.seconds },
    ],
  },
  { title: "Octets received", unit: (n) => `${octets(n)}/s`, series: [{ name: "received", mark: "d", of: (s) => s.received / s.seconds }] },
];

const HEIGHT = 168;
const BOTTOM = 20;
const TOP = 8;
const RIGHT = 12;
const SHORTEST = 10; // seconds of an axis at least
const STEPS = [5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400];

class Plot {
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
    const caption = make("span", { className: "title" }, settings.title, this.when);
    this.node = make("figure", { className: "plot" }, make("figcaption", {}, caption, ...this.keys.map((key) => key.node)), this.svg);
    this.svg.addEventListener("pointermove", (event) => this.point(event.offsetX));
    this.svg.addEventListener("pointerleave", () => this.look(null));
    this.svg.addEventListener("blur", () => this.look(null));
    this.svg.addEventListener("keydown", (event) => this.key(event));
  }

  // Show the samples of a time: `from` and `to` are seconds since the start.
  show(samples, from, to) {
    Object.assign(this, { samples, from, to });
    this.paint();
  }

  point(x) {
    if (!this.samples.length) return;
    const at = this.from + ((x - this.left) / this.inner) * (this.to - this.from);
    const distances = this.samples.map((sample) => Math.abs(sample.at - at));
    this.look(this.samples.length - 1 - distances.indexOf(Math.min(...distances)));
  }

  key(event) {
    const step = { ArrowLeft: 1, ArrowRight: -1, PageUp: 10, PageDown: -10 }[event.key];
    const last = this.samples.length - 1;
    if (event.key === "Escape") this.look(null);
    else if (event.key === "Home") this.look(last);
    else if (event.key === "End") this.look(0);
    else if (step) this.look(Math.max(0, Math.min((this.cursor ?? 0) + step, last)));
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  // The cursor counts samples back from the newest one, so that it stays where it is while the plot moves.
  look(back) {
    this.cursor = this.samples.length ? back : null;
    this.paint();
  }

  // Choose the ticks of the vertical axis, and what maps a value to its height.
  scale(values, height) {
    const flat = values.flat().filter((n) => n !== null);
    if (this.settings.isLatency && flat.length && Math.max(...flat) > 20 * Math.min(...flat)) return logarithmic(flat, height);
    const sums = this.settings.isStacked ? this.samples.map((_, i) => values.reduce((sum, row) => sum + row[i], 0)) : flat;
    const least = this.settings.isLatency ? 1e4 : 1; // fewer than one has no meaning, nor have less than 10 µs
    const top = Math.max(least, ...sums);
    const power = 10 ** Math.floor(Math.log10(top / 3));
    const step = Math.max(this.settings.isLatency ? 5e3 : 1, [1, 2, 5, 10].find((each) => each * power * 3 >= top) * power);
    const ticks = [];
    for (let n = 0; n < top + step * 0.999; n += step) ticks.push(n);
    const most = ticks[ticks.length - 1];
    return { ticks, y: (n) => height * (1 - n / most) };
  }

  paint() {
    const width = Math.max(160, this.svg.clientWidth || 400);
    const height = HEIGHT - TOP - BOTTOM;
    const values = this.settings.series.map((each) => this.samples.map(each.of));
    const { ticks, y } = this.scale(values, height);
    const labels = ticks.map((tick) => this.label(tick));
    this.left = 14 + 6.3 * Math.max(...labels.map((label) => label.length));
    this.inner = width - this.left - RIGHT;
    const x = (seconds) => this.left + this.inner * ((seconds - this.from) / (this.to - this.from || 1));
    const up = (n) => TOP + y(n);
    const nodes = [];
    ticks.forEach((tick, i) => {
      nodes.push(draw("line", { class: i ? "grid" : "base", x1: this.left, x2: width - RIGHT, y1: up(tick), y2: up(tick) }));
      nodes.push(draw("text", { x: this.left - 8, y: up(tick) + 4, "text-anchor": "end" }, labels[i]));
    });
    nodes.push(...this.times(x, width));
    if (this.samples.length) this.lines(nodes, values, (i) => x(this.samples[i].at).toFixed(1), (n) => up(n).toFixed(1));
    const at = this.samples.length - 1 - (this.cursor ?? 0);
    if (this.cursor !== null && this.samples[at]) {
      const place = x(this.samples[at].at);
      nodes.push(draw("line", { class: "cursor", x1: place, x2: place, y1: TOP, y2: TOP + height }));
      if (!this.settings.isStacked) {
        values.forEach((row, i) => {
          if (row[at] !== null) nodes.push(draw("circle", { class: `dot s-${this.settings.series[i].mark}`, cx: place, cy: up(row[at]), r: 4 }));
        });
      }
    }
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.svg.replaceChildren(...nodes);
    this.tell(values, at);
  }

  label(tick) {
    return this.settings.unit(tick).replace("< 1 µs", "0").replace(/\.0+(?= |\/|$)/, "").replace(/(\.\d)0(?= |$)/, "$1");
  }

  // The horizontal axis: time since the start.
  times(x, width) {
    const most = Math.max(2, Math.floor(this.inner / 70));
    const step = STEPS.find((each) => (this.to - this.from) / each <= most) ?? STEPS[STEPS.length - 1];
    const nodes = [];
    for (let at = Math.ceil(Math.max(0, this.from) / step) * step; at <= this.to; at += step) {
      if (x(at) > width - RIGHT - 8 && at > 0) continue;
      nodes.push(draw("text", { x: x(at), y: HEIGHT - 4, "text-anchor": at === 0 ? "start" : "middle" }, clock(at)));
    }
    return nodes;
  }

  // Say in words what is under the cursor, else the newest values.
  tell(values, at) {
    const sample = this.samples[at];
    const shown = values.map((row) => (sample && row[at] !== null ? this.settings.unit(row[at]) : "–"));
    this.keys.forEach((key, i) => (key.value.textContent = shown[i]));
    const isNow = !this.cursor;
    this.when.textContent = !sample ? "no sample yet" : isNow ? "now" : `at ${clock(sample.at)}`;
    const said = this.settings.series.map((each, i) => `${each.name} ${shown[i]}`).join(", ");
    this.svg.setAttribute("aria-label", `${this.settings.title}, ${this.when.textContent}: ${said}`);
  }

  lines(nodes, values, x, up) {
    const { series, isStacked } = this.settings;
    let below = this.samples.map(() => 0);
    series.forEach((each, i) => {
      const mark = `s-${each.mark}`;
      if (isStacked) {
        const above = below.map((n, at) => n + values[i][at]);
        const edge = above.map((n, at) => `${x(at)},${up(n)}`);
        const foot = below.map((n, at) => `${x(at)},${up(n)}`).reverse();
        nodes.push(draw("polygon", { class: `stack ${mark}`, points: [...edge, ...foot].join(" ") }));
        // A few refusals among thousands of replies are what one looks for: they have a line whatever their height.
        for (const run of runs(values[i].map((n) => n || null))) {
          const points = run.map((at) => edge[at]);
          nodes.push(draw("polyline", { class: `line solid ${mark}`, points: (run.length > 1 ? points : [points[0], points[0]]).join(" ") }));
        }
        below = above;
        return;
      }
      for (const run of runs(values[i])) {
        const points = run.map((at) => `${x(at)},${up(values[i][at])}`);
        const foot = HEIGHT - BOTTOM;
        if (i === 0) {
          const area = [`${x(run[0])},${foot}`, ...points, `${x(run[run.length - 1])},${foot}`];
          nodes.push(draw("polygon", { class: `area ${mark}`, points: area.join(" ") }));
        }
        if (run.length === 1) nodes.push(draw("circle", { class: `dot ${mark}`, cx: x(run[0]), cy: up(values[i][run[0]]), r: 2.5 }));
        else nodes.push(draw("polyline", { class: `line ${mark}`, points: points.join(" ") }));
      }
    });
  }
}

// An axis from the step below the least value to the one above the greatest, in steps of 1, 2 and 5.
function logarithmic(values, height) {
  const steps = [];
  for (let power = 1e3; power <= 1e13; power *= 10) steps.push(power, 2 * power, 5 * power);
  const low = Math.max(0, steps.findLastIndex((step) => step <= Math.min(...values)));
  const high = Math.max(low + 1, steps.findIndex((step) => step >= Math.max(...values)));
  const [from, to] = [Math.log10(steps[low]), Math.log10(steps[high])];
  let ticks = steps.slice(low, high + 1);
  if (ticks.length > 5) ticks = ticks.filter((tick, i) => String(tick)[0] === "1" || i === 0 || i === ticks.length - 1);
  return { ticks, y: (n) => height * (1 - (Math.log10(Math.max(n, steps[low])) - from) / (to - from)) };
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

export class Plots {
  constructor(place) {
    this.all = PLOTS.map((each) => new Plot(each));
    place.append(...this.all.map((plot) => plot.node));
  }

  // Show the samples of the last seconds, or of the whole run when that is 0; a short run uses all the space.
  show(samples, seconds) {
    const last = samples[samples.length - 1]?.at ?? 0;
    const from = seconds && last > seconds ? last - seconds : 0;
    const shown = samples.filter((sample) => sample.at > from);
    for (const plot of this.all) plot.show(shown, from, Math.max(last, SHORTEST));
  }
}
