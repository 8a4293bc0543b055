// The editor of the fault plan, and the faults of the next commands.

import { $, ask, attempt, make, plural, send } from "./dom.js";

const PHASES = ["rcpt", "mail", "data", "dot", "ehlo", "helo", "banner", "starttls", "auth", "rset", "noop", "vrfy", "expn", "help", "quit"];
const DELAY = 300; // milliseconds after the last key

export class Plan {
  constructor() {
    this.text = ""; // as it is in force
    this.examples = [];
    this.area = $("plan-text");
    $("fail").elements.phase.append(...PHASES.map((phase) => make("option", { value: phase }, phase)));
    $("fail").addEventListener("submit", (event) => this.failNext(event));
    $("plan").addEventListener("submit", (event) => this.apply(event));
    $("plan-load").addEventListener("click", () => this.load());
    $("plan-insert").addEventListener("click", () => this.insert());
    this.area.addEventListener("input", () => {
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.check(), DELAY);
      this.say("…", "");
    });
  }

  async show() {
    if (this.examples.length) return;
    await attempt(async () => {
      this.examples = await ask("api/plan/examples");
      $("plan-example").append(...this.examples.map((each, i) => make("option", { value: String(i) }, each.title)));
    });
    await this.load();
  }

  say(text, kind) {
    $("plan-state").textContent = text;
    $("plan-state").className = `said ${kind}`;
    this.area.setAttribute("aria-invalid", String(kind === "bad"));
  }

  async load() {
    await attempt(async () => {
      this.text = this.area.value = await ask("api/plan");
      this.say(this.text.trim() ? "This plan is in force." : "No plan is in force: nothing fails. Choose an example to begin with.", "");
    });
  }

  insert() {
    const example = this.examples[Number($("plan-example").value)];
    if (!example) return;
    const before = this.area.value.trimEnd();
    // A key outside of the rules cannot follow a rule, and cannot be there twice: such an example replaces the plan.
    const fits = before && example.text.replace(/^#.*\n/gm, "").trimStart().startsWith("[[rule]]");
    this.area.value = fits ? `${before}\n\n${example.text}` : example.text;
    this.area.focus();
    this.check();
  }

  // Check what is typed; an answer that was overtaken is dropped.
  async check() {
    const text = this.area.value;
    try {
      const { error, rules } = await ask("api/plan/check", { method: "POST", body: text });
      if (text !== this.area.value) return;
      if (error) return this.say(error, "bad");
      const changed = text === this.text ? "in force" : "not yet in force";
      this.say(`Valid: ${plural(rules.length, "rule")}${rules.length ? ` (${rules.join(", ")})` : ""}, ${changed}.`, "good");
    } catch (error) {
      if (text === this.area.value) this.say(error.message, "bad");
    }
  }

  async apply(event) {
    event.preventDefault();
    clearTimeout(this.timer);
    const text = this.area.value;
    try {
      await ask("api/plan", { method: "PUT", body: text });
      this.text = text;
      this.say("This plan is in force.", "good");
    } catch (error) {
      this.say(error.message, "bad");
    }
  }

  async failNext(event) {
    event.preventDefault();
    const { phase, reply, count } = event.target.elements;
    const wanted = { phase: phase.value, reply: reply.value, count: Number(count.value) };
    const said = $("fail-state");
    try {
      await send("api/fail-next", "POST", wanted);
      said.textContent = `The next ${plural(wanted.count, "command")} in ${wanted.phase} will be answered with ${wanted.reply}.`;
      said.className = "said good";
    } catch (error) {
      said.textContent = error.message;
      said.className = "said bad";
    }
  }
}
