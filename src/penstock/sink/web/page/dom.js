// Elements, numbers and requests: what the modules of the page share.

const SVG = "http://www.w3.org/2000/svg";

export const $ = (id) => document.getElementById(id);

// Make an element: attributes, then children; text is never parsed as HTML.
export function make(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key in made && typeof value !== "string") made[key] = value;
    else made.setAttribute(key === "className" ? "class" : key, value);
  }
  made.append(...children);
  return made;
}

export function draw(name, attributes, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// ---- numbers

export const group = (n) => n.toLocaleString("en-US");
const round = (n) => (n >= 100 ? Math.round(n) : n >= 10 ? n.toFixed(1) : n.toFixed(n === 0 ? 0 : 2));

export function rate(n) {
  if (n >= 1e6) return `${round(n / 1e6)} M`;
  if (n >= 1e4) return `${round(n / 1e3)} k`;
  return n > 0 && n < 10 && n % 1 ? n.toFixed(1) : group(Math.round(n));
}

export function octets(n) {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (n < 1000) return `${unit === "B" ? Math.round(n) : round(n)} ${unit}`;
    n /= 1000;
  }
  return `${round(n)} TB`;
}

export function duration(ns) {
  if (ns < 1e3) return "< 1 µs";
  if (ns < 1e6) return `${Math.round(ns / 1e3)} µs`;
  return ns < 1e9 ? `${round(ns / 1e6)} ms` : `${round(ns / 1e9)} s`;
}

// Seconds as "0:05" or "1:00:00".
export function clock(seconds) {
  const whole = Math.round(seconds);
  const two = (n) => String(n).padStart(2, "0");
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60];
  return hours ? `${hours}:${two(minutes)}:${two(whole % 60)}` : `${minutes}:${two(whole % 60)}`;
}

export function when(seconds) {
  const at = new Date(seconds * 1000);
  const time = at.toLocaleTimeString("en-GB");
  return at.toDateString() === new Date().toDateString() ? time : `${at.toLocaleDateString("en-CA")} ${time}`;
}

export const plural = (n, one, many = `${one}s`) => `${group(n)} ${n === 1 ? one : many}`;

// ---- tables

export const number = (text) => make("td", { className: "number" }, text);
export const title = (text, className = "") => make("th", { scope: "row", className }, text);

export function head(...names) {
  const cells = names.map(([name, kind]) => make("th", { scope: "col", className: kind ?? "" }, name));
  return make("thead", {}, make("tr", {}, ...cells));
}

// ---- requests

// Ask the API. All paths are relative, so that the page works below any prefix of a proxy.
export async function ask(path, options = {}) {
  const answer = await fetch(path, { ...options, cache: "no-store" });
  const isJson = answer.headers.get("content-type")?.startsWith("application/json");
  const body = isJson ? await answer.json() : await answer.text();
  if (!answer.ok) throw new Error(body.error ?? `${answer.status} ${answer.statusText}`);
  return body;
}

export const send = (path, method, value) => ask(path, { method, ...(value === undefined ? {} : { body: JSON.stringify(value) }) });

export function complain(error) {
  const text = error instanceof TypeError ? "The sink cannot be reached." : `Error: ${error.message}`;
  $("alert-text").textContent = text;
  $("alert").hidden = false;
}

// Do something that asks the API, and show its error.
export async function attempt(action) {
  try {
    const result = await action();
    $("alert").hidden = true;
    return result ?? true;
  } catch (error) {
    complain(error);
    return undefined;
  }
}
