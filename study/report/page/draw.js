// Elements, scales, marks and words: what every drawing on the page is made of.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}
const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const slot = (name) => document.querySelector(`[data-slot="${name}"]`);

// Draws into a container now and whenever its width changes, so that text keeps its size.
function responsive(container, draw) {
  let width = 0;
  const again = () => {
    const now = Math.round(container.clientWidth);
    if (now > 0 && now !== width) {
      width = now;
      container.replaceChildren(draw(width));
    }
  };
  new ResizeObserver(again).observe(container);
  again();
  return () => { width = 0; again(); };
}

// Room for names to the left of a picture: what the longest takes, within bounds.
const roomFor = (names, least, width) => Math.min(Math.max(least, 14 + 6.2 * Math.max(0, ...names.map((name) => name.length))), 0.4 * width);

const canvasOf = (width, height, label, ...children) =>
  svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "group", "aria-label": label }, ...children);

// A scale from values to [0, 1] and back.
function scaleOf(parameter) {
  if (parameter.kind === "categorical") {
    const choices = parameter.choices, gap = 1 / choices.length;
    return {
      of: (value) => (choices.indexOf(value) + 0.5) * gap,
      words: (share) => words(choices[Math.min(choices.length - 1, Math.max(0, Math.floor(share / gap)))]),
      ticks: choices.map((value, i) => [(i + 0.5) * gap, words(value)]),
    };
  }
  const turn = parameter.log ? Math.log : (x) => x, back = parameter.log ? Math.exp : (x) => x;
  const low = turn(parameter.low), span = turn(parameter.high) - low || 1;
  const text = (value) => (parameter.percent ? percent(value) : words(value));
  return {
    of: (value) => (turn(value) - low) / span,
    words: (share) => {
      const value = back(low + share * span);
      return text(parameter.kind === "int" ? Math.round(value) : value);
    },
    ticks: [[0, text(parameter.low)], [1, text(parameter.high)]],
  };
}

// Round numbers between two ends, about `count` of them.
function ticksOf(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-12; i++) found.push(i * step);
  return found;
}

const percent = (value, digits = 1) =>
  value === null || value === undefined ? "–" : `${(100 * value).toFixed(digits)}\u00a0%`;

function words(value) {
  if (value === null || value === undefined) return "null";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return String(value);
  return String(Number(value.toPrecision(3)));
}

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  if (seconds < 3600) return `${(seconds / 60).toFixed(1)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

const count = (n, one) => `${n.toLocaleString("en")} ${one}${n === 1 ? "" : "s"}`;

// Each role has a shape of its own, so that none is told by its colour alone.
const SHAPES = {
  dominated: (r) => `M${-r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0Z`,
  front: (r) => `M0 ${-1.3 * r}L${1.3 * r} 0L0 ${1.3 * r}L${-1.3 * r} 0Z`,
  paper: (r) => `M${-r} ${-r}H${r}V${r}H${-r}Z`,
  victim: (r) => {
    const a = 0.45 * r, b = 1.25 * r;
    return `M${-b} ${-b + a}L${-b + a} ${-b}L0 ${-a}L${b - a} ${-b}L${b} ${-b + a}L${a} 0L${b} ${b - a}L${b - a} ${b}L0 ${a}L${-b + a} ${b}L${-b} ${b - a}L${-a} 0Z`;
  },
  triangle: (r) => `M0 ${-r}L${1.1 * r} ${0.9 * r}H${-1.1 * r}Z`,
};
const mark = (kind, r, colour) => svg("path", { class: `mark ${kind}`, d: SHAPES[kind.split(" ")[0]](r),
  style: colour ? `${kind === "front" ? "fill" : "stroke"}:${colour}` : null });

const legendItem = (kind, text, ring, colour) =>
  el("li", {}, svg("svg", { viewBox: "-8 -8 16 16", "aria-hidden": "true" },
    ring ? svg("circle", { class: "ring", r: 8 }) : null, mark(kind, 4.5, colour)), text);

const tip = document.getElementById("tip");
function showTip(x, y, ...content) {
  tip.replaceChildren(...content.filter(Boolean));
  tip.hidden = false;
  const box = tip.getBoundingClientRect(), gap = 14;
  const left = x + gap + box.width > innerWidth ? x - gap - box.width : x + gap;
  const top = y + gap + box.height > innerHeight ? y - gap - box.height : y + gap;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.max(4, top)}px`;
}
const hideTip = () => { tip.hidden = true; };

// A table; numbers of columns that are words are in `left`.
function table(head, rows, { caption, left = [], kind } = {}) {
  const cell = (tag, value, i, extra) =>
    el(tag, { class: left.includes(i) ? "words" : null, ...extra }, value);
  return el("table", { class: kind },
    caption ? el("caption", { class: "note" }, caption) : null,
    head ? el("thead", {}, el("tr", {}, head.map((name, i) => cell("th", name, i, { scope: "col" })))) : null,
    el("tbody", {}, rows.map(({ cells, kind: row }) => el("tr", { class: row },
      cells.map((value, i) => cell(i ? "td" : "th", value, i, i ? {} : { scope: "row" }))))));
}

const tile = (name, value, under, accent) =>
  el("dl", { class: accent ? "tile accent" : "tile", style: "margin:0" }, el("dt", {}, name),
    el("dd", {}, value, under ? el("small", {}, under) : null));

// A row of buttons of which one is pressed.
function segments(label, options, pressed, choose) {
  const group = el("div", { class: "segments", role: "group", "aria-label": label });
  const draw = (now) => group.replaceChildren(...options.map(([value, text]) =>
    el("button", { type: "button", "aria-pressed": String(value === now),
      onclick: () => { draw(value); [...group.children][options.findIndex((o) => o[0] === value)].focus(); choose(value); } }, text)));
  draw(pressed);
  return group;
}
