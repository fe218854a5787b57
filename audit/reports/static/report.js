// The report's table and its opened rows. Data comes as calls in script files (data.js, rows/ID.js), so that the page
// works from disk; every text reaches the page as a text node, never as markup.
"use strict";

const BE_AUDIT = (() => {
  const find = (id) => document.getElementById(id);
  const state = { words: [], verdicts: new Set(), score: "", sort: "", down: true, grouped: true, page: 0, size: 50 };
  const opened = new Set(); // row ids and template labels whose rows are open
  const panels = new Map(); // row id -> cell of its detail, kept as it was set while the table is drawn again
  const more = new Map(); // template -> how many of its captions are shown
  const details = new Map(); // row id -> promise of its detail
  const arrived = new Map(); // row id -> what to call with its detail
  const RISING = new Set(["caption", "verdict", "p_value", "q_value", "best_distance", "best_correlation_distance"]); // sorted upwards at first
  const MEMBERS = 50;
  let data, col, haystack, lower, rank, entries = [];

  // ---------------------------------------------------------------- building elements

  function el(tag, props = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(props)) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (name === "class") made.className = value;
      else made.setAttribute(name, value === true ? "" : value);
    }
    made.append(...children.filter((child) => child !== null && child !== undefined));
    return made;
  }

  function svg(tag, props, ...children) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(props)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  const badge = (verdict) =>
    el("span", { class: `badge ${verdict}`, title: data.verdicts[verdict] }, verdict.replace("_", " "));

  function figure(value) {
    if (value === null || value === undefined) return "–";
    if (typeof value !== "number") return String(value);
    if (Number.isInteger(value)) return value.toLocaleString("en");
    const size = Math.abs(value);
    return size >= 1e5 || size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  }

  // Only http and https become links; everything else stays text.
  function source(text) {
    if (!text) return "–";
    let url = null;
    try { url = new URL(text); } catch { /* not a URL: text */ }
    if (url && (url.protocol === "http:" || url.protocol === "https:")) {
      return el("a", { href: url.href, rel: "noopener noreferrer nofollow", target: "_blank" }, el("bdi", {}, text));
    }
    return el("bdi", {}, text);
  }

  // ---------------------------------------------------------------- which rows, in which order

  const verdictOf = (row) => col.verdict[row] ?? "unconfirmed";

  function keyOf(name) {
    if (name === "caption") return (row) => lower[row];
    if (name === "verdict") return (row) => rank[row];
    const values = col[name] ?? [];
    return (row) => values[row];
  }

  function select() {
    let rows = [];
    for (let row = 0; row < data.ids.length; row++) {
      if (state.verdicts.size && !state.verdicts.has(verdictOf(row))) continue;
      if (state.words.every((word) => haystack[row].includes(word))) rows.push(row);
    }
    if (state.sort) {
      const key = keyOf(state.sort), sign = state.down ? -1 : 1;
      const known = rows.filter((row) => key(row) !== null && key(row) !== undefined);
      const unknown = rows.filter((row) => key(row) === null || key(row) === undefined);
      known.sort((a, b) => (key(a) < key(b) ? -sign : key(a) > key(b) ? sign : a - b));
      rows = known.concat(unknown); // what has no value comes last both ways
    }
    const groups = new Map();
    for (const row of rows) {
      const key = state.grouped ? col.template[row] : row;
      if (groups.has(key)) groups.get(key).push(row);
      else groups.set(key, [row]);
    }
    entries = [...groups.values()];
    const pages = Math.max(1, Math.ceil(entries.length / state.size));
    state.page = Math.min(state.page, pages - 1);
    const captions = rows.length.toLocaleString("en"), all = data.ids.length.toLocaleString("en");
    const findings = entries.length.toLocaleString("en");
    const what = state.grouped ? `${findings} finding${entries.length === 1 ? "" : "s"}, ` : "";
    find("status").textContent = `${what}${captions} of ${all} flagged captions`;
    find("page").textContent = `Page ${state.page + 1} of ${pages}`;
    find("previous").disabled = state.page === 0;
    find("next").disabled = state.page >= pages - 1;
  }

  // ---------------------------------------------------------------- the table

  function columns() {
    const shown = [
      { name: null, title: "Open" },
      { name: "verdict", title: "Verdict", text: "global, local, none; unconfirmed where no image was compared" },
      { name: "caption", title: "Caption" },
      { name: state.score, title: state.score, text: data.about[state.score], number: true },
    ];
    for (const [name, title] of [["best_sscd", "SSCD"], ["q_value", "q-value"]]) {
      if (col[name]) shown.push({ name, title, text: data.about[name], number: true });
    }
    shown.push({ name: "occurrences", title: "Rows", text: data.about.occurrences, number: true });
    return shown;
  }

  function drawHeads() {
    find("heads").replaceChildren(...columns().map((column) => {
      if (!column.name) return el("th", { scope: "col" }, el("span", { class: "hidden" }, column.title));
      const sorted = state.sort === column.name;
      const order = sorted ? (state.down ? "descending" : "ascending") : null;
      const arrow = sorted ? (state.down ? " ↓" : " ↑") : "";
      const press = () => {
        state.down = sorted ? !state.down : !RISING.has(column.name);
        state.sort = column.name;
        state.page = 0;
        draw();
        find("heads").querySelector(`[data-name="${column.name}"]`).focus();
      };
      const button = el("button", { type: "button", title: column.text, "data-name": column.name, onclick: press },
        column.title + arrow);
      return el("th", { scope: "col", class: column.number ? "number" : null, "aria-sort": order }, button);
    }));
  }

  function thumbnails(row) {
    const found = data.pictures[data.ids[row]];
    if (!found) return null;
    const one = (src, alt) => src && el("img", { src, alt, loading: "lazy", decoding: "async", width: 44, height: 44 });
    return el("span", { class: "thumbs" }, one(found[0], "generated"), one(found[1], "training picture"));
  }

  function cells(row, verdict, caption) {
    const made = [el("td", {}, verdict), el("td", { class: "caption" }, caption)];
    for (const column of columns().slice(3)) {
      made.push(el("td", { class: "number" }, figure((col[column.name] ?? [])[row])));
    }
    return made;
  }

  function opener(key, label, row) {
    const open = opened.has(key);
    const toggle = () => {
      if (!opened.delete(key)) opened.add(key);
      drawRows();
      find("rows").querySelector(`[data-key="${key}"]`)?.focus();
    };
    const button = el("button",
      { type: "button", class: "open", "data-key": key, "aria-expanded": String(open), "aria-label": label, onclick: toggle },
      el("span", { class: "chevron", "aria-hidden": "true" }, "›"), thumbnails(row));
    return el("td", { class: "opener" }, button);
  }

  function captionRow(row, inside) {
    const id = data.ids[row], text = el("bdi", {}, col.caption[row]);
    const made = el("tr", { id: `row-${id}`, class: inside ? "member" : null },
      opener(`row-${id}`, `Details of: ${col.caption[row].slice(0, 80)}`, row),
      ...cells(row, badge(verdictOf(row)), el("div", { class: "clamp" }, text)));
    if (!opened.has(`row-${id}`)) {
      panels.delete(id);
      return [made];
    }
    if (!panels.has(id)) {
      panels.set(id, el("td", {}, el("p", { class: "note" }, "Loading …")));
      showDetail(row, panels.get(id));
    }
    panels.get(id).colSpan = columns().length;
    return [made, el("tr", { class: "detail" }, panels.get(id))];
  }

  function groupRows(rows) {
    const template = col.template[rows[0]], key = `group-${template}`;
    const name = data.templates[template];
    const counts = new Map();
    for (const row of rows) counts.set(verdictOf(row), (counts.get(verdictOf(row)) ?? 0) + 1);
    const verdict = data.order.find((each) => counts.has(each));
    const label = el("div", {}, el("div", { class: "clamp" }, el("b", {}, el("bdi", {}, name))),
      el("span", { class: "note" }, `${rows.length.toLocaleString("en")} captions, the first: `,
        el("bdi", {}, col.caption[rows[0]].slice(0, 120))));
    const verdicts = el("div", {}, badge(verdict),
      el("div", { class: "note" }, `${counts.get(verdict).toLocaleString("en")} of ${rows.length.toLocaleString("en")}`));
    const made = [el("tr", { class: "group" }, opener(key, `Captions of the finding ${name.slice(0, 80)}`, rows[0]),
      ...cells(rows[0], verdicts, label))];
    if (!opened.has(key)) return made;
    const shown = more.get(template) ?? MEMBERS;
    for (const row of rows.slice(0, shown)) made.push(...captionRow(row, true));
    if (rows.length > shown) {
      const press = () => { more.set(template, shown + 4 * MEMBERS); drawRows(); };
      const button = el("button", { type: "button", onclick: press }, `Show more of ${(rows.length - shown).toLocaleString("en")} others`);
      made.push(el("tr", { class: "member" }, el("td", { colspan: columns().length }, button)));
    }
    return made;
  }

  function drawRows() {
    const start = state.page * state.size;
    const shown = entries.slice(start, start + state.size);
    find("rows").replaceChildren(...shown.flatMap((rows) => (rows.length > 1 ? groupRows(rows) : captionRow(rows[0]))));
    if (!shown.length) {
      find("rows").append(el("tr", {}, el("td", { colspan: columns().length, class: "nothing" }, "Nothing matches.")));
    }
  }

  function draw() {
    select();
    drawHeads();
    drawRows();
  }

  // ---------------------------------------------------------------- an opened row

  function load(id) {
    if (!details.has(id)) {
      details.set(id, new Promise((resolve, reject) => {
        if (!data.pictures[id]) return resolve(null);
        arrived.set(id, resolve);
        document.head.append(el("script", { src: `rows/${id}.js`, onerror: () => reject(new Error(`rows/${id}.js`)) }));
      }));
    }
    return details.get(id);
  }

  function showDetail(row, cell) {
    load(data.ids[row]).then(
      (detail) => cell.replaceChildren(detailOf(row, detail)),
      (error) => cell.replaceChildren(el("p", { class: "warning" }, `${error.message} is missing beside this page.`)));
  }

  function detailOf(row, detail) {
    const pictures = detail ? comparison(detail) : el("p", { class: "note" }, data.verdicts.unconfirmed);
    return el("div", { class: "opened" },
      el("p", { class: "whole" }, el("bdi", {}, col.caption[row])),
      el("div", { class: "split" }, el("div", {}, pictures, scoreNumbers(row)),
        el("div", {}, sources(row, detail?.best), matchNumbers(detail?.best))),
      detail?.images.some((one) => one.mitigated) ? mitigation(detail.images) : null,
      detail?.matches.length ? matches(detail.matches) : null);
  }

  // Every mitigated image beside what it was, with each number before and after.
  function mitigation(images) {
    const shown = images.filter((one) => one.mitigated).map(({ index, mitigated }) => {
      if (mitigated.error) return el("p", { class: "note" }, `image ${index}: ${mitigated.error}`);
      const picture = (title, src) => el("figure", {}, el("div", { class: "stack" }, el("img", { src, alt: `image ${index}, ${title.toLowerCase()}`, class: "picture" })), el("figcaption", {}, title));
      const told = mitigated.triggered ? `${figure(mitigated.iterations)} updates, target ${figure(mitigated.target)}` : "Below the trigger: left as it was.";
      const pairs = Object.entries(mitigated.pairs).filter(([, [before]]) => before !== null).map(([name, values]) =>
        [el("code", {}, name), values.map(figure).join(" → "), data.about[`${name}_before`]]);
      return el("div", { class: "split" }, el("div", { class: "figures" }, picture("Before", mitigated.before), picture("After", mitigated.after)), el("div", {}, el("p", { class: "note" }, told), list(pairs)));
    });
    return el("section", { class: "mitigation" }, el("h3", {}, "Mitigation"), ...shown);
  }

  const slider = (label, min, max, value, change) =>
    el("label", {}, `${label} `, el("input", { type: "range", min, max, step: "any", value, oninput: (event) => change(Number(event.target.value)) }));

  function comparison(detail) {
    const best = detail.best, MASKS = { energy_mask: "energy, first step", be_mask: "BE mask, final step", first_mask: "EOS attention, first step", score_map: "score difference, last step" };
    const places = el("div", { class: "figures" }), controls = el("div", { class: "controls" }), curves = el("div");
    const view = { image: detail.images.find((one) => one.index === best?.image_index) ?? detail.images[0], mask: "", on: true, opacity: 0.6, gain: 2 };
    view.mask = Object.keys(MASKS).find((name) => view.image.masks[name]) ?? "";

    const picture = (src, alt) => el("img", { src, alt, class: "picture" });
    function overlay() {
      const src = view.image.masks[view.mask];
      if (!src) return null;
      const made = el("img", { src, alt: "", class: "mask" });
      made.hidden = !view.on;
      made.style.opacity = view.opacity;
      return made;
    }
    const place = (title, ...layers) => el("figure", {}, el("div", { class: "stack" }, ...layers), el("figcaption", {}, title));

    function drawFigures() {
      const made = [], src = view.image.src;
      if (src) made.push(place("Generated", picture(src, "generated image"), overlay()));
      else made.push(el("p", { class: "note" }, view.image.error ?? "No image was decoded."));
      if (best?.src) made.push(place("Training picture", picture(best.src, "training picture"), overlay()));
      if (src && best?.src) {
        const over = picture(best.src, "");
        over.classList.add("over");
        const made2 = place("Difference", picture(src, "difference of the two"), over);
        made2.firstChild.classList.add("difference");
        made2.firstChild.style.filter = `brightness(${view.gain})`;
        made.push(made2);
      }
      places.replaceChildren(...made);
      curves.replaceChildren(steps(view.image));
    }
    const each = (selector, change) => places.querySelectorAll(selector).forEach(change);

    const names = Object.keys(MASKS).filter((name) => view.image.masks[name]);
    if (names.length) {
      const toggle = el("input", { type: "checkbox", checked: true, onchange: (event) => { view.on = event.target.checked; each(".mask", (mask) => { mask.hidden = !view.on; }); } });
      const choice = el("select", { onchange: (event) => { view.mask = event.target.value; drawFigures(); } }, ...names.map((name) => el("option", { value: name }, MASKS[name])));
      controls.append(el("label", {}, toggle, " mask"), el("label", {}, "of ", choice),
        slider("opacity", 0, 1, view.opacity, (value) => { view.opacity = value; each(".mask", (mask) => { mask.style.opacity = value; }); }));
    }
    if (best?.src) {
      controls.append(slider("difference ×", 1, 8, view.gain, (value) => { view.gain = value; each(".difference", (stack) => { stack.style.filter = `brightness(${value})`; }); }));
    }
    const others = el("div", { class: "others" });
    if (detail.images.length > 1) {
      others.append(...detail.images.map((one) => el("button", { type: "button", "aria-label": `image ${one.index}`, onclick: () => { view.image = one; drawFigures(); } },
        one.src ? el("img", { src: one.src, alt: `image ${one.index}`, loading: "lazy", width: 56, height: 56 }) : `image ${one.index}`)));
    }
    drawFigures();
    return el("div", {}, places, controls, others, curves);
  }

  // ld and magnitude by sampling step, each on its own scale.
  function steps(image) {
    const drawn = Object.entries(image.steps).filter(([, values]) => values.length > 1).map(([name, values]) => {
      const top = Math.max(...values), width = 220, height = 44;
      const points = values.map((value, at) => `${(at * width / (values.length - 1)).toFixed(1)},${(height - value / top * height).toFixed(1)}`);
      return el("figure", { class: "steps" },
        svg("svg", { viewBox: `-2 -2 ${width + 4} ${height + 4}`, preserveAspectRatio: "none", role: "img", "aria-label": `${name} by step` }, svg("polyline", { points: points.join(" ") })),
        el("figcaption", {}, el("code", {}, name), ` over ${values.length} steps, at most ${figure(top)}`));
    });
    return el("div", { class: "figures" }, ...drawn);
  }

  function list(pairs) {
    return el("dl", { class: "numbers" }, ...pairs.flatMap(([name, value, text]) =>
      [el("dt", {}, name), el("dd", {}, value, text ? el("span", { class: "note" }, text) : null)]));
  }

  function sources(row, best) {
    const id = data.ids[row];
    const pairs = [
      ["verdict", badge(verdictOf(row)), data.verdicts[verdictOf(row)]],
      ["caption's source", source(col.source_url[row]), col.source_key[row] ? `key ${col.source_key[row]}` : null],
      ["in the data", `${figure(col.occurrences[row])} row${col.occurrences[row] === 1 ? "" : "s"}`, `first: row ${figure(col.input_row[row])} of ${col.input_file[row].split("/").pop()}`],
    ];
    if (best) {
      pairs.push(["training picture", source(best.reference_url), [best.reference_key && `key ${best.reference_key}`, best.own ? "the picture the caption came with" : "not the caption's own picture"].filter(Boolean).join(", ")]);
      if (best.reference_caption) pairs.push(["its caption", el("bdi", { class: "clamp" }, best.reference_caption)]);
    }
    pairs.push(["row", el("a", { href: `#row-${id}` }, id), "link to this row"]);
    return el("section", {}, el("h3", {}, "Where it comes from"), list(pairs));
  }

  function numbers(title, names, value) {
    const known = names.filter((name) => value(name) !== null && value(name) !== undefined);
    if (!known.length) return null;
    const pairs = known.map((name) => [el("code", {}, name), figure(value(name)), data.about[name]]);
    return el("section", {}, el("h3", {}, title), list(pairs));
  }

  const MATCH = ["sscd", "correlation_distance", "distance", "s", "ls", "ls_norm", "ls_energy", "ls_score", "ls_corr", "rank"];
  const matchNumbers = (best) => best && numbers("The match", MATCH, (name) => best[name]);
  const scoreNumbers = (row) =>
    numbers("Scores of the caption", [...data.scores, "ld_std", "mask_source", "p_value", "q_value", "verdict_images", "num_images", "num_tokens"], (name) => (col[name] ?? [])[row]);

  function matches(found) {
    const names = ["image_index", "rank", "verdict", "sscd", "correlation_distance", "distance", "ls_norm", "ls_energy", "reference_key", "reference_url", "reference_caption"];
    const cell = (match, name) =>
      el("td", { class: typeof match[name] === "number" ? "number" : null },
        name === "verdict" ? badge(match[name]) : name === "reference_url" ? source(match[name]) : typeof match[name] === "string" ? el("bdi", { class: "clamp" }, match[name]) : figure(match[name]));
    return el("details", {}, el("summary", {}, `All ${found.length} comparisons with training pictures`),
      el("div", { class: "matches-scroll" }, el("table", { class: "matches" },
        el("thead", {}, el("tr", {}, ...names.map((name) => el("th", { scope: "col", title: data.about[name] }, name)))),
        el("tbody", {}, ...found.map((match) => el("tr", {}, ...names.map((name) => cell(match, name))))))));
  }

  // ---------------------------------------------------------------- controls

  function goTo(hash) {
    const row = data.ids.indexOf(hash.replace(/^#row-/, ""));
    if (row < 0) return;
    let at = entries.findIndex((rows) => rows.includes(row));
    if (at < 0) { // hidden by the filters
      state.words = [];
      state.verdicts.clear();
      find("search").value = "";
      drawVerdicts();
      select();
      at = entries.findIndex((rows) => rows.includes(row));
    }
    state.page = Math.floor(at / state.size);
    opened.add(`row-${data.ids[row]}`);
    if (entries[at].length > 1) {
      opened.add(`group-${col.template[row]}`);
      more.set(col.template[row], Math.max(MEMBERS, entries[at].indexOf(row) + 1));
    }
    draw();
    find(`row-${data.ids[row]}`).scrollIntoView();
  }

  function drawVerdicts() {
    const counts = new Map();
    for (let row = 0; row < data.ids.length; row++) counts.set(verdictOf(row), (counts.get(verdictOf(row)) ?? 0) + 1);
    const press = (name) => (event) => {
      if (event.target.checked) state.verdicts.add(name);
      else state.verdicts.delete(name);
      state.page = 0;
      draw();
    };
    find("verdicts").replaceChildren(el("legend", {}, "Verdict"), ...data.order.filter((name) => counts.has(name)).map((name) =>
      el("label", { class: "check" }, el("input", { type: "checkbox", value: name, onchange: press(name) }), " ", badge(name), ` ${counts.get(name).toLocaleString("en")}`)));
  }

  function wire() {
    let waiting = 0;
    find("toolbar").addEventListener("submit", (event) => event.preventDefault());
    find("search").addEventListener("input", (event) => {
      clearTimeout(waiting);
      waiting = setTimeout(() => {
        state.words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
        state.page = 0;
        draw();
      }, 120);
    });
    find("score").replaceChildren(...data.scores.map((name) => el("option", { value: name, selected: name === state.score, title: data.about[name] }, name)));
    find("score").addEventListener("change", (event) => {
      state.score = state.sort = event.target.value;
      state.down = true;
      state.page = 0;
      draw();
    });
    find("grouped").addEventListener("change", (event) => { state.grouped = event.target.checked; state.page = 0; draw(); });
    find("size").addEventListener("change", (event) => { state.size = Number(event.target.value); state.page = 0; draw(); });
    const turn = (by) => () => { state.page += by; draw(); find("findings").scrollIntoView(); };
    find("previous").addEventListener("click", turn(-1));
    find("next").addEventListener("click", turn(1));
    document.addEventListener("keydown", (event) => {
      if (event.key === "/" && !/^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName)) {
        event.preventDefault();
        find("search").focus();
      }
    });
    window.addEventListener("beforeprint", () => { document.querySelector("details.panel").open = true; });
    window.addEventListener("hashchange", () => goTo(location.hash));
  }

  function wireTheme() {
    find("theme").addEventListener("click", () => {
      const style = document.documentElement.style;
      const dark = style.colorScheme ? style.colorScheme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
      style.colorScheme = dark ? "light" : "dark";
    });
  }

  // ---------------------------------------------------------------- called by the data files

  wireTheme();
  return {
    rows(given) {
      data = given;
      col = data.columns;
      lower = col.caption.map((caption) => caption.toLowerCase());
      haystack = lower.map((caption, row) => `${caption}\n${(col.source_url[row] ?? "").toLowerCase()}\n${(col.source_key[row] ?? "").toLowerCase()}`);
      rank = col.verdict.map((_, row) => data.order.indexOf(verdictOf(row)));
      state.score = data.score || data.scores[0] || "";
      wire();
      drawVerdicts();
      draw();
      if (location.hash.startsWith("#row-")) goTo(location.hash);
      document.documentElement.dataset.ready = "";
    },
    detail(id, given) {
      arrived.get(id)?.(given);
    },
  };
})();
