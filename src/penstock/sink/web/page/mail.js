// The view of the mail: a list that stays correct while mail arrives, and one message.

import { $, ask, attempt, complain, draw, group, make, octets, plural, send, title, when } from "./dom.js";

const PAGE = 50; // messages per step of the list
const MOST = 1000; // messages in the list
const TYPING = 250; // milliseconds after the last key of a query
const MOST_RAW = 2_000_000; // octets of a message that is shown raw

const pathOf = (id, ...rest) => ["api/messages", encodeURIComponent(id), ...rest].join("/");
const hashOf = (id, query) => `#/mail${id ? `/${encodeURIComponent(id)}` : ""}${query ? `?q=${encodeURIComponent(query)}` : ""}`;
const authorOf = (line) => line.author.name || line.author.address || line.sender || "<>";

export class Mail {
  constructor() {
    this.live = null;
    this.query = "";
    this.list = [];
    this.hasMore = false;
    this.limit = PAGE;
    this.changes = -1; // of the kept mail, when the list was read
    this.id = ""; // of the message that is shown
    this.isShown = false;
    this.isAsking = false;
    this.message = new MessageView();
    $("query").addEventListener("input", () => {
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.search(), TYPING);
    });
    $("search").addEventListener("submit", (event) => {
      event.preventDefault();
      this.search();
    });
    $("more").addEventListener("click", () => this.grow());
    $("delete-all").addEventListener("click", () => this.deleteAll());
    $("delete").addEventListener("click", () => this.deleteOne());
    $("unread").addEventListener("click", () => this.markUnread());
    document.addEventListener("keydown", (event) => this.key(event));
    prepareRelease(() => this.id);
  }

  // ---- what is shown

  show(id, query) {
    this.isShown = true;
    if (query !== this.query) Object.assign(this, { query, list: [], limit: PAGE, changes: -1 });
    if ($("query").value.trim() !== query) $("query").value = query;
    const isOther = id !== this.id;
    this.id = id;
    $("inbox").hidden = id !== "";
    $("message").hidden = id === "";
    $("back").href = hashOf("", query);
    if (id && isOther) this.open(id);
    this.step();
    this.refresh();
    if (!id && isOther) this.focusRow(this.last);
    this.last = id || this.last;
  }

  hide() {
    this.isShown = false;
    this.id = "";
  }

  take(live) {
    this.live = live;
    $("inbox-tools").hidden = !live.keeps;
    $("release").hidden = !live.release_hop;
    $("release-hop").textContent = live.release_hop;
    if (!live.keeps) {
      $("messages-said").textContent = "Messages are counted and not kept. To see them here, start the sink with --keep last:1000.";
    } else {
      this.refresh();
    }
  }

  // Read the list again when the kept mail has changed since. One request at a time; the newest state wins.
  async refresh(isForced = false) {
    if (!this.isShown || !this.live?.keeps || this.isAsking) return;
    if (!isForced && this.changes === this.live.mail_changes) return;
    const { query, limit } = this;
    this.isAsking = true;
    try {
      const found = await ask(`api/messages?limit=${limit}${query ? `&q=${encodeURIComponent(query)}` : ""}`);
      if (query === this.query) {
        this.changes = found.changes;
        this.hasMore = found.has_more;
        this.paint(found);
      }
    } catch (error) {
      if (query === this.query) {
        this.changes = this.live.mail_changes;
        this.list = [];
        $("list").replaceChildren();
        $("more").hidden = true;
        $("delete-all").disabled = true;
        $("messages-said").textContent = error.message;
      }
    }
    this.isAsking = false;
    if (query !== this.query || limit !== this.limit) this.refresh(true);
  }

  paint(found) {
    const focused = document.activeElement?.closest("#list a")?.dataset.id;
    this.list = found.messages;
    $("list").replaceChildren(...this.list.map((line) => row(line, this.query)));
    if (focused) this.focusRow(focused);
    const count = this.list.length;
    const shown = `${this.hasMore ? "the newest " : ""}${group(count)}`;
    const sentence = this.query
      ? count ? `${shown} found among ${plural(found.kept, "message")}` : `Nothing found among ${plural(found.kept, "message")}`
      : count ? `${this.hasMore ? `${shown} of ` : ""}${plural(found.kept, "message")}; at most ${group(found.keeps)} are kept` : "No message so far.";
    $("messages-said").textContent = sentence.charAt(0).toUpperCase() + sentence.slice(1);
    $("more").hidden = !this.hasMore || this.limit >= MOST;
    $("delete-all").disabled = !count;
    $("delete-all").textContent = this.query ? "Delete found" : "Delete all";
    this.step();
  }

  grow() {
    this.limit = Math.min(this.limit + PAGE, MOST);
    return this.refresh(true);
  }

  search() {
    clearTimeout(this.timer);
    const query = $("query").value.trim();
    if (query !== this.query) history.replaceState(null, "", hashOf("", query));
    this.show("", query);
  }

  // Let the links to the neighbours of the message lead to them.
  step() {
    const at = this.list.findIndex((line) => line.id === this.id);
    const place = (id, line) => {
      if (line && at >= 0) {
        $(id).href = hashOf(line.id, this.query);
        $(id).removeAttribute("aria-disabled");
      } else {
        $(id).removeAttribute("href");
        $(id).setAttribute("aria-disabled", "true");
      }
    };
    place("newer", this.list[at - 1]);
    place("older", this.list[at + 1]);
    $("position").textContent = at < 0 ? "" : `${group(at + 1)} of ${group(this.list.length)}${this.hasMore ? "+" : ""}`;
    if (this.id && at === this.list.length - 1 && at >= 0 && this.hasMore && this.limit < MOST) this.grow();
  }

  focusRow(id) {
    $("list").querySelector(`[data-id="${CSS.escape(id ?? "")}"]`)?.focus();
  }

  // ---- what is done

  async open(id) {
    this.message.clear();
    try {
      const message = await ask(pathOf(id));
      if (id !== this.id) return;
      this.message.show(message);
      if (!message.is_read) await attempt(() => send(pathOf(id), "PATCH", { is_read: true }));
    } catch (error) {
      if (id === this.id) this.message.fail(error);
    }
  }

  async markUnread() {
    if (await attempt(() => send(pathOf(this.id), "PATCH", { is_read: false }))) location.hash = hashOf("", this.query);
  }

  async deleteOne() {
    const at = this.list.findIndex((line) => line.id === this.id);
    const next = this.list[at + 1] ?? this.list[at - 1];
    if (!(await attempt(() => send(pathOf(this.id), "DELETE")))) return;
    this.changes = -1;
    location.hash = hashOf(at >= 0 && next ? next.id : "", this.query);
  }

  async deleteAll() {
    const { query } = this;
    const question = query ? `Delete all kept messages that match ${query}?` : "Delete all kept messages?";
    if (!window.confirm(question)) return;
    await attempt(() => send(`api/messages${query ? `?q=${encodeURIComponent(query)}` : ""}`, "DELETE"));
    this.refresh(true);
  }

  key(event) {
    const isTyping = event.target.closest("input, textarea, select, dialog, [role=tab]");
    if (!this.isShown || event.ctrlKey || event.metaKey || event.altKey || isTyping) return;
    const rows = [...$("list").querySelectorAll("a")];
    const at = rows.indexOf(document.activeElement);
    const go = (id) => $(id).hasAttribute("href") && $(id).click();
    const inList = { j: () => rows[at + 1]?.focus(), ArrowDown: () => rows[at + 1]?.focus(), k: () => rows[Math.max(0, at - 1)]?.focus(), ArrowUp: () => rows[Math.max(0, at - 1)]?.focus(), "/": () => $("query").focus() };
    const inMessage = { j: () => go("older"), ArrowRight: () => go("older"), k: () => go("newer"), ArrowLeft: () => go("newer"), Escape: () => $("back").click(), Delete: () => this.deleteOne() };
    const action = (this.id ? inMessage : inList)[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  }
}

