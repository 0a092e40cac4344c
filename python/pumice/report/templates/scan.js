"use strict";
// Sorting, filtering and opening the prompts of the table. Texts become text nodes, never markup.

const SVG = "http://www.w3.org/2000/svg";
const HTML = "http://www.w3.org/1999/xhtml";
const build = (namespace) => (tag, attributes = {}, ...children) => {
  const element = document.createElementNS(namespace, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
};
const html = build(HTML), svg = build(SVG);

const data = JSON.parse(document.getElementById("data").textContent);
const table = document.querySelector(".prompts");
const body = table.tBodies[0]; // holds the rows that are shown
const controls = document.querySelector(".controls");
const more = document.querySelector(".more");
const items = [...table.querySelectorAll("tbody tr")].map((row, rank) => ({
  row, rank, ...data.prompts[rank],
  prompt: row.querySelector(".text").textContent,
  verdict: row.querySelector(".verdict").textContent,
  detail: null, // its row below, while it is open
}));
const itemOf = new Map(items.map((item) => [item.row, item]));

// --- Sort and filter

const alphabet = new Intl.Collator(undefined, { numeric: true });
const orders = {
  rank: (a, b) => a.rank - b.rank,
  score: (a, b) => b.rank - a.rank, // the ranks are those of the scores
  prompt: (a, b) => alphabet.compare(a.prompt, b.prompt) || a.rank - b.rank,
};
let sorted = items, matching = items, shown = 0;

function sort(column, descending) {
  for (const head of table.tHead.rows[0].cells) head.removeAttribute("aria-sort");
  const head = table.querySelector(`th[data-sort=${column}]`);
  head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const sign = descending ? -1 : 1;
  sorted = [...items].sort((a, b) => sign * orders[column](a, b));
  filter();
}

function filter() {
  const text = controls.elements.text.value.trim().toLowerCase();
  const verdict = controls.elements.verdict?.value;
  matching = sorted.filter((item) =>
    (!verdict || item.verdict === verdict) && item.prompt.toLowerCase().includes(text));
  const hidden = items.length - matching.length;
  controls.querySelector("output").textContent =
    `${matching.length} of ${items.length} prompts` + (hidden ? `, ${hidden} hidden` : "");
  body.replaceChildren();
  shown = 0;
  show(data.page);
}

function show(count) {
  const next = matching.slice(shown, count);
  for (const item of next) if (!item.row.querySelector(".toggle")) addToggle(item);
  body.append(...next.flatMap((item) => item.detail ? [item.row, item.detail] : [item.row]));
  shown += next.length;
  const left = matching.length - shown;
  more.hidden = !left;
  more.textContent = `Show ${Math.min(data.page, left)} more of ${left}`;
}

// --- The detail of a prompt

const format = (value) => value === null ? "not finite" : value.toPrecision(3);
const share = (value, highest) => Math.min(Math.max(value / highest, 0), 1) || 0;

// Labels with a bar and a number each; longest first if `ranked`.
function bars(pairs, ranked) {
  const highest = Math.max(...pairs.map(([, value]) => value));
  if (ranked) pairs = [...pairs].sort((a, b) => b[1] - a[1]);
  return html("ol", { class: "ranking" }, ...pairs.map(([label, value]) =>
    html("li", {}, html("span", { dir: "auto" }, label), html("span", { class: "number" }, format(value)),
      html("div", { class: "bar" }, html("i", { style: `--share: ${share(value, highest)}` })))));
}

function wordsPart(words) {
  const highest = Math.max(...words.map(([, value]) => value));
  const line = html("p", { class: "words", dir: "auto" });
  for (const [text, value] of words) {
    line.append(html("span",
      { class: "word", style: `--share: ${share(value, highest)}`, title: `significance ${format(value)}` }, text), " ");
  }
  const legend = html("p", { class: "legend" },
    "hardly matters", html("span", { class: "ramp" }), `matters most (${format(highest)})`);
  return html("section", { class: "words-part wide" }, html("h3", {}, "Words by significance"), line, legend, bars(words, true));
}

// A distance between ticks: 1, 2 or 5 times a power of ten, at most five of them up to `highest`.
function tickStep(highest) {
  const unit = 10 ** Math.floor(Math.log10(highest));
  return [0.2, 0.5, 1, 2, 5].map((m) => m * unit).find((step) => highest / step <= 5);
}

function curvePart(values, timesteps) {
  const [width, height, left, right, top, bottom] = [420, 190, 40, 12, 16, 160];
  const points = values.map((value, i) => [i, value]).filter(([, value]) => value !== null);
  const highest = 1.08 * Math.max(1e-6, data.threshold ?? 0, ...points.map(([, value]) => value));
  const x = (i) => (left + (width - left - right) * (values.length > 1 ? i / (values.length - 1) : 0.5)).toFixed(1);
  const y = (value) => (bottom - (bottom - top) * value / highest).toFixed(1);
  const name = (i) => timesteps ? `t = ${timesteps[i]}` : `step ${i + 1}`;
  const last = values.length - 1;

  const drawing = svg("svg", {
    class: "curve", viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `Magnitude at ${values.length} steps: ` + points.map(([i, value]) => `${name(i)} ${format(value)}`).join(", "),
  });
  const step = tickStep(highest);
  for (let k = 0; k * step <= highest; k++) {
    drawing.append(
      svg("line", { class: "axis", x1: left, x2: width - right, y1: y(k * step), y2: y(k * step) }),
      svg("text", { x: left - 6, y: Number(y(k * step)) + 4, "text-anchor": "end" }, String(Number((k * step).toPrecision(3)))));
  }
  if (data.threshold !== null) {
    drawing.append(
      svg("line", { class: "mark", x1: left, x2: width - right, y1: y(data.threshold), y2: y(data.threshold) }),
      svg("text", { x: width - right, y: y(data.threshold) - 5, "text-anchor": "end" }, `threshold ${format(data.threshold)}`));
  }
  drawing.append(
    svg("path", { d: points.map(([i, value], k) => `${k ? "L" : "M"}${x(i)} ${y(value)}`).join("") }),
    ...points.map(([i, value]) =>
      svg("circle", { cx: x(i), cy: y(value), r: 3 }, svg("title", {}, `${name(i)}: ${format(value)}`))),
    svg("text", { x: x(0), y: 180, "text-anchor": last ? "start" : "middle" }, last ? `first step, ${name(0)}` : name(0)));
  if (last) drawing.append(svg("text", { x: x(last), y: 180, "text-anchor": "end" }, `last step, ${name(last)}`));
  return html("section", { class: "curve-part" }, html("h3", {}, "Magnitude at each step"), drawing);
}

function picturesPart(plain, guarded) {
  const figure = (source, caption) => html("figure", {},
    html("img", { src: source, alt: `generated ${caption}` }), html("figcaption", {}, caption));
  return html("section", { class: "pictures-part" }, html("h3", {}, "Pictures"), html("div", { class: "pictures" },
    ...(plain ? [figure(plain, "without the guard")] : []), ...(guarded ? [figure(guarded, "with the guard")] : [])));
}

function detailOf(item) {
  const picture = item.row.querySelector(".picture img")?.src;
  const cut = item.row.querySelector(".cut span")?.textContent;
  const parts = [];
  if (cut) {
    parts.push(html("section", { class: "wide" },
      html("h3", {}, "Not read, too long for the model"), html("p", { dir: "auto", class: "unread" }, cut)));
  }
  if (item.words) parts.push(wordsPart(item.words));
  if (item.curve) parts.push(curvePart(item.curve, item.timesteps));
  if (picture || item.guarded) parts.push(picturesPart(picture, item.guarded));
  const seeds = item.seedScores.map((score, i) => [`seed ${data.seeds[i]}`, score])
    .filter(([, score]) => score !== null); // the others were not needed
  parts.push(html("section", { class: "seeds-part" }, html("h3", {}, "Score by seed"), bars(seeds, false)));
  const missing = Object.entries({
    "words": item.words, "magnitude at each step": item.curve,
    "picture without the guard": picture, "picture with the guard": item.guarded,
  }).filter(([, known]) => !known).map(([name]) => name);
  if (missing.length) {
    parts.push(html("p", { class: "soft wide missing" }, `Not computed for this prompt: ${missing.join(", ")}.`));
  }
  const id = `detail-of-${item.row.id}`;
  return html("tr", { class: "detail", id },
    html("td", { colspan: item.row.cells.length }, html("div", { class: "parts" }, ...parts)));
}

function addToggle(item) {
  const cell = item.row.cells[0];
  cell.replaceChildren(html("button", {
    type: "button", class: "toggle", "aria-expanded": "false", "aria-controls": `detail-of-${item.row.id}`,
    "aria-label": `${cell.textContent}: ${item.prompt}`,
  }, cell.textContent));
}

function open(item, wanted) {
  item.row.querySelector(".toggle").setAttribute("aria-expanded", wanted);
  item.row.classList.toggle("open", wanted);
  item.detail?.remove();
  item.detail = wanted ? detailOf(item) : null;
  if (wanted) item.row.after(item.detail);
}

// --- What the reader does

body.addEventListener("click", (event) => {
  const item = itemOf.get(event.target.closest("tr"));
  const marking = !event.target.closest("button") && !getSelection().isCollapsed;
  if (!item || marking) return; // who marks text does not mean to open
  open(item, !item.detail);
  if (item.detail) history.replaceState(null, "", `#${item.row.id}`);
});
for (const head of table.querySelectorAll("th[data-sort]")) {
  const button = html("button", { type: "button" }, head.textContent);
  button.addEventListener("click", () => {
    const now = head.getAttribute("aria-sort");
    sort(head.dataset.sort, now ? now === "ascending" : head.dataset.sort === "score");
  });
  head.replaceChildren(button);
}
controls.addEventListener("input", filter);
controls.addEventListener("submit", (event) => event.preventDefault());
more.addEventListener("click", () => show(shown + data.page));

function openLinked() {
  const item = items.find(({ row }) => `#${row.id}` === location.hash);
  if (!item) return;
  if (!matching.includes(item)) {
    controls.reset();
    filter();
  }
  if (!item.row.isConnected) show(matching.indexOf(item) + 1);
  if (!item.detail) open(item, true);
  item.row.scrollIntoView();
}
addEventListener("hashchange", openLinked);

document.documentElement.classList.add("scripted");
controls.hidden = false;
for (const { row } of items) row.remove();
sort("rank", false);
openLinked();
