"use strict";
(() => {
  // Data stands in blocks of JSON. Those of pictures and details are parsed when they are needed.
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const sequence = data.final === "Sequence";
  const parsed = new Map();
  const block = (id) => {
    if (!parsed.has(id)) {
      const element = $(id);
      if (!element) return null; // there is none, or the page is still being read
      parsed.set(id, JSON.parse(element.textContent));
      element.remove();
    }
    return parsed.get(id);
  };
  const NS = "http://www.w3.org/2000/svg";
  const PAGE = 50;
  const STATUS = {
    r: ["Right", "the first answer is right"],
    w: ["Wrong", data.reranked ? "the first answer is wrong before and after re-ranking" : "the first answer is wrong"],
    s: ["Rescued", "wrong before re-ranking, right after it"],
    h: ["Hurt", "right before re-ranking, wrong after it"],
    n: ["No answer", "no index image is right"],
    c: ["Changed", "re-ranking changed the first answer"],
    u: ["Unchanged", "re-ranking kept the first answer"],
  };
  const ORDER = "hswrncu"; // of statuses, when sorted
  const queries = Array.from({ length: data.queries }, (_, q) => q);
  const format = new Intl.NumberFormat("en");
  const short = (value) => {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 0.001 || size >= 1e6)) return value.toExponential(2);
    return format.format(Number(value.toPrecision(size >= 1000 ? 5 : 4))).replace("-", "−");
  };
  // One number of decimals a column, so that they stand below each other.
  const aligned = (values) => {
    const known = values.filter((value) => value !== null);
    const most = known.reduce((so, value) => Math.max(so, Math.abs(value)), 0);
    if (most >= 1e6 || (most && most < 0.01)) return short;
    const digits = known.every(Number.isInteger) ? 0 : most < 10 ? 3 : most < 100 ? 2 : 1;
    const same = new Intl.NumberFormat("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
    return (value) => (value === null ? "–" : same.format(value).replace("-", "−"));
  };
  // A number with the unit of the ground truth; frames of another clip have no distance.
  const unit = (value) => (data.unit ? ` ${data.unit === "frames" && value === 1 ? "frame" : data.unit}` : "");
  const awayText = (value) => (value === null ? "another clip" : `${short(value)}${unit(value)} away`);
  const rank = (value) => (value ? format.format(value) : `> ${data.k}`);

  const nameOf = (image) => data.names[image].slice(data.prefix.length);

  const make = (name, properties = {}, ...children) => {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(properties)) {
      if (value === null || value === undefined) continue;
      if (key === "class") element.className = value;
      else if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
      else element.setAttribute(key, value);
    }
    element.append(...children.filter((child) => child !== null));
    return element;
  };
  const draw = (name, properties = {}, ...children) => {
    const element = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(properties)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  };
  const icon = (name) => draw("svg", { "aria-hidden": "true" }, draw("use", { href: `#i-${name}` }));
  const badge = (letter) => {
    const [word, meaning] = STATUS[letter];
    return make("span", { class: `status ${letter}`, title: meaning }, icon(letter), word);
  };
  const mark = (right) =>
    right === null
      ? null
      : make("span", { class: `mark ${right ? "r" : "w"}` }, icon(right ? "r" : "w"), right ? "right" : "wrong");

  // Pictures ------------------------------------------------------------------------------------

  const largePlace = new Map(data.large.map((image, place) => [image, place]));
  const source = (text) => (text ? `data:${data.media};base64,${text}` : null);
  const small = (image) => {
    const texts = block(`small-${Math.floor(image / data.smallChunk)}`);
    return texts && source(texts[image % data.smallChunk]);
  };
  const large = (image) => {
    const place = largePlace.get(image);
    const texts = place === undefined ? null : block(`large-${Math.floor(place / data.largeChunk)}`);
    return (texts && source(texts[place % data.largeChunk])) || small(image);
  };
  const picture = (image) => {
    const text = small(image);
    const frame = make("span", { class: text ? "picture" : "picture missing" });
    if (text) frame.append(make("img", { src: text, alt: "", decoding: "async" }));
    return frame;
  };

  // The table -----------------------------------------------------------------------------------

  const truth = data.before !== null;
  const COLUMNS = [
    { key: "place", label: "#", title: "Place in the list of queries", values: queries },
    { key: "query", label: "Query" },
    { key: "name", label: truth ? "Name, and first answer" : "Name", text: (q) => names[q] },
    truth ? { key: "answer", label: "Answer" } : { key: "answers", label: data.shown > 1 ? "Answers, best first" : "Answer" },
    { key: "status", label: "Status", value: (q) => ORDER.indexOf(data.status[q]) },
    truth && { key: "before", label: data.reranked ? "Rank before" : "Rank", title: "Rank of the first right candidate" + (data.reranked ? " before re-ranking" : ""), values: data.before, amount: true, empty: 0, falling: true },
    truth && data.reranked && { key: "after", label: "Rank after", title: "Rank of the first right candidate after re-ranking", values: data.after, amount: true, empty: 0, falling: true },
    data.score && { key: "score", label: "Score", title: "Of the first answer; comparable between queries, larger is more similar", values: data.score, amount: true },
    data.confidence && { key: "confidence", label: "Confidence, %", title: "How likely the first answer is right", values: data.confidence, amount: true },
    data.distance && { key: "distance", label: `Distance${unit(0) && `,${unit(0)}`}`, title: "Of the first answer from the query", none: "another clip", values: data.distance, amount: true, falling: true },
  ].filter(Boolean);
  const sortable = COLUMNS.filter((column) => column.values || column.value || column.text);
  for (const column of COLUMNS) if (column.values) column.show = aligned(column.values);
  const names = queries.map((q) => nameOf(q).toLowerCase());
  const state = { filters: new Set(), text: "", sort: "place", falling: false, page: 0 };
  let view = queries;

  const collator = new Intl.Collator("en", { numeric: true });
  function choose() {
    const wanted = state.text.trim().toLowerCase();
    view = queries.filter(
      (q) => (!state.filters.size || state.filters.has(data.status[q])) && (!wanted || data.names[q].toLowerCase().includes(wanted)),
    );
    const column = COLUMNS.find((other) => other.key === state.sort);
    const sign = state.falling ? -1 : 1;
    if (column.text) view.sort((a, b) => sign * collator.compare(column.text(a), column.text(b)) || a - b);
    else if (column.key !== "place" || state.falling) {
      const of = column.value || ((q) => column.values[q]);
      const lacks = (value) => value === null || (column.empty !== undefined && value === column.empty);
      view.sort((a, b) => {
        const [x, y] = [of(a), of(b)];
        if (lacks(x) || lacks(y)) {
          // A right candidate that is not found ranks behind all.
          return (column.empty === undefined ? 1 : sign) * (lacks(x) - lacks(y)) || a - b;
        }
        return sign * (x - y) || a - b;
      });
    }
    state.page = 0;
    show();
    map?.draw();
  }

  function answersOf(q) {
    if (!details(q)) return "";
    const key = data.reranked ? "after" : "before";
    const best = candidatesOf(q).filter((c) => c[key] && c[key] <= data.shown).sort((a, b) => a[key] - b[key]);
    return make("ol", {}, ...best.map((c) => {
      const score = data.reranked ? c.raw : c.global;
      return make("li", { title: data.names[c.image] },
        make("span", { class: "name" }, `${c[key]}. ${nameOf(c.image).split("/").pop()}`),
        make("small", {}, score === null ? "" : supports(c) || `score ${short(score)}`), picture(c.image));
    }));
  }

  // What supports a candidate: its score, and the patches that agree, if their number is known.
  const agreeing = (c) => (data.patches.length && c.sizes ? c.sizes.map((score, s) => Math.round(-score * data.patches[s])) : null);
  function supports(c) {
    const agree = agreeing(c);
    return agree && `${short(c.raw)}, ${agree.reduce((a, b) => a + b, 0)} patches`;
  }

  function row(q) {
    const answer = data.answer[q];
    const cells = {
      place: () => make("td", { role: "cell", class: "place" }, format.format(q + 1)),
      query: () => make("td", { role: "cell", class: "pic" }, picture(q)),
      name: () =>
        make("th", { role: "rowheader", scope: "row", class: "names" },
          make("a", { href: `#q=${q + 1}`, title: data.names[q] }, nameOf(q)), truth ? make("small", {}, `→ ${nameOf(answer)}`) : null),
      answer: () => make("td", { role: "cell", class: "pic" }, picture(answer)),
      answers: () => make("td", { role: "cell", class: "answers" }, answersOf(q)),
      status: () => make("td", { role: "cell", class: "state" }, badge(data.status[q])),
    };
    return make("tr", { role: "row", "data-q": q },
      ...COLUMNS.map((column) => {
        if (cells[column.key]) return cells[column.key]();
        const value = column.values[q];
        const text = column.empty !== undefined ? (data.status[q] === "n" ? "–" : rank(value)) : value === null && column.none ? column.none : column.show(value);
        return make("td", { role: "cell", class: "amount", "data-label": column.label }, text);
      }));
  }

  function show() {
    const pages = Math.max(1, Math.ceil(view.length / PAGE));
    state.page = Math.min(Math.max(0, state.page), pages - 1);
    const start = state.page * PAGE;
    const part = view.slice(start, start + PAGE);
    $("rows").replaceChildren(...part.map(row));
    $("table").hidden = !view.length;
    $("pager").hidden = pages < 2;
    $("page-number").textContent = `Page ${format.format(state.page + 1)} of ${format.format(pages)}`;
    for (const id of ["page-first", "page-previous"]) $(id).disabled = state.page === 0;
    for (const id of ["page-next", "page-last"]) $(id).disabled = state.page === pages - 1;
    const range = part.length < view.length ? `, ${format.format(start + 1)} to ${format.format(start + part.length)} shown` : "";
    const noun = view.length === 1 ? "query" : "queries";
    $("count").textContent = view.length
      ? `${format.format(view.length)} ${noun}${range}`
      : "No query is like that. Choose All, or another part of a name.";
    for (const chip of $("filters").children) {
      const letter = chip.dataset.status;
      chip.setAttribute("aria-pressed", letter ? state.filters.has(letter) : !state.filters.size);
    }
    for (const cell of $("head").children) {
      if (cell.dataset.key === state.sort) cell.setAttribute("aria-sort", state.falling ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    }
    $("sort").value = `${state.sort} ${state.falling ? "falling" : "rising"}`;
  }

  function turn(page) {
    state.page = page;
    show();
    $("queries").scrollIntoView();
  }

  function buildTable() {
    const filter = (letter, word, count, meaning) =>
      make("button", {
        type: "button", class: "chip", title: meaning, "data-status": letter,
        onclick: () => {
          if (!letter) state.filters.clear();
          else if (!state.filters.delete(letter)) state.filters.add(letter);
          choose();
        },
      }, letter ? icon(letter) : "", word, make("span", { class: "number" }, format.format(count)));
    const letters = [...(truth ? (data.reranked ? "rswhn" : "rwn") : data.reranked ? "cu" : "")];
    const count = {};
    for (const letter of data.status) count[letter] = (count[letter] || 0) + 1;
    if (letters.length) {
      $("filters").append(
        filter("", "All", data.queries, "all queries"),
        ...letters.filter((letter) => letter !== "n" || count.n).map((letter) => filter(letter, STATUS[letter][0], count[letter] || 0, STATUS[letter][1])),
      );
    }
    $("head").append(
      ...COLUMNS.map((column) =>
        make("th", { role: "columnheader", scope: "col", class: column.amount ? "amount" : null, "data-key": column.key, title: column.title },
          sortable.includes(column)
            ? make("button", {
                type: "button",
                onclick: () => {
                  const again = state.sort === column.key;
                  state.falling = again ? !state.falling : Boolean(column.falling);
                  state.sort = column.key;
                  choose();
                },
              }, column.label)
            : make("span", {}, column.label))),
    );
    for (const column of sortable) {
      for (const way of ["rising", "falling"]) {
        $("sort").append(make("option", { value: `${column.key} ${way}` }, `${column.label} ${way === "rising" ? "↑" : "↓"}`));
      }
    }
    $("sort").addEventListener("change", (event) => {
      const [key, way] = event.target.value.split(" ");
      state.sort = key;
      state.falling = way === "falling";
      choose();
    });
    let waiting = 0;
    $("search").addEventListener("input", (event) => {
      state.text = event.target.value;
      clearTimeout(waiting);
      waiting = setTimeout(choose, 120);
    });
    $("page-first").addEventListener("click", () => turn(0));
    $("page-previous").addEventListener("click", () => turn(state.page - 1));
    $("page-next").addEventListener("click", () => turn(state.page + 1));
    $("page-last").addEventListener("click", () => turn(Infinity));
    $("rows").addEventListener("click", (event) => {
      const line = event.target.closest("tr");
      if (!line) return;
      if (event.target.closest("a")) {
        if (event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return; // elsewhere
        event.preventDefault();
      } else if (String(getSelection())) return;
      go(Number(line.dataset.q));
    });
    $("rows").addEventListener("keydown", (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!step) return;
      const links = [...$("rows").querySelectorAll("a")];
      const next = links[links.indexOf(document.activeElement) + step];
      if (next) {
        event.preventDefault();
        next.focus();
      }
    });
    $("toolbar").hidden = false;
  }

  // One query -----------------------------------------------------------------------------------

  const dialog = $("detail");
  const narrow = matchMedia("(max-width: 760px)");
  let open = null; // { q, candidate }
  let hiddenSizes = new Set();
  let allLines = false; // or a few that are spread out

  const details = (q) => block(`details-${Math.floor(q / data.detailChunk)}`)?.[q % data.detailChunk];
  const candidatesOf = (q) =>
    details(q).c.map(([image, before, after, global, raw, sizes, away, right], place) => ({
      place, image, before, after, global, raw, sizes, away, right: right === null ? null : Boolean(right),
    }));

  function address(q, candidate) {
    return `#q=${q + 1}${candidate ? `&c=${candidate + 1}` : ""}`;
  }
  function asked() { // what the address asks for
    const found = /^#q=(\d+)(?:&c=(\d+))?$/.exec(location.hash);
    const q = found ? Number(found[1]) - 1 : -1;
    return q in queries ? { q, candidate: found[2] ? Number(found[2]) - 1 : 0 } : null;
  }
  let leaving = false; // on the way back to the table, which takes a moment
  let next = null; // what was asked for meanwhile
  function go(q, candidate = 0) {
    if (leaving) {
      next = [q, candidate];
      return;
    }
    const hash = address(q, candidate);
    // Within the view of queries, the way back leads to the table.
    if (asked()) history.replaceState(history.state, "", hash);
    else {
      history.scrollRestoration = "manual"; // the table stays where it is, or follows the focus
      history.pushState({ table: true }, "", hash); // the table is one step back
    }
    read();
  }
  let last = "";
  function read() {
    if (document.readyState === "loading") return; // details are not there yet; ready() reads
    if (dialog.open && location.hash === last) return;
    last = location.hash;
    const wanted = asked();
    if (!wanted) {
      history.scrollRestoration = "auto";
      if (dialog.open) dialog.close();
      return;
    }
    const { q, candidate } = wanted;
    showQuery(q, candidate in details(q).c ? candidate : 0);
  }

  const listed = (q) => (view.includes(q) ? view : queries);
  function step(by) {
    const list = listed(open.q);
    const next = list[list.indexOf(open.q) + by];
    if (next !== undefined) go(next);
  }

  function showQuery(q, candidate) {
    const same = open && open.q === q;
    open = { q, candidate };
    const list = listed(q);
    const place = list.indexOf(q);
    const word = STATUS[data.status[q]];
    $("detail-title").textContent = nameOf(q);
    $("detail-status").replaceChildren(badge(data.status[q]), make("small", {}, ` ${word[1]}`));
    $("detail-where").textContent = `${format.format(place + 1)} of ${format.format(list.length)}${list.length < data.queries ? " chosen" : ""}`;
    $("detail-previous").disabled = place === 0;
    $("detail-next").disabled = place === list.length - 1;
    const all = candidatesOf(q);
    if (same && $("strips").childElementCount) {
      for (const card of $("strips").querySelectorAll(".card")) {
        card.setAttribute("aria-pressed", Number(card.dataset.candidate) === candidate);
      }
    } else {
      showStrips(q, all, candidate);
      $("detail-body").scrollTop = 0;
    }
    showScores(all, candidate);
    if (!dialog.open) {
      dialog.showModal();
      $("detail-title").focus();
    }
    showPair(q, all[candidate]); // which measures its captions
    $("detail-says").textContent = `Query ${nameOf(q)}, ${word[0]}: ${word[1]}. Shown with ${rankText(all[candidate])}.`;
  }

  function rankText(candidate) {
    if (!candidate.after) return `the nearest right image, which is not among the ${data.k} candidates`;
    if (!data.reranked) return `rank ${candidate.before}`;
    return `rank ${candidate.after}, ${candidate.before} before re-ranking`;
  }

  function showStrips(q, all, chosen) {
    const strip = (title, key, extra) => {
      const first = data[key === "after" && data.reranked ? "after" : "before"];
      const wanted = all
        .filter((c) => c[key] && (c[key] <= data.shown || (first && c[key] === first[q])))
        .sort((a, b) => a[key] - b[key]);
      const card = (c) => {
        const label = c[key] ? `${c[key]}` : `not among ${data.k}`;
        return make("li", { class: !c[key] || c[key] > data.shown ? "apart" : null },
          make("button", {
            type: "button", class: "card", title: data.names[c.image], "data-candidate": c.place,
            "aria-pressed": c.place === chosen, onclick: () => go(q, c.place),
          },
          make("span", { class: "says" }, make("span", { class: "rank" }, label), mark(c.right)),
          make("span", { class: "away" }, truth ? awayText(c.away) : nameOf(c.image)),
          make("span", { class: "sr" }, nameOf(c.image)),
          picture(c.image)));
      };
      const method = make("i", { class: `swatch ${key === "before" ? key : sequence ? "sequence" : key}`, "aria-hidden": "true" });
      return make("div", { class: "strip" }, make("h3", {}, method, title), make("ul", {}, ...[...wanted, ...extra].map(card)));
    };
    const missed = all.filter((c) => !c.after);
    $("strips").replaceChildren(
      ...(data.reranked
        ? [strip(`Candidates after re-ranking (${data.final})`, "after", missed), strip("Before (NetVLAD)", "before", [])]
        : [strip("Candidates", "before", missed)]),
    );
  }

  function showScores(all, chosen) {
    const show = (of) => {
      const text = aligned(all.map(of));
      return (c) => text(of(c));
    };
    const columns = [
      data.reranked && ["After", (c) => (c.after ? rank(c.after) : "–")],
      [data.reranked ? "Before" : "Rank", (c) => (c.before ? rank(c.before) : "–")],
      ["Candidate", null],
      truth && ["", (c) => mark(c.right)],
      truth && [`Distance${unit(0) && `,${unit(0)}`}`, ((text) => (c) => (c.away === null ? "another clip" : text(c)))(show((c) => c.away))],
      data.reranked && data.scored && ["Score", show((c) => c.raw)],
      ...(data.scored
        ? data.sizes.map((size, s) => data.patches.length
          ? [`Size ${size}: agree, of ${format.format(data.patches[s])}`, show((c) => (c.sizes ? agreeing(c)[s] : null))]
          : [`Patch size ${size}`, show((c) => (c.sizes ? c.sizes[s] : null))])
        : []),
      all.some((c) => c.global !== null) && ["NetVLAD", show((c) => c.global)],
    ].filter(Boolean);
    const rows = [...all].sort((a, b) => (a.after || Infinity) - (b.after || Infinity));
    $("candidates").replaceChildren(
      make("thead", { role: "rowgroup" }, make("tr", { role: "row" }, ...columns.map(([label, of]) =>
        make("th", { role: "columnheader", scope: "col", class: of ? null : "name" }, label || make("span", { class: "sr" }, "Right or wrong"))))),
      make("tbody", { role: "rowgroup" }, ...rows.map((c) =>
        make("tr", { role: "row", class: c.place === chosen ? "chosen" : null }, ...columns.map(([label, of]) =>
          of ? make("td", { role: "cell", "data-label": label }, of(c)) : make("th", { role: "rowheader", scope: "row", class: "name" }, nameOf(c.image)))))),
    );
    const notes = [];
    if (data.reranked && data.scored) notes.push(`Score: larger is more similar, comparable between queries. ${data.patches.length ? "Agree: patches of the query that match the candidate's under one homography per size." : "Scores of one patch size: lower is more similar."} ${sequence ? "Candidates are ordered by those of the queries before and after." : "Candidates are ordered by the scores of all sizes, standardised over all candidates of the query."}`);
    if (all.some((c) => c.global !== null)) notes.push("NetVLAD: minus the distance of global descriptors.");
    $("scores-note").textContent = notes.join(" ");
    showUsual(all.find((c) => c.place === chosen));
  }

  // How this candidate scores beside right and wrong pairs.
  function showUsual(c) {
    const of = (spread) => `${short(spread.score[0])} to ${short(spread.score[2])}${spread.patches.length ? ` (${data.sizes.map((size, s) => `${format.format(Math.round(spread.patches[s][0]))} to ${format.format(Math.round(spread.patches[s][2]))} of size ${size}`).join(", ")})` : ""}`;
    const said = data.usual.length && c && c.raw !== null
      ? [
          `Score ${short(c.raw)}${agreeing(c) ? ` (${data.sizes.map((size, s) => `${format.format(agreeing(c)[s])} of size ${size}`).join(", ")})` : ""}.`,
          ...data.usual.flatMap((usual) => {
            const on = usual.source ? ` on ${usual.source}` : " in this run";
            return [
              usual.right && `Usual${on} for right first answers: ${of(usual.right)}${usual.best_wrong ? ";" : "."}`,
              usual.best_wrong && `for the first wrong candidate of a query: ${of(usual.best_wrong)}.`,
            ];
          }),
        ].filter(Boolean).join(" ")
      : "";
    $("usual-note").textContent = said;
  }

  function showPair(q, candidate) {
    const about = [make("b", {}, nameOf(candidate.image)), ` – ${rankText(candidate)}`];
    if (truth) about.push(`, ${awayText(candidate.away)}`);
    if (candidate.right !== null) about.push(", ", mark(candidate.right));
    $("pair-query").replaceChildren(make("b", {}, "Query"));
    $("pair-candidate").replaceChildren(...about);
    const stacked = narrow.matches;
    // Each caption stands above its picture.
    $(stacked ? "pair" : "pair-text").append($("pair-candidate"));
    const ratios = [q, candidate.image].map((image) => data.ratios[image] || 4 / 3);
    const gap = stacked ? ($("pair-candidate").offsetHeight * 400) / ($("pair").clientWidth || 400) : 10;
    // One height beside each other, one width above each other.
    const frames = ratios.map((ratio) => (stacked ? { w: 400, h: 400 / ratio } : { w: 400 * ratio, h: 400 }));
    frames[0].x = frames[0].y = 0;
    frames[1].x = stacked ? 0 : frames[0].w + gap;
    frames[1].y = stacked ? frames[0].h + gap : 0;
    const width = frames[1].x + frames[1].w;
    const height = frames[1].y + frames[1].h;
    const found = (details(q).m || []).find(([place]) => place === candidate.place);
    const svg = draw("svg", { viewBox: `0 0 ${width.toFixed(1)} ${height.toFixed(1)}`, role: "img" });
    svg.append(draw("title"));
    const word = data.inliers ? "inliers" : "matches";
    const text = found
      ? `; lines join some of the matched patches: ${data.sizes.map((size, s) => `patch size ${size}, ${found[s + 1][0]} ${word}`).join("; ")}`
      : "";
    svg.firstChild.textContent = `${nameOf(q)} and ${nameOf(candidate.image)}${text}`;
    [q, candidate.image].forEach((image, i) => {
      const { x, y, w, h } = frames[i];
      const href = large(image);
      if (href) svg.append(draw("image", { href, x, y, width: w, height: h, preserveAspectRatio: "none" }));
      else {
        svg.append(draw("rect", { class: "blank", x: x + 1, y: y + 1, width: w - 2, height: h - 2, rx: 4 }));
        const says = draw("text", { x: x + w / 2, y: y + h / 2 });
        says.textContent = "no picture";
        svg.append(says);
      }
    });
    const groups = [];
    if (found) {
      found.slice(1).forEach(([, ends, few], s) => {
        let lines = "";
        let dots = "";
        for (let i = 0; i < (allLines ? ends.length : 4 * few); i += 4) {
          const [a, b] = [0, 1].map((side) => {
            const { x, y, w, h } = frames[side];
            return `${(x + (ends[i + 2 * side] / 1000) * w).toFixed(1)} ${(y + (ends[i + 2 * side + 1] / 1000) * h).toFixed(1)}`;
          });
          lines += `M${a}L${b}`;
          dots += `M${a}h0M${b}h0`;
        }
        const colour = data.colours[s % data.colours.length];
        groups[s] = draw("g", { "data-size": data.sizes[s] },
          draw("path", { class: "halo", d: lines }),
          draw("path", { class: "strokes", d: lines, stroke: colour }),
          draw("path", { class: "ends", d: dots, stroke: colour }));
      });
      // The most numerous size first, so that it does not hide the others.
      const order = groups.map((_, s) => s).sort((a, b) => found[b + 1][0] - found[a + 1][0]);
      for (const s of order) svg.append(groups[s]);
    }
    const caption = $("pair-candidate");
    $("pair").replaceChildren(svg, ...(stacked ? [caption] : []));
    caption.style.top = stacked ? `${(100 * frames[0].h) / height}%` : "";
    const toggles = !data.sizes.length
      ? []
      : !found
        ? [make("span", { class: "quiet" }, "not in this report for this candidate: they are of first answers and of the first right one, for as many queries as --matches says.")]
        : data.sizes.map((size, s) => {
            const [count, ends] = found[s + 1];
            const box = make("input", { type: "checkbox" });
            box.checked = !hiddenSizes.has(size);
            groups[s].toggleAttribute("hidden", !box.checked);
            groups[s].style.display = box.checked ? "" : "none";
            box.addEventListener("change", () => {
              if (box.checked) hiddenSizes.delete(size);
              else hiddenSizes.add(size);
              groups[s].style.display = box.checked ? "" : "none";
            });
            const swatch = make("span", { class: "swatch" });
            swatch.style.background = data.colours[s % data.colours.length];
            const of = data.patches.length ? ` of ${format.format(data.patches[s])}` : "";
            const one = count === 1 ? word.replace(/(es|s)$/, "") : word;
            return make("label", {}, box, swatch, `size ${size}: ${format.format(count)}${of} ${one}`);
          });
    if (found) toggles.push(linesToggle(q, candidate, found));
    $("sizes").replaceChildren($("sizes").querySelector("legend"), ...toggles);
    $("sizes").hidden = !data.sizes.length;
  }

  function linesToggle(q, candidate, found) {
    const box = make("input", { type: "checkbox", id: "all-lines" });
    box.checked = allLines;
    box.addEventListener("change", () => {
      allLines = box.checked;
      showPair(q, candidate);
      $("all-lines").focus();
    });
    const sum = (of) => found.slice(1).reduce((so, size) => so + of(size), 0);
    const [few, most] = [sum(([, , shown]) => shown), sum(([, ends]) => ends.length / 4)];
    return make("label", { title: "Few lines, far from each other, hide less" }, box, `${format.format(most)} lines in place of ${format.format(few)}`);
  }

  function buildDialog() {
    $("detail-previous").addEventListener("click", () => step(-1));
    $("detail-next").addEventListener("click", () => step(1));
    $("detail-close").addEventListener("click", () => dialog.close());
    dialog.addEventListener("click", (event) => {
      if (event.target === dialog) dialog.close(); // beside it
    });
    dialog.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (by && !event.altKey && !event.ctrlKey && !event.metaKey) {
        event.preventDefault();
        step(by);
      }
    });
    dialog.addEventListener("close", () => {
      // The event comes later than the closing: it may be open again, or this have been done.
      if (dialog.open || !open) return;
      const { q } = open;
      open = null;
      if (asked()) {
        if (history.state?.table) {
          leaving = true;
          history.back();
        } else history.replaceState(null, "", "#");
      }
      const place = view.indexOf(q);
      if (place >= 0 && Math.floor(place / PAGE) !== state.page) {
        state.page = Math.floor(place / PAGE);
        show();
      }
      const link = $("rows").querySelector(`tr[data-q="${q}"] a`);
      (link || $("queries")).focus();
    });
    narrow.addEventListener("change", () => open && showPair(open.q, candidatesOf(open.q)[open.candidate]));
  }

  // The map -------------------------------------------------------------------------------------

  let map = null;
  function buildMap() {
    const { queries: of, index, rows, extent, line, clips } = data.map;
    const canvas = $("map-canvas");
    const pen = canvas.getContext("2d");
    const place = (list, i) => [list[2 * i], list[2 * i + 1]];
    let [right, top] = [0, 0];
    for (const list of [of, index]) {
      for (let i = 0; i < list.length; i += 2) {
        right = Math.max(right, list[i]);
        top = Math.max(top, list[i + 1]);
      }
    }
    // Where one axis is much longer than the other, they have a scale each.
    const apart = !line && (clips > 0 || Math.min(right, top) > 0 && Math.max(right, top) / Math.min(right, top) > 12);
    const flat = line || !top || !right;
    canvas.classList.toggle("flat", flat);
    let zoom = 1;
    let middle = [right / 2, top / 2];
    let scale = [1, 1];
    let size = [1, 1];
    let over = -1;
    const colours = () => {
      const style = getComputedStyle(document.documentElement);
      const value = (name) => style.getPropertyValue(name).trim();
      return { dot: value("--dot"), paper: value("--paper"), r: value("--right"), w: value("--wrong"), s: value("--rescued"), h: value("--hurt"), n: value("--none"), ink: value("--ink") };
    };
    const shape = (context, letter, x, y, radius) => {
      context.beginPath();
      if (letter === "r") context.arc(x, y, radius, 0, 2 * Math.PI);
      else if (letter === "w") {
        context.moveTo(x - radius, y - radius);
        context.lineTo(x + radius, y + radius);
        context.moveTo(x + radius, y - radius);
        context.lineTo(x - radius, y + radius);
      } else if (letter === "n") context.rect(x - radius, y - radius, 2 * radius, 2 * radius);
      else {
        const up = letter === "s" ? -1 : 1;
        context.moveTo(x, y + up * radius * 1.3);
        context.lineTo(x + radius * 1.2, y - up * radius);
        context.lineTo(x - radius * 1.2, y - up * radius);
        context.closePath();
      }
      if (letter === "w" || letter === "n") context.stroke();
      else context.fill();
    };
    const screen = ([x, y]) => [
      size[0] / 2 + (x - middle[0]) * scale[0],
      size[1] / 2 - (y - middle[1]) * scale[1],
    ];
    function drawMap() {
      const ratio = devicePixelRatio || 1;
      const box = canvas.getBoundingClientRect();
      if (!box.width) return;
      size = [box.width, box.height];
      if (canvas.width !== Math.round(box.width * ratio) || canvas.height !== Math.round(box.height * ratio)) {
        canvas.width = Math.round(box.width * ratio);
        canvas.height = Math.round(box.height * ratio);
      }
      const room = [box.width - 40, box.height - 40];
      const fit = [room[0] / (right || 1), room[1] / (top || 1)];
      const least = Math.min(...fit);
      scale = (apart || line ? fit : [least, least]).map((value) => value * zoom);
      pen.setTransform(ratio, 0, 0, ratio, 0, 0);
      const colour = colours();
      pen.fillStyle = colour.paper;
      pen.fillRect(0, 0, ...size);
      const dot = index.length > 8000 ? 2.5 : index.length > 800 ? 3.5 : 4;
      const drawIndex = () => {
        for (let i = 0; i < index.length / 2; i++) {
          const [x, y] = screen(place(index, i));
          pen.fillStyle = colour.paper;
          if (few) pen.fillRect(x - dot / 2 - 1, y - dot / 2 - 1, dot + 2, dot + 2);
          pen.fillStyle = colour.dot;
          pen.fillRect(x - dot / 2, y - dot / 2, dot, dot);
        }
      };
      const few = index.length <= 800; // these stay visible where a query is at the same place
      if (!few) drawIndex();
      const chosen = new Uint8Array(data.queries);
      for (const q of view) chosen[q] = 1;
      const radius = data.queries > 2000 ? 3 : data.queries > 400 ? 3.6 : 4.5;
      pen.lineWidth = 2;
      // What went wrong lies on top of what did not.
      for (const letter of ["n", "r", "w", "s", "h"]) {
        pen.fillStyle = pen.strokeStyle = colour[letter];
        for (let q = 0; q < data.queries; q++) {
          if (data.status[q] !== letter) continue;
          pen.globalAlpha = chosen[q] ? 0.9 : 0.1;
          shape(pen, letter, ...screen(place(of, q)), radius);
        }
      }
      pen.globalAlpha = 1;
      if (few) drawIndex();
      if (over >= 0) {
        const from = screen(place(of, over));
        const to = screen(place(index, rows[data.answer[over] - data.queries]));
        pen.strokeStyle = colour.ink;
        pen.lineWidth = 1.5;
        pen.beginPath();
        pen.moveTo(...from);
        pen.lineTo(...to);
        pen.stroke();
        pen.beginPath();
        pen.arc(...from, radius + 3.5, 0, 2 * Math.PI);
        pen.stroke();
        pen.strokeRect(to[0] - 4, to[1] - 4, 8, 8);
      }
    }
    let asked = false;
    const redraw = () => {
      if (asked) return;
      asked = true;
      requestAnimationFrame(() => {
        asked = false;
        drawMap();
      });
    };
    const at = (event) => {
      const box = canvas.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    const nearest = ([x, y]) => {
      let [best, least] = [-1, 14 * 14];
      for (const q of view) {
        const [px, py] = screen(place(of, q));
        const away = (px - x) ** 2 + (py - y) ** 2;
        if (away < least) [best, least] = [q, away];
      }
      return best;
    };
    const say = (q) => {
      $("map-says").textContent = q < 0 ? idle : `${nameOf(q)}: ${STATUS[data.status[q]][0].toLowerCase()}. Its first answer, in the square, is ${data.distance[q] === null ? "of another clip" : awayText(data.distance[q])}. Click to open it.`;
    };
    const [wide, high] = extent.map((value) => `${short(value)}${unit(value)}`);
    const idle = clips
      ? `${format.format(clips)} clip${clips > 1 ? "s" : ""} from left to right, ${high} from bottom to top.`
      : line
      ? `Queries above, index images below; ${wide} from left to right.`
      : flat
        ? `${short(Math.max(...extent))}${unit(0)} from end to end.`
        : `${wide} from left to right, ${high} from bottom to top${apart ? ", not at one scale" : ""}.`;
    let drag = null;
    canvas.addEventListener("pointerdown", (event) => {
      drag = { start: at(event), middle, moved: false };
    });
    canvas.addEventListener("pointermove", (event) => {
      const now = at(event);
      if (drag && event.buttons) {
        const by = [now[0] - drag.start[0], now[1] - drag.start[1]];
        if (zoom > 1 && Math.hypot(...by) > 4) {
          drag.moved = true;
          canvas.setPointerCapture(event.pointerId);
          middle = [drag.middle[0] - by[0] / scale[0], drag.middle[1] + by[1] / scale[1]];
          redraw();
        }
        return;
      }
      const q = nearest(now);
      if (q === over) return;
      over = q;
      canvas.style.cursor = q < 0 ? "" : "pointer";
      say(q);
      redraw();
    });
    canvas.addEventListener("pointerleave", () => {
      over = -1;
      say(-1);
      redraw();
    });
    canvas.addEventListener("click", (event) => {
      const moved = drag && drag.moved;
      drag = null;
      const q = moved ? -1 : nearest(at(event));
      if (q >= 0) go(q);
    });
    const zoomBy = (factor, around = [size[0] / 2, size[1] / 2]) => {
      const next = Math.min(64, Math.max(1, zoom * factor));
      const shift = [around[0] - size[0] / 2, size[1] / 2 - around[1]];
      middle = middle.map((value, i) => value + (shift[i] / scale[i]) * (1 - zoom / next));
      zoom = next;
      if (zoom === 1) middle = [right / 2, top / 2];
      canvas.style.touchAction = zoom > 1 ? "none" : "";
      redraw();
    };
    canvas.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return; // the page scrolls
      event.preventDefault();
      zoomBy(event.deltaY < 0 ? 1.25 : 0.8, at(event));
    }, { passive: false });
    $("map-in").addEventListener("click", () => zoomBy(1.6));
    $("map-out").addEventListener("click", () => zoomBy(1 / 1.6));
    $("map-all").addEventListener("click", () => zoomBy(0));
    function legend() {
      const colour = colours();
      const entry = (letter, text) => {
        const sample = make("canvas", { width: 32, height: 32, "aria-hidden": "true" });
        const context = sample.getContext("2d");
        context.scale(2, 2);
        context.fillStyle = context.strokeStyle = letter ? colour[letter] : colour.dot;
        context.lineWidth = 2;
        if (letter) shape(context, letter, 8, 8, 4.5);
        else context.fillRect(5.5, 5.5, 5, 5);
        return make("li", {}, sample, text);
      };
      const there = [..."rswhn"].filter((letter) => data.status.includes(letter));
      $("map-legend").replaceChildren(entry("", "index image"), ...there.map((letter) => entry(letter, STATUS[letter][0].toLowerCase())));
    }
    $("map").hidden = false;
    legend();
    say(-1);
    new ResizeObserver(redraw).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      legend();
      redraw();
    });
    map = { draw: redraw };
  }

  // ---------------------------------------------------------------------------------------------

  buildTable();
  buildDialog();
  if (data.map) buildMap();
  choose();
  const ready = () => {
    show(); // with the pictures that were not there yet
    read();
    addEventListener("popstate", () => {
      leaving = false;
      if (next) go(...next);
      next = null;
    });
    addEventListener("hashchange", read);
    document.documentElement.dataset.ready = "";
  };
  if (document.readyState === "loading") addEventListener("DOMContentLoaded", ready);
  else ready();
})();