function row(line, query) {
  const from = authorOf(line);
  const [first] = line.recipients;
  const to = line.recipient_count === 1 ? first : line.recipient_count ? `${first} and ${group(line.recipient_count - 1)} more` : "no recipient";
  const all = line.recipients.join(", ") + (line.recipient_count > line.recipients.length ? " …" : "");
  const short = line.recipient_count === 1 ? first : plural(line.recipient_count, "recipient");
  const subject = line.subject ? line.subject : make("span", { className: "none" }, "(no subject)");
  return make("li", {}, make(
    "a", { href: hashOf(line.id, query), "data-id": line.id, className: line.is_read ? "read" : "unread" },
    make("span", { className: "from", title: line.author.address || line.sender }, line.is_read ? "" : make("i", { className: "new", title: "unread" }), from),
    make("span", { className: "to", title: all }, make("span", { className: "wordy" }, to), make("span", { className: "short" }, short)),
    make("span", { className: "subject" }, subject),
    make("span", { className: "files", title: line.attachments ? plural(line.attachments, "attachment") : "" }, ...(line.attachments ? [clip(), `${line.attachments}`] : [])),
    make("span", { className: "size" }, octets(line.size)),
    make("span", { className: "when" }, when(line.received_at)),
  ));
}

const clip = () => draw("svg", { viewBox: "0 0 16 16", class: "clip", "aria-label": "attachments" }, draw("path", { d: "M13 7.5 8 12.6a3.1 3.1 0 0 1-4.5-4.4l5.3-5.3a2.1 2.1 0 0 1 3 3L6.7 11a1 1 0 0 1-1.5-1.5l4.6-4.6" }));

