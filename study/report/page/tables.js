// What is best told in words, bars and tables.

function drawFinding() {
  const { title, text, before, after } = data.headline;
  slot("name").textContent = data.name;
  slot("title").textContent = title;
  slot("text").textContent = text;
  if (before && after) slot("tiles").append(...Object.entries(SCORES).map(([key, score]) =>
    tile(score.name, el("span", {}, key in before ? el("span", { class: "was" }, `${(100 * before[key]).toFixed(1)} → `) : null, percent(after[key])),
      score.counts, key === LEFT)));
  if (data.tested.length) slot("tested").append(testedTable());
  return true;
}

function testedTable() {
  const several = data.victims.length > 1;
  const known = (key) => data.tested.some(({ victims }) => Object.values(victims).some((s) => key in s));
  const scores = Object.keys(SCORES).filter(known), derived = ["arr", "rdr", "der"].filter(known);
  const rows = data.tested.flatMap(({ who, number, victims }) => Object.entries(victims).map(([name, s]) => ({
    kind: who === "chosen" ? "chosen" : null,
    cells: [number === undefined ? who : `${who} (trial ${number})`, ...(several ? [name] : []),
      ...scores.map((key) => percent(s[key])),
      ...derived.map((key) => (s[key] === undefined || s[key] === null ? "–" : s[key].toFixed(3)))],
  })));
  return el("details", {}, el("summary", {}, "On the test images, in full"), el("div", { class: "wide" },
    table(["", ...(several ? ["victim"] : []), ...scores.map((key) => SCORES[key].short), ...derived.map((key) => key.toUpperCase())], rows),
    !derived.length ? null : el("p", { class: "note" }, derived.length < 3 ? "ARR: accuracy lost, relative to the suspect's own (low is good)." : "ARR and RDR: accuracy and recovery lost, relative to the victim's accuracy (low is good). DER: "
      + "attack success taken minus accuracy lost, between 0 and 1 (0.5 is no effect).")));
}

function drawTrials() {
  const many = data.victims.length > 1, several = data.defences.length > 0;
  const names = several ? [] : data.parameters.map((p) => p.name);
  const own = (t) => Object.entries(t.parameters).filter(([name]) => name !== "defence")
    .map(([name, value]) => `${settingOf(name)} ${words(value)}`).join(", ");
  const columns = [
    ["trial", (t) => t.number, (t) => t.number],
    ...(several ? [["defence", (t) => t.defence, (t) => t.defence]] : []),
    ...Object.entries(SCORES).map(([key, s]) => [`${s.short} %`, (t) => t[key], (t) => (100 * t[key]).toFixed(1)]),
    ...(many ? data.victims.map((v) => [`ASR % ${v.name}`, (t) => t.scores[v.name]?.attack_success ?? 2,
      (t) => (t.scores[v.name] ? (100 * t.scores[v.name].attack_success).toFixed(1) : "–")]) : []),
    ["seconds", (t) => t.seconds, (t) => t.seconds.toFixed(1)],
    ...names.map((name) => [name, (t) => t.parameters[name] ?? -1, (t) => (name in t.parameters ? words(t.parameters[name]) : "–")]),
    ...(several ? [["its settings", own, own]] : []),
  ];
  let by = several ? 3 : 2, down = false;
  const place = slot("trials");
  const draw = () => {
    const value = columns[by][1];
    const compare = (a, b) => (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : a.number - b.number);
    const rows = complete.filter(kept).sort((a, b) => (down ? -compare(a, b) : compare(a, b)));
    place.replaceChildren(table(columns.map(([name], i) => el("button", {
      type: "button", "aria-label": `sort by ${name}`, onclick: () => { down = i === by ? !down : false; by = i; draw(); },
    }, name, i === by ? (down ? " ↓" : " ↑") : "")), rows.map((t) => ({
      kind: t.number === data.chosen ? "chosen" : null,
      cells: columns.map(([, , text], i) => (i ? text(t) : nameOf(t))),
    }))));
  };
  // drawn once it is opened, and then as the ranges change
  const shown = place.closest("details");
  shown.addEventListener("toggle", () => shown.open && draw());
  listeners.push((change) => "ranges" in change && shown.open && draw());
}

const nameOf = (t) => `${t.number}${isPaper(t) ? " paper" : t.number === data.chosen ? " chosen" : onFront.has(t.number) ? " front" : ""}`;

function drawImportance() {
  const [left, acc] = [data.importance[LEFT], data.importance[QUALITY]];
  if (!left && !acc) return false;
  slot("searched").textContent = searched.length;
  const names = Object.keys(left || acc);
  const share = (value, kind) => el("span", { class: `share ${kind}`, role: "cell" },
    el("i", { style: `width:${(100 * (value || 0)).toFixed(1)}%` }), el("span", {}, value === undefined ? "–" : percent(value, 0)));
  slot("importance").append(el("div", { class: "bars", role: "table", "aria-label": "Importance of settings" },
    el("div", { role: "row" }, el("span", { role: "columnheader", class: "blank" }, ""), el("span", { role: "columnheader" }, `for ${SCORES[LEFT].name}`), el("span", { role: "columnheader" }, `for ${SCORES[QUALITY].name}`)),
    names.map((name) => el("div", { role: "row" }, el("code", { role: "rowheader" }, name),
      share(left?.[name], ""), share(acc?.[name], "other")))));
  return true;
}

