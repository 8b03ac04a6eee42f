"use strict";
(() => {
  // Pictures stand in blocks of JSON after this script, which are parsed when they are needed.
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const NS = "http://www.w3.org/2000/svg";
  const parsed = new Map();
  const block = (id) => {
    if (!parsed.has(id)) {
      const element = $(id);
      parsed.set(id, element ? JSON.parse(element.textContent) : []);
    }
    return parsed.get(id);
  };
  const make = (name, properties = {}, ...children) => {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(properties)) {
      if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
      else element.setAttribute(key, value);
    }
    element.append(...children);
    return element;
  };
  const icon = (name) => {
    const svg = document.createElementNS(NS, "svg");
    const use = document.createElementNS(NS, "use");
    use.setAttribute("href", `#i-${name}`);
    svg.setAttribute("aria-hidden", "true");
    svg.append(use);
    return svg;
  };
  const source = (image) => {
    const at = data.large.indexOf(image);
    const text =
      at >= 0
        ? block(`large-${Math.floor(at / data.largeChunk)}`)[at % data.largeChunk]
        : block(`small-${Math.floor(image / data.smallChunk)}`)[image % data.smallChunk];
    return text ? `data:${data.media};base64,${text}` : null;
  };
  const nameOf = (image) => data.names[image].slice(data.prefix.length);
  const picture = (image, alt) => {
    const text = source(image);
    const frame = text
      ? make("span", { class: "picture" }, make("img", { src: text, alt }))
      : make("span", { class: "picture missing", role: "img", "aria-label": alt });
    if (data.ratios[image]) frame.style.aspectRatio = String(data.ratios[image]);
    return frame;
  };

  const pair = data.runs.length > 1 ? [0, data.runs.length - 1] : [0, 0];
  let kind = "all";
  let shown = [];
  let at = 0;
  const KINDS = [
    ["all", () => "All that differ", (a, b) => a !== b],
    ["won", () => `Only ${data.runs[pair[1]]} is right`, (a, b) => !a && b],
    ["lost", () => `Only ${data.runs[pair[0]]} is right`, (a, b) => a && !b],
  ];
  const chosen = (test) =>
    data.queries.filter((query) => test(query.right[pair[0]], query.right[pair[1]]));

  const select = () => {
    const [, , test] = KINDS.find(([name]) => name === kind);
    shown = chosen(test);
    at = Math.min(at, Math.max(shown.length - 1, 0));
    $("filters").replaceChildren(
      ...KINDS.map(([name, label, of]) =>
        make(
          "button",
          {
            type: "button",
            class: "chip",
            "aria-pressed": String(name === kind),
            onclick: () => {
              kind = name;
              at = 0;
              select();
            },
          },
          label(),
          make("span", { class: "number" }, ` ${chosen(of).length}`),
        ),
      ),
    );
    show();
  };

  const answer = (query, run) => {
    const right = query.right[run];
    const rank = query.rank[run];
    const mark = make("span", { class: `mark ${right ? "r" : "w"}` }, icon(right ? "r" : "w"), right ? "right" : "wrong");
    const first = rank === 1 ? "" : rank ? `first right answer at rank ${rank}` : "no right answer among the candidates";
    return make(
      "figure",
      {},
      make("figcaption", {}, make("strong", {}, data.runs[run]), " ", mark),
      picture(query.answers[run], `Answer of ${data.runs[run]}: ${nameOf(query.answers[run])}`),
      make("small", {}, nameOf(query.answers[run])),
      make("small", {}, first),
    );
  };

  const show = () => {
    const query = shown[at];
    $("where").textContent = query ? `${at + 1} of ${shown.length}` : "no such query";
    $("previous").disabled = at <= 0;
    $("next").disabled = at >= shown.length - 1;
    const figures = query
      ? [
          make(
            "figure",
            {},
            make("figcaption", {}, make("strong", {}, "Query")),
            picture(query.image, `Query ${nameOf(query.image)}`),
            make("small", {}, nameOf(query.image)),
          ),
          ...data.runs.map((_, run) => answer(query, run)),
        ]
      : [];
    $("answers").replaceChildren(...figures);
  };

  const step = (by) => {
    const to = at + by;
    if (to < 0 || to >= shown.length) return;
    at = to;
    show();
  };

  const start = () => {
    for (const [i, id] of ["before", "after"].entries()) {
      $(id).append(...data.runs.map((name, run) => make("option", { value: String(run) }, name)));
      $(id).value = String(pair[i]);
      $(id).addEventListener("change", () => {
        pair[i] = Number($(id).value);
        at = 0;
        select();
      });
    }
    $("pair").hidden = data.runs.length < 3;
    $("toolbar").hidden = $("stepper").hidden = false;
    $("previous").addEventListener("click", () => step(-1));
    $("next").addEventListener("click", () => step(1));
    document.addEventListener("keydown", (event) => {
      if (event.target.closest("select, input") || event.altKey || event.ctrlKey || event.metaKey) return;
      if (event.key === "ArrowLeft") step(-1);
      if (event.key === "ArrowRight") step(1);
    });
    select();
  };

  document.addEventListener("DOMContentLoaded", () => {
    if (data.queries.length) start();
    document.documentElement.dataset.ready = "";
  });
})();