// ---- one message

const TABS = [
  ["html", "HTML"],
  ["source", "HTML source"],
  ["text", "Text"],
  ["headers", "Headers"],
  ["raw", "Raw"],
  ["parts", "Parts"],
];
const MOST_SHOWN = 20; // texts or frames at a time
const WIDTHS = [["Full", ""], ["Tablet", "768px"], ["Phone", "375px"]];

class MessageView {
  constructor() {
    this.message = null;
    this.tab = "html";
    this.width = "";
    const tabs = TABS.map(([name, label]) => make("button", { type: "button", role: "tab", id: `tab-${name}`, "aria-controls": "panel", "data-tab": name }, label));
    for (const tab of tabs) tab.addEventListener("click", () => this.choose(tab.dataset.tab));
    $("tabs").append(...tabs);
    $("tabs").addEventListener("keydown", (event) => this.key(event));
  }

  clear() {
    this.message = null;
    $("message-title").textContent = "…";
    $("save").removeAttribute("href");
    for (const id of ["envelope", "attachments", "panel", "trouble"]) $(id).replaceChildren();
    $("tabs").hidden = true;
  }

  fail(error) {
    $("message-title").textContent = "This message cannot be shown";
    $("trouble").textContent = error instanceof TypeError ? "The sink cannot be reached." : error.message;
  }

  show(message) {
    this.message = message;
    $("message-title").textContent = message.subject || "(no subject)";
    $("trouble").textContent = message.trouble;
    if (!message.is_cut) {
      $("save").href = pathOf(message.id, "raw");
      $("save").download = `${message.id}.eml`;
    }
    const field = (name) => message.headers.filter(([each]) => each.toLowerCase() === name).map(([, value]) => value).join(", ");
    const more = message.recipient_count > message.recipients.length ? ` and ${group(message.recipient_count - message.recipients.length)} more` : "";
    const rows = [
      ["From", field("from") || "–"],
      ["To", field("to") || "–"],
      ["Cc", field("cc")],
      ["Date", field("date")],
      ["Envelope", `${message.sender || "<>"} → ${message.recipients.join(", ") || "no recipient"}${more}`],
      ["Received", `${when(message.received_at)}, ${octets(message.size)}, ${message.id}`],
    ];
    $("envelope").replaceChildren(table(rows.filter(([, value]) => value)));
    $("attachments").replaceChildren(...message.parts.filter((part) => part.is_attachment).map((part) => attachment(message, part, this)));
    const has = { html: this.own("html"), source: this.own("html"), text: this.own("text", "calendar"), headers: message.headers, raw: [1], parts: message.parts };
    for (const [name] of TABS) $(`tab-${name}`).hidden = !has[name].length;
    $("tabs").hidden = false;
    const wanted = has[this.tab].length ? this.tab : has.html.length ? "html" : has.text.length ? "text" : "parts";
    this.choose(wanted, false);
  }

  // The texts of the message itself: not of its attachments, nor of messages within it.
  own(...kinds) {
    return this.message.parts.filter((part) => part.within === 0 && kinds.includes(part.shown_as) && !part.is_attachment);
  }

