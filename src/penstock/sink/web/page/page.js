// The page of a sink: follows /api/events, and shows the run or the mail. Where no stream is left for it, it asks
// /api/live once a second. No framework, nothing from other hosts.

import { $, ask } from "./dom.js";
import { Mail } from "./mail.js";
import { Plan } from "./plan.js";
import { Run } from "./run.js";

const KEEP = 600; // samples, as many as the sink keeps
const root = document.documentElement;

const state = { samples: [], last: 0, event: "", source: null, whose: null, isPaused: false };

const run = new Run(() => state.isPaused, pause);
const plan = new Plan();
const mail = new Mail();

function pause(isPaused) {
  state.isPaused = isPaused;
  follow();
  if (isPaused) tell("paused", "");
}

// Take a live report: `live.samples` follow those that were there.
function take(live) {
  // A sink that was restarted, or whose counters were reset, has other samples: the old ones are dropped.
  const whose = `${live.generation} ${live.report.started_at}`;
  if (whose !== state.whose) Object.assign(state, { samples: [], last: 0, whose });
  else if (live.last < state.last) return; // an answer that was overtaken by an event
  const twice = Math.max(0, state.last - (live.last - live.samples.length));
  state.samples = [...state.samples.slice(0, Math.max(0, state.samples.length - twice)), ...live.samples].slice(-KEEP);
  state.last = live.last;
  $("where").textContent = live.report.listen.join("  ");
  $("kept").textContent = live.keeps ? live.kept.toLocaleString("en-US") : "";
  $("control").hidden = !live.has_plan;
  $("fail").hidden = !live.fails_next;
  if (live.has_plan) plan.show();
  run.take(live, state.samples);
  mail.take(live);
  if (!state.isPaused) tell("live", "live");
}

function tell(text, className) {
  if ($("state").textContent === text) return;
  $("state").textContent = text;
  $("state").className = `state ${className}`;
}

// ---- the connection: one stream, or one timer

function follow() {
  rest();
  if (state.isPaused || document.hidden) return;
  const source = new EventSource(`api/events?after=${encodeURIComponent(state.event)}`);
  state.source = source;
  source.addEventListener("open", () => (root.dataset.connection = "events"));
  source.addEventListener("message", (event) => {
    state.event = event.lastEventId;
    take(JSON.parse(event.data));
  });
  source.addEventListener("error", () => {
    root.dataset.connection = "";
    if (source.readyState !== EventSource.CLOSED) tell("no connection to the sink", "gone"); // the browser tries again
    else if (state.source === source) poll();
  });
}

function rest() {
  state.source?.close();
  clearInterval(state.timer);
  clearTimeout(state.trial);
}

// The number of streams is bounded. One may be free in a while.
function poll() {
  rest();
  root.dataset.connection = "polling";
  state.timer = setInterval(look, 1000);
  state.trial = setTimeout(follow, 30000);
  look();
}

async function look() {
  try {
    take(await ask(`api/live?after=${state.last}`));
  } catch (error) {
    tell(error instanceof TypeError ? "no connection to the sink" : error.message, "gone");
  }
}

// A part of a URL, decoded; as it is where that is impossible.
function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

// ---- views: #/run, #/mail?q=QUERY, #/mail/ID?q=QUERY

function route() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const [view, id] = path.split("/");
  const isMail = view === "mail";
  $("run").hidden = isMail;
  $("mail").hidden = !isMail;
  for (const [name, isCurrent] of [["to-run", !isMail], ["to-mail", isMail]]) {
    if (isCurrent) $(name).setAttribute("aria-current", "page");
    else $(name).removeAttribute("aria-current");
  }
  run.show(!isMail);
  if (isMail) mail.show(decoded(id ?? ""), new URLSearchParams(query ?? "").get("q") ?? "");
  else mail.hide();
}

$("alert-close").addEventListener("click", () => ($("alert").hidden = true));
document.addEventListener("visibilitychange", follow);
window.addEventListener("hashchange", route);
route();
follow();