function drawFailures() {
  const lost = data.trials.filter((trial) => trial.status !== "COMPLETE");
  if (!lost.length) return false;
  const rows = table(["trial", "ended as", "after", "reason"], lost.map((t) => ({
    cells: [t.number, t.status === "PRUNED" ? "stopped early" : t.status.toLowerCase(), duration(t.seconds), t.reason || "–"] })), { left: [3] });
  const counts = ["PRUNED", "FAILED"].map((status) => lost.filter((t) => t.status === status).length);
  slot("failures").append(lost.length <= 12 ? rows : el("details", {},
    el("summary", {}, `${counts[0]} stopped early, ${counts[1]} failed`), rows));
  return true;
}

function drawProvenance() {
  slot("provenance").append(el("dl", { class: "facts" },
    data.provenance.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))));
  return true;
}

function drawCost() {
  const timed = data.trials.filter((trial) => trial.seconds !== null && trial.seconds !== undefined);
  if (!timed.length) return false;
  const { seconds, forward, backward, devices } = data.cost;
  const ofTrials = timed.map((t) => t.seconds).sort((a, b) => a - b);
  const median = ofTrials[Math.floor(ofTrials.length / 2)];
  const workers = seconds ? seconds.in_trials + seconds.harness : 0;
  slot("cost-tiles").append(
    ...(seconds ? [tile("the whole study", duration(seconds.total), "victims, search and report")] : []),
    tile("a trial", duration(median), `median of ${timed.length}; the longest ${duration(ofTrials[ofTrials.length - 1])}`),
    ...(workers ? [tile("harness", percent(seconds.harness / workers), "of the workers' time was outside of trials")] : []),
    tile("passes", (forward + backward).toLocaleString("en"), `${forward.toLocaleString("en")} forward, ${backward.toLocaleString("en")} backward, on ${devices.join(", ") || "an unknown device"}`));
  responsive(slot("cost"), (width) => costChart(width, timed));
  const swatch = (style, text) => el("li", {}, svg("svg", { viewBox: "0 0 16 16", "aria-hidden": "true" }, svg("rect", { x: 4, y: 1, width: 8, height: 14, style })), text);
  const roles = new Set(timed.map((t) => (t.status === "COMPLETE" ? roleOf(t) : "lost")));
  slot("cost-legend").append(...Object.entries(COSTS).filter(([role]) => roles.has(role)).map(([role, [style, text]]) => swatch(style, text)));
  return true;
}

const COSTS = {
  front: ["fill:var(--accent)", "on the front"], dominated: ["fill:var(--dim)", "dominated"],
  paper: ["fill:var(--warm)", "the paper's defaults"], lost: ["fill:none;stroke:var(--dim);stroke-dasharray:2 2", "without a result"],
};

// Seconds of each trial in order, on a log scale where the longest would hide the rest.
function costChart(width, timed) {
  const height = 190, left = 52, right = width - 8, top = 12, bottom = height - 40;
  const most = Math.max(...timed.map((t) => t.seconds)), least = Math.max(1e-2, Math.min(...timed.map((t) => t.seconds)));
  const log = most / least > 20, floor = log ? 10 ** Math.floor(Math.log10(least)) : 0;
  const Y = (s) => bottom - (log ? Math.log(Math.max(s, floor) / floor) / Math.log(most / floor) : s / most) * (bottom - top);
  const step = (right - left) / timed.length, bar = Math.max(1, Math.min(18, step * 0.7));
  const ticks = log ? [...Array(8).keys()].map((i) => floor * 10 ** i).filter((s) => s <= most) : ticksOf(0, most, 4);
  const picture = canvasOf(width, height, "Seconds of every trial, in their order");
  for (const tick of ticks) picture.append(
    svg("line", { class: "gridline", x1: left, x2: right, y1: Y(tick), y2: Y(tick) }),
    svg("text", { x: left - 8, y: Y(tick) + 4, "text-anchor": "end" }, `${words(tick)} s`));
  timed.forEach((trial, i) => {
    const x = left + (i + 0.5) * step, y = Y(trial.seconds), lost = trial.status !== "COMPLETE";
    picture.append(svg("rect", {
      x: x - bar / 2, y, width: bar, height: Math.max(1, bottom - y),
      style: COSTS[lost ? "lost" : roleOf(trial)][0],
      onpointermove: (event) => showTip(event.clientX, event.clientY, el("b", {}, lost ? `Trial ${trial.number}, ${trial.status.toLowerCase()}` : titleOf(trial)), el("span", {}, duration(trial.seconds))),
      onpointerleave: hideTip,
    }));
  });
  picture.append(svg("text", { x: left, y: height - 6 }, `trials in order, seconds of each${log ? " (log scale)" : ""}`));
  return picture;
}