  choose(name, isAsked = true) {
    if (isAsked) this.tab = name;
    for (const [each] of TABS) {
      const isChosen = each === name;
      $(`tab-${each}`).setAttribute("aria-selected", String(isChosen));
      $(`tab-${each}`).tabIndex = isChosen ? 0 : -1;
    }
    $("panel").setAttribute("aria-labelledby", `tab-${name}`);
    $("panel").replaceChildren(...this[name]());
  }

  key(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const tabs = [...$("tabs").children].filter((tab) => !tab.hidden);
    const next = tabs[(tabs.indexOf(document.activeElement) + step + tabs.length) % tabs.length];
    next.focus();
    this.choose(next.dataset.tab);
    event.preventDefault();
    event.stopPropagation();
  }

  // Show an embedded message: what is readable of it, in the tree of all parts.
  openPart(part) {
    this.choose("parts", false);
    const root = part.number + 1;
    const places = [part.number, ...this.message.parts.filter((each) => each.within === root).map((each) => each.number)];
    for (const number of places) {
      const details = $("panel").querySelector(`[data-part="${number}"]`);
      if (details) details.open = true;
    }
    const first = $("panel").querySelector(`[data-part="${part.number}"] summary`);
    first?.scrollIntoView({ block: "center" });
    first?.focus();
  }

  // ---- the panels

  html() {
    return some(this.own("html"), (part) => frame(this.message, part, this));
  }

  source() {
    return some(this.own("html"), (part) => textOf(this.message, part));
  }

  text() {
    return some(this.own("text", "calendar"), (part) => (part.facts.length ? make("div", {}, table(part.facts), textOf(this.message, part)) : textOf(this.message, part)));
  }

  headers() {
    return [table(this.message.headers)];
  }

  raw() {
    const { message } = this;
    const place = make("pre", { tabindex: "0" }, "…");
    const link = make("a", { href: pathOf(message.id, "raw"), target: "_blank", rel: "noopener" }, "Open in a new tab");
    if (message.size > MOST_RAW || message.is_cut) {
      place.textContent = message.is_cut ? message.trouble : `This message has ${octets(message.size)}.`;
    } else {
      ask(pathOf(message.id, "raw")).then((text) => (place.textContent = text)).catch(complain);
    }
    return [make("p", { className: "note" }, link), place];
  }

  parts() {
    return [make("ul", { className: "tree" }, ...this.message.parts.map((part) => branch(this.message, part, this)))];
  }
}

// Show the first parts, and a button for the next ones: a message may have hundreds, and each frame is a document.
function some(parts, show) {
  const rest = parts.slice(MOST_SHOWN);
  if (!rest.length) return parts.map(show);
  const more = make("button", { type: "button", className: "more" }, `Show more: ${plural(rest.length, "part")}`);
  more.addEventListener("click", () => more.replaceWith(...some(rest, show)));
  return [...parts.slice(0, MOST_SHOWN).map(show), more];
}

const table = (rows) => make("div", { className: "scroll" }, make("table", { className: "pairs" }, make("tbody", {}, ...rows.map(([name, value]) => make("tr", {}, title(name), make("td", {}, value))))));

function nameOf(part) {
  const subject = part.facts.find(([name]) => name === "Subject")?.[1];
  return part.filename || subject || { message: "Embedded message", calendar: "Invitation" }[part.shown_as] || `part ${part.number}`;
}

function links(message, part) {
  const path = pathOf(message.id, "parts", part.number);
  if (!part.is_whole) return [make("span", { className: "note" }, "not kept whole")];
  const isShown = ["image", "pdf"].includes(part.shown_as) ? path : ["text", "html", "calendar"].includes(part.shown_as) ? `${path}/view` : "";
  const extension = part.shown_as === "message" ? ".eml" : "";
  const view = isShown ? [make("a", { href: isShown, target: "_blank", rel: "noopener" }, "View")] : [];
  return [...view, make("a", { href: path, download: part.filename || `${nameOf(part)}${extension}` }, "Save")];
}

