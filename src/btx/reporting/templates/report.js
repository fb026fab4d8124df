// The report's token readers. Text reaches the page as text only, never as HTML.
"use strict";
const COLOURS = 8;

function make(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function reader(root) {
  const data = JSON.parse(root.querySelector("script").textContent);
  const [form, panel, status, turning] = ["form", "aside", "output", ".turn"].map((name) => root.querySelector(name));
  const articles = [...root.querySelectorAll("article")];
  const value = (name) => form.elements[name]?.value ?? "";
  let screens = [], screen = 0, pinned = null, walk = {};

  // Of a layer: [expert, gate in hundredths] of a token, the largest gate first.
  function routed(text, t, layer) {
    const k = text.k[layer], from = t * k;
    return text.gates[layer].slice(from, from + k).map((gate, i) => [text.experts[layer][from + i], gate]);
  }
  const experts = (text, t) => routed(text, t, Math.min(+value("layer"), text.k.length - 1)).map(([expert]) => expert);
  const starts = (text, end = 0) => text.starts ??= text.tokens.map((token) => (end += token.length) - token.length);
  const documents = () => data.documents.filter((each) => !value("domain") || each.domain === value("domain"));

  // --- the screen: some documents

  function turn() {
    screens = [];
    let room = 0;
    for (const each of documents()) {
      room -= each.texts[data.model].tokens.length;
      if (room < 0 || screens.at(-1).length === data.most) {
        screens.push([]);
        room = Math.max(0, data.screen - each.texts[data.model].tokens.length);
      }
      screens.at(-1).push(each);
    }
    show(0);
  }

  function show(number) {
    screen = number;
    unpin();
    data.documents.forEach((each, i) => {
      const visible = screens[screen].includes(each);
      articles[i].hidden = !visible;
      if (visible) fill(articles[i], each);
      else articles[i].querySelector(".sides").replaceChildren();
    });
    for (const button of turning.querySelectorAll("button")) button.disabled = !screens[screen + +button.value];
    turning.hidden = screens.length < 2;
    turning.querySelector("span").textContent = `${screen + 1} of ${screens.length}`;
  }

  function fill(article, each) {
    const models = [data.model, value("beside")].filter((model) => each.texts[model]);
    article.querySelector(".sides").replaceChildren(...models.map((model) => {
      const text = each.texts[model];
      const marks = text.tokens.map((token, t) => make("i", {
        textContent: token.replaceAll("\n", "↵\n"), role: "option", tabIndex: t ? -1 : 0, t, text, each, model,
      }));
      marks.forEach(colour);
      return make("div", {}, make("h4", { textContent: model }), make("div",
        { className: "tokens", role: "listbox", ariaLabel: `Tokens of ${model}, ${each.domain}` }, ...marks));
    }));
  }

  function colour(mark) {
    const used = experts(mark.text, mark.t), filter = value("expert"), main = mark.model === data.model;
    const place = main ? ["first", "second"][used.indexOf(mark.each.own)] || "" : "";
    const dim = main && filter && !used.includes(+filter) ? "dim" : "";
    mark.className = `a${used[0] % COLOURS} b${(used[1] ?? used[0]) % COLOURS} ${place} ${dim}`;
  }

  // --- the pinned token

  function unpin() {
    for (const mark of root.querySelectorAll("i[aria-selected], .same")) {
      mark.ariaSelected = null;
      mark.classList.remove("same");
    }
    pinned = null;
    panel.hidden = true;
  }

  // The one token of its box that the tab key stops at.
  function roam(mark) {
    for (const other of mark.parentNode.querySelectorAll("[tabindex='0']")) other.tabIndex = -1;
    mark.tabIndex = 0;
    return mark;
  }

  function pin(mark) {
    unpin();
    pinned = mark;
    mark.ariaSelected = "true";
    roam(mark);
    // The same characters in the other model's tokens.
    const token = mark.text.tokens[mark.t], from = starts(mark.text)[mark.t], to = from + token.length, marks = [mark];
    for (const other of mark.closest(".sides").querySelectorAll("i")) {
      const at = starts(other.text)[other.t];
      if (other.text !== mark.text && at < to && at + other.text.tokens[other.t].length > from) {
        other.classList.add("same");
        marks.push(other);
      }
    }
    panel.replaceChildren(
      make("button", { type: "button", textContent: "×", ariaLabel: "Close", onclick: unpin }),
      make("h4", {}, make("code", { textContent: JSON.stringify(token) }), ` token ${mark.t}, ${mark.each.domain}`),
      bitsTable(marks), ...marks.map(gatesTable));
    panel.hidden = false;
  }

  // Rows: [marked, name, [[colour, percent] ...], words].
  const table = (caption, rows) => make("table", {}, make("caption", { textContent: caption }),
    ...rows.map(([marked, name, shares, words]) => make("tr", { className: marked ? "ours" : "" },
      make("th", { textContent: name }),
      make("td", { className: "strip" }, ...shares.map(([colour, share]) =>
        make("span", { style: `width:${Math.min(100, share)}%;background:var(--${colour})` }))),
      make("td", { textContent: words }))));

  function bitsTable(marks) {
    const rows = marks.flatMap(({ text, t, model }) => Object.entries(text.bits)
      .filter(([name]) => model !== data.model || data.shown.includes(name) || name === value("baseline"))
      .map(([name, list]) => [name, list[t]])).filter(([, bit]) => bit != null);
    const most = Math.max(0.01, ...rows.map(([, bit]) => bit));
    return rows.length ? table("bits this token costs each model",
      rows.map(([name, bit]) => [name === data.model, name, [["soft", 100 * bit / most]], bit.toFixed(2)])) : "";
  }

  const gatesTable = ({ text, t, model }) => table(`gates by layer: ${model}, ${JSON.stringify(text.tokens[t])}`,
    text.k.map((_, layer) => {
      const used = routed(text, t, layer);
      return [layer === +value("layer"), layer, used.map(([expert, gate]) => [`c${expert % COLOURS}`, gate]),
        used.map(([expert, gate]) => `${data.experts[model][expert]} ${(gate / 100).toFixed(2)}`).join(" + ")];
    }));

  // --- search, and the next surprising token

  function go(each, t) {
    if (!screens[screen].includes(each)) show(screens.findIndex((some) => some.includes(each)));
    const mark = articles[data.documents.indexOf(each)].querySelector(".tokens").children[t];
    pin(mark);
    mark.scrollIntoView({ block: "center", behavior: "instant" });
  }

  function next(kind, list, say) {
    const key = [kind, ...new FormData(form)].join();
    if (walk.key !== key) walk = { key, list: list(), at: -1 };
    if (!walk.list.length) return (status.textContent = "none");
    walk.at = (walk.at + 1) % walk.list.length;
    const [each, t, worth] = walk.list[walk.at];
    go(each, t);
    status.textContent = `${walk.at + 1} of ${walk.list.length}${say(worth)}`;
  }

  function search() {
    const wanted = value("search").toLowerCase();
    if (!wanted) return;
    next("search", () => documents().flatMap((each) => {
      const text = each.texts[data.model], all = text.tokens.join(""), lower = all.toLowerCase(), places = [];
      // Some letters' small forms are longer, which would shift places.
      const within = lower.length === all.length ? lower : all;
      for (let at = within.indexOf(wanted); at >= 0; at = within.indexOf(wanted, at + 1)) {
        places.push([each, starts(text).findLastIndex((start) => start <= at)]);
      }
      return places;
    }), () => "");
  }

  function surprise() {
    const by = value("by"), filter = value("expert");
    const worth = ({ texts }, t) => {
      const { [data.model]: ours, seed } = texts[data.model].bits;
      return by === "most" ? ours?.[t] : (ours?.[t] - seed?.[t]) * (by === "more" ? 1 : -1);
    };
    next("surprise", () => documents().flatMap((each) => {
      const text = each.texts[data.model];
      return text.tokens.map((_, t) => [each, t, worth(each, t)])
        .filter(([, t, bit]) => bit > 0 && (!filter || experts(text, t).includes(+filter)));
    }).sort((a, b) => b[2] - a[2]), (bit) => `: ${bit.toFixed(2)} bits${by === "most" ? "" : ` ${by} than the seed model`}`);
  }

  // --- mouse, keys, controls

  function move(mark, key) {
    const all = [...mark.parentNode.children], step = /Left|Up|Home/.test(key) ? -1 : 1;
    if (/Home|End/.test(key)) return all.at(step === 1 ? -1 : 0);
    if (/Left|Right/.test(key)) return all[mark.t + step];
    const down = (to) => (to.offsetTop - mark.offsetTop) * step, aside = (to) => Math.abs(to.offsetLeft - mark.offsetLeft);
    return all.filter((to) => down(to) > 0).sort((a, b) => down(a) - down(b) || aside(a) - aside(b))[0];
  }

  root.addEventListener("click", (event) => {
    const mark = event.target.closest(".tokens i");
    if (mark) mark === pinned ? unpin() : pin(mark);
  });
  root.addEventListener("keydown", (event) => {
    const mark = event.target.closest(".tokens i");
    if (event.key === "Escape") unpin();
    if (!mark || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Enter" || event.key === " ") pin(mark);
    else if (/^(Arrow|Home|End)/.test(event.key)) {
      const to = move(mark, event.key);
      if (to) roam(to).focus();
    } else return;
    event.preventDefault();
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    event.submitter?.name === "next" ? surprise() : search();
  });
  form.addEventListener("change", ({ target }) => {
    if (target.name === "search") return;
    if (target.name === "domain") turn();
    else if (target.name === "beside") show(screen);
    else root.querySelectorAll(".tokens i").forEach(colour);
    if (pinned) pin(pinned);
  });
  turning.onclick = ({ target }) => target.value && show(screen + +target.value);
  turn();
  form.hidden = false;
}

for (const root of document.querySelectorAll(".reader")) reader(root);
