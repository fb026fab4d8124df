// Talks to the server it comes from, and to nobody else. Texts reach the page as text alone, never as HTML.
"use strict";

const COLOURS = 8;
const STATES = { use: "only", only: "without", without: "use" };  // what a click on an expert makes of it
const $ = (id) => document.getElementById(id);
const hue = (expert) => `var(--c${expert % COLOURS})`;
const messages = [];   // the conversation with the main model
const known = {};      // model → what the server says of it
const states = {};     // expert → use, only or without
let running = null;    // what stops the answers under way

function element(name, classes, text) {
  const made = document.createElement(name);
  made.className = classes || "";
  if (text !== undefined) made.textContent = text;
  return made;
}

function complain(message) {
  $("problem").textContent = message;
  $("problem").hidden = !message;
}

async function describe(model) {
  if (!known[model]) {
    const reply = await fetch(`model?model=${encodeURIComponent(model)}`);
    const said = await reply.json();
    if (!reply.ok) throw new Error(said.error.message);
    known[model] = said;
  }
  return known[model];
}

function showExperts(names) {
  $("experts").replaceChildren(...names.map((name, expert) => {
    states[name] ||= "use";
    const button = element("button", "expert");
    button.type = "button";
    button.style.setProperty("--hue", hue(expert));
    button.append(element("span", "dot"), element("span", "", name));
    const show = () => {
      button.dataset.state = states[name];
      button.title = { use: "used as the router says", only: "used alone", without: "never used" }[states[name]];
      button.setAttribute("aria-label", `${name}: ${button.title}`);
    };
    button.addEventListener("click", () => { states[name] = STATES[states[name]]; show(); });
    show();
    return button;
  }));
  $("about").textContent = names.length
    ? "Each token is coloured by the two experts that read it; click one to see every layer. Click an expert to use it alone, again to forbid it."
    : "This model is dense: it has no experts to show.";
}

function choice(names) {
  const having = (state) => names.filter((name) => states[name] === state);
  return { only: having("only"), without: having("without") };
}

function showToken(mark, token, names) {
  document.querySelectorAll(".tokens i.chosen").forEach((other) => other.classList.remove("chosen"));
  mark.classList.add("chosen");
  $("token").textContent = `“${token.text}”${token.from_prompt ? " (prompt)" : ""}`;
  $("strip").replaceChildren(...token.gates.map((gates, layer) => {
    const line = element("div", "layer"), bar = element("div", "bar");
    line.append(element("span", "", `layer ${layer + 1}`), bar);
    gates.forEach((gate, expert) => {
      if (gate <= 0) return;
      const part = element("span", "", `${names[expert]} ${gate.toFixed(2)}`);
      part.style.setProperty("--hue", hue(expert));
      part.style.width = `${100 * gate}%`;
      part.title = part.textContent;
      bar.append(part);
    });
    return line;
  }));
  $("layers").hidden = false;
}

function tokenMark(token, names) {
  const mark = element("i", token.pair.length ? "pair" : "", token.text);
  if (token.from_prompt) mark.classList.add("prompt");
  if (token.pair.length) {
    mark.style.setProperty("--a", hue(token.pair[0]));
    mark.style.setProperty("--b", hue(token.pair[token.pair.length - 1]));
    mark.title = token.pair.map((expert) => names[expert]).join(" + ");
    mark.tabIndex = 0;
    mark.setAttribute("role", "button");
    const show = () => showToken(mark, token, names);
    mark.addEventListener("click", show);
    mark.addEventListener("keydown", (event) => { if (event.key === "Enter") show(); });
  }
  return mark;
}

function card(title, mine) {
  const box = element("div", mine ? "said mine" : "said"), head = element("header"), body = element("div", "tokens");
  const facts = element("span");
  head.append(element("span", "", title), facts);
  box.append(head, body);
  return { box, body, facts, said: "" };
}

async function* events(reply) {
  const reader = reply.body.getReader(), decoder = new TextDecoder();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += decoder.decode(value, { stream: true });
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
      const data = text.slice(0, end).replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// The page follows an answer that grows, unless one has scrolled up to read.
function follow() {
  const left = document.documentElement.scrollHeight - innerHeight - scrollY;
  if (left < 160) scrollBy(0, left);
}

async function answer(model, shown, experts, signal) {
  const about = await describe(model), names = about.experts, began = performance.now();
  const asked = {
    model, messages: about.has_template ? messages : messages.slice(-1), stream: true,
    temperature: Number($("temperature").value), top_p: Number($("top_p").value),
    max_tokens: Number($("max_tokens").value), seed: Number($("seed").value),
    experts: experts ? choice(names) : {},
  };
  const reply = await fetch("v1/chat/completions", {
    method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(asked), signal,
  });
  if (!reply.ok) throw new Error((await reply.json()).error.message);
  let count = 0;
  for await (const piece of events(reply)) {
    if (piece.error) throw new Error(piece.error.message);
    const choice = piece.choices[0];
    for (const token of choice.routing ? choice.routing.tokens : []) {
      if (token.from_prompt && !$("prompts").checked) continue;
      shown.body.append(tokenMark(token, names));
      if (token.from_prompt) continue;
      shown.said += token.text;
      count += 1;
      follow();
      shown.facts.textContent = `${count} tokens, ${(1000 * count / (performance.now() - began)).toFixed(0)} a second`;
    }
    if (choice.finish_reason === "length") shown.facts.textContent += ", cut off";
  }
}

async function send(text) {
  complain("");
  messages.push({ role: "user", content: text });
  const models = [$("model").value, $("beside").value].filter(Boolean);
  const turn = element("div", models.length > 1 ? "turn two" : "turn"), mine = card("you", true);
  mine.body.textContent = text;
  turn.append(mine.box);
  $("talk").append(turn);
  running = new AbortController();
  $("stop").disabled = false;
  $("send").disabled = true;
  const cards = models.map((model) => card(model));
  turn.append(...cards.map((shown) => shown.box));
  scrollTo(0, document.documentElement.scrollHeight);
  const { signal } = running;
  const answers = await Promise.allSettled(models.map((model, place) => answer(model, cards[place], !place, signal)));
  const { said } = cards[0];  // also of an answer that was stopped
  if (said) messages.push({ role: "assistant", content: said });
  else messages.pop();
  for (const { reason } of answers) if (reason && reason.name !== "AbortError") complain(String(reason.message || reason));
  running = null;
  $("stop").disabled = true;
  $("send").disabled = false;
  $("text").focus();
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value;
  if (!text.trim() || running) return;
  $("text").value = "";
  send(text);
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("form").requestSubmit(); }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (running) running.abort();
  else $("layers").hidden = true;
});
$("stop").addEventListener("click", () => running && running.abort());
$("close").addEventListener("click", () => { $("layers").hidden = true; });
$("new").addEventListener("click", () => {
  if (running) running.abort();
  messages.length = 0;
  $("talk").replaceChildren();
  $("layers").hidden = true;
  complain("");
  $("text").focus();
});
$("model").addEventListener("change", () => begin($("model").value));

async function begin(model) {
  try {
    showExperts((await describe(model)).experts);
    complain("");
  } catch (error) {
    complain(String(error.message || error));
  }
}

(async () => {
  const listed = (await (await fetch("v1/models")).json()).data.map((model) => model.id);
  for (const id of listed) {
    $("model").append(new Option(id, id));
    $("beside").append(new Option(id, id));
  }
  await begin(listed[0]);
})();