function attachment(message, part, view) {
  const name = make("span", { className: "name" }, nameOf(part));
  const about = make("span", { className: "note" }, `${part.type}, ${octets(part.size)}`);
  const side = make("span", { className: "links" }, ...links(message, part));
  if (part.shown_as === "message") {
    const open = make("button", { type: "button", className: "link" }, "View");
    open.addEventListener("click", () => view.openPart(part));
    side.prepend(open);
  }
  return make("li", {}, name, about, side);
}

function textOf(message, part) {
  const nodes = [make("pre", { tabindex: "0" }, part.text)];
  if (!part.is_text_whole) {
    const link = make("a", { href: pathOf(message.id, "parts", part.number, "view"), target: "_blank", rel: "noopener" }, "View all of it in a new tab");
    nodes.push(make("p", { className: "note" }, `Only the beginning is shown, of ${octets(part.size)}. `, link));
  }
  return make("div", { className: "part" }, ...nodes);
}

// HTML in a frame with an origin of its own, without scripts. Remote content is loaded when the reader asks for it.
function frame(message, part, view) {
  const path = pathOf(message.id, "parts", part.number, "view");
  const inside = make("iframe", { sandbox: "allow-popups allow-popups-to-escape-sandbox", src: path, title: "HTML of the message", referrerpolicy: "no-referrer" });
  inside.style.maxWidth = view.width || "100%";
  const widths = WIDTHS.map(([label, width]) => {
    const button = make("button", { type: "button", "aria-pressed": String(view.width === width) }, label);
    button.addEventListener("click", () => {
      view.width = width;
      inside.style.maxWidth = width || "100%";
      for (const each of button.parentNode.children) each.setAttribute("aria-pressed", String(each === button));
    });
    return button;
  });
  const tools = [make("span", { className: "group", role: "group", "aria-label": "Width" }, ...widths)];
  if (part.has_remote_content || !part.is_text_whole) {
    const box = make("input", { type: "checkbox", className: "remote" });
    box.addEventListener("change", () => (inside.src = `${path}?remote=${box.checked}`));
    tools.push(make("label", { className: "switch" }, box, " Load remote content"));
  }
  return make("div", { className: "part framed" }, make("div", { className: "row" }, ...tools), inside);
}

// One part in the tree of all of them; what is readable is shown when it is opened.
function branch(message, part, view) {
  const about = [part.type, part.charset, part.encoding, part.disposition, octets(part.size), part.content_id && `cid:${part.content_id}`].filter((each) => each).join(" · ");
  const name = part.filename || part.facts.find(([each]) => each === "Subject")?.[1] || "";
  const line = [make("b", {}, `${part.number}`), ` ${name} `, make("span", { className: "note" }, about)];
  const side = make("span", { className: "links" }, ...links(message, part));
  const inside = {
    text: () => textOf(message, part),
    calendar: () => make("div", {}, table(part.facts), textOf(message, part)),
    html: () => frame(message, part, view),
    image: () => make("img", { src: pathOf(message.id, "parts", part.number), alt: name || "image", loading: "lazy" }),
    message: () => table(part.facts),
  }[part.shown_as];
  const item = make("li", {});
  item.style.setProperty("--depth", String(Math.min(part.depth, 12)));
  if (!inside) {
    item.append(make("div", { className: "leaf" }, ...line, side));
    return item;
  }
  const details = make("details", { "data-part": String(part.number) }, make("summary", {}, ...line), make("p", {}, side));
  details.addEventListener("toggle", () => {
    if (details.open && details.children.length === 2) details.append(inside());
  });
  item.append(details);
  return item;
}

// ---- release

function prepareRelease(current) {
  const dialog = $("release-dialog");
  $("release").addEventListener("click", () => {
    $("release-said").textContent = "";
    dialog.showModal();
  });
  $("release-close").addEventListener("click", () => dialog.close());
  $("release-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const recipients = $("release-to").value.split(/[\s,;]+/).filter((each) => each);
    const said = $("release-said");
    said.className = "said";
    said.textContent = "Sending …";
    try {
      const { released, refused } = await send(pathOf(current(), "release"), "POST", { recipients });
      said.textContent = `Released to ${released.join(", ")}${refused.length ? `; refused: ${refused.join(", ")}` : ""}.`;
      said.className = `said ${refused.length ? "bad" : "good"}`;
    } catch (error) {
      said.textContent = error.message;
      said.className = "said bad";
    }
  });
}
