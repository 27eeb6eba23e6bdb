// One trial: how it went, what it masks, what its models answer.

function drawCloseUp() {
  const numbers = Object.keys(data.close_ups.trials).map(Number).sort((a, b) => a - b);
  if (!numbers.length) return false;
  const shortly = (n) => `${titleOf(byNumber.get(n))} – ${SCORES[LEFT].short} ${percent(byNumber.get(n)[LEFT])}, ${SCORES[QUALITY].short} ${percent(byNumber.get(n)[QUALITY])}`;
  const trials = picker("trial", "Trial of the front", numbers.map((n) => [n, shortly(n)]), (value) => update({ trial: Number(value) }));
  const names = [...new Set(numbers.flatMap((n) => Object.keys(data.close_ups.trials[n].victims)))];
  const victims = picker("victim", "Victim", names.map((name) => [name, name]), (value) => update({ victim: value }));
  slot("picker").append(...trials.nodes, ...(names.length > 1 ? victims.nodes : []));
  const show = () => {
    const detail = data.close_ups.trials[state.trial], trial = byNumber.get(state.trial);
    if (detail) trials.select.value = state.trial;
    slot("close-up").replaceChildren(...(detail ? closeUpOf(trial, detail) : [otherTrial(trial)]));
  };
  listeners.push((change) => {
    if ("trial" in change || "victim" in change) show();
    if ("trial" in change) byLink();
  });
  Object.assign(state, { trial: data.chosen in data.close_ups.trials ? data.chosen : numbers[0], victim: names[0] });
  show();
  return true;
}

function picker(id, label, options, choose) {
  const select = el("select", { id: `pick-${id}`, onchange: () => choose(select.value) },
    options.map(([value, text]) => el("option", { value }, text)));
  return { select, nodes: [el("label", { for: `pick-${id}` }, label), select] };
}

// The section is below: say so where the reader is, without moving the page.
function byLink() {
  const bar = slot("front-bar");
  bar.querySelector("a")?.remove();
  bar.append(el("a", { href: "#close-up", style: "color:var(--accent)" }, `Trial ${state.trial} up close ↓`));
}

function otherTrial(trial) {
  return el("div", {}, el("h3", {}, titleOf(trial)), el("p", { class: "note" },
    `${trial.status === "COMPLETE" ? scoresText(trial) : trial.reason}. Curves, masks and answers are in this page for the front alone; this trial's masks are in trials/${String(trial.number).padStart(3, "0")}/.`),
  settingsTable(trial, trial.parameters));
}

function closeUpOf(trial, detail) {
  const parts = [el("p", { class: "note", style: "margin-top:.75rem" }, `${titleOf(trial)}. On val: ${scoresText(trial)}. ${duration(trial.seconds)}, `
    + `${count(trial.rounds, "round")}, ${count(trial.passes.forward, "forward pass").replace("passs", "passes")} and ${trial.passes.backward.toLocaleString("en")} backward.`)];
  const mine = detail.victims[state.victim] || {};
  if (mine.answers) parts.push(...answersOf(state.victim, mine.answers));
  if (mine.layers) parts.push(el("h3", {}, "What is masked"), ...layersOf(mine.layers));
  if (mine.curves) parts.push(el("h3", {}, "How it was learned"), curvesOf(mine.curves));
  parts.push(el("details", {}, el("summary", {}, "All settings of this trial"), settingsTable(trial, detail.settings)));
  return parts;
}

function settingsTable(trial, settings) {
  return el("div", { class: "wide" }, table(null, Object.entries(settings).map(([name, value]) => ({ cells: [name, words(value)] })), { kind: "plain" }));
}

// --- masks ---

function layersOf(layers) {
  const kept = layers.reduce((sum, layer) => sum + layer.kept, 0);
  const all = layers.reduce((sum, layer) => sum + channels(layer.factor).length, 0);
  const paints = [];
  repaint = () => paints.forEach((paint) => paint());
  const grid = el("div", { class: "layers", role: "table", "aria-label": "Masks by layer" }, layers.map((layer) => {
    const factor = channels(layer.factor), selection = channels(layer.selection);
    const canvas = el("canvas", { width: factor.length, height: 5, role: "img",
      "aria-label": `${layer.name}: ${layer.kept} of ${factor.length} channels keep at least half, mean factor ${layer.mean}, mean selection ${layer.shared}` });
    paints.push(() => paintLayer(canvas, factor, selection));
    canvas.addEventListener("pointermove", (event) => {
      const at = Math.min(factor.length - 1, Math.floor((event.offsetX / canvas.clientWidth) * factor.length));
      showTip(event.clientX, event.clientY, el("b", {}, layer.name), el("span", {}, `channel ${at + 1} of ${factor.length} by factor: factor ${(factor[at] / 255).toFixed(2)}, selection ${(selection[at] / 255).toFixed(2)}`));
    });
    canvas.addEventListener("pointerleave", hideTip);
    return el("div", { role: "row" }, el("code", { role: "rowheader", title: layer.name }, layer.name), canvas, el("span", { role: "cell" }, `${layer.kept} of ${factor.length}`));
  }));
  repaint();
  return [el("p", { class: "note" }, `${kept} of ${all} channels keep at least half of their strength. A row is a layer, its channels sorted by `
    + "factor; the upper band is the factor of the purified model, the lower one the selection (1: shared with the inverse twin). ",
  el("span", { style: "white-space:nowrap" }, "1", el("span", { class: "ramp", style: "background:linear-gradient(to right, var(--grid), var(--accent))" }), "0")), grid];
}

const channels = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
let repaint = () => {}; // the canvases of the trial that is shown
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => repaint());

// Three pixels of factor, a gap, one of selection: light keeps, the accent takes away.
function paintLayer(canvas, factor, selection) {
  const style = getComputedStyle(document.documentElement);
  const [light, dark] = ["--grid", "--accent"].map((name) => rgb(style.getPropertyValue(name)));
  const context = canvas.getContext("2d"), image = context.createImageData(factor.length, 5);
  const put = (x, y, share) => {
    const at = 4 * (y * factor.length + x);
    for (let k = 0; k < 3; k++) image.data[at + k] = dark[k] + (light[k] - dark[k]) * share;
    image.data[at + 3] = 255;
  };
  for (let x = 0; x < factor.length; x++) {
    for (let y = 0; y < 3; y++) put(x, y, factor[x] / 255);
    put(x, 4, selection[x] / 255);
  }
  context.putImageData(image, 0, 0);
}

const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.trim().slice(at, at + 2), 16));

// --- curves ---

const STROKES = ["var(--accent)", "var(--ink)", "var(--warm)", "var(--muted)"];
const DASHES = ["", "7 4", "2 3", "9 3 2 3", "4 2", "1 4"];

function curvesOf(curves) {
  const rounds = curves.loss.length, figures = [];
  const chart = (title, lines, domain, format) => {
    const place = el("div", { class: "chart" });
    const shown = lines.filter(([, pairs]) => pairs.some(([, value]) => value !== null));
    figures.push(el("div", {}, el("h4", {}, title), place, el("ul", { class: "legend" }, shown.map(([name], i) =>
      el("li", {}, svg("svg", { viewBox: "0 0 16 16", "aria-hidden": "true", style: "width:1.6rem" },
        svg("line", { x1: -4, x2: 20, y1: 8, y2: 8, style: lineStyle(i) })), name.replaceAll("_", " "))))));
    responsive(place, (width) => lineChart(width, shown, rounds, curves.stages, domain, format, title));
  };
  const scores = [QUALITY, data.recovered, "attack_success"].filter((name) => name in curves.scores).map((name) => [name, curves.scores[name]]);
  if (scores.length) chart("Scores on val, %", scores.map(([name, pairs]) => [SCORES[name].name, pairs.map(([x, y]) => [x, 100 * y])]), [0, 100], words);
  const pairs = (values) => values.map((value, i) => [i, value]);
  const all = [["all together", pairs(curves.loss)], ...Object.entries(curves.terms).map(([name, values]) => [name, pairs(values)])];
  chart("Losses", all, null, words);
  return el("div", { class: "two" }, figures);
}

const lineStyle = (i) => `fill:none;stroke:${STROKES[i % STROKES.length]};stroke-width:${i ? 1.4 : 2.2};stroke-dasharray:${DASHES[i % DASHES.length]}`;

function lineChart(width, lines, rounds, stages, domain, format, title) {
  const height = 220, left = 40, right = width - 8, top = 20, bottom = height - 26;
  const values = lines.flatMap(([, pairs]) => pairs.map(([, value]) => value)).filter((value) => value !== null);
  const [low, high] = domain || [Math.min(0, ...values), Math.max(...values)];
  const X = (round) => left + (round / Math.max(1, rounds)) * (right - left), Y = (v) => bottom - ((v - low) / (high - low || 1)) * (bottom - top);
  const picture = canvasOf(width, height, `${title} by round`);
  let begun = 0;
  for (const [name, length] of stages) {
    picture.append(svg("line", { class: "gridline", x1: X(begun), x2: X(begun), y1: top, y2: bottom }),
      svg("text", { x: X(begun) + 3, y: top - 6 }, X(begun + length) - X(begun) > 6.2 * name.length ? name : ""));
    begun += length;
  }
  for (const tick of ticksOf(low, high, 4)) picture.append(svg("line", { class: "gridline", x1: left, x2: right, y1: Y(tick), y2: Y(tick) }),
    svg("text", { x: left - 6, y: Y(tick) + 4, "text-anchor": "end" }, format(tick)));
  lines.forEach(([, pairs], i) => {
    let pen = "M", d = "";
    for (const [x, y] of pairs) {
      if (y === null) { pen = "M"; continue; }
      d += `${pen}${X(x).toFixed(1)} ${Y(y).toFixed(1)}`;
      pen = "L";
    }
    picture.append(svg("path", { d, style: lineStyle(i) }));
    if (pairs.length < 12) for (const [x, y] of pairs) if (y !== null) picture.append(svg("circle", { cx: X(x), cy: Y(y), r: 2.5, style: `fill:${STROKES[i % STROKES.length]}` }));
  });
  picture.append(svg("text", { x: right, y: height - 6, "text-anchor": "end" }, `round, of ${rounds}`));
  return picture;
}

// --- answers ---

const MODELS = { victim: "the victim", purified: "purified", inverse: "its inverse twin" };

// Rows of pictures that the task has drawn: of the victim, then of the defended model.
function shownOf(name, answers) {
  const rows = [["the victim", data.close_ups.victims[name]], ["purified", answers]];
  return [el("h3", {}, "What its models find"), ...rows.flatMap(([who, { pictures }]) => Object.entries(pictures).map(([what, picture]) =>
    el("figure", { class: "drawn" }, el("figcaption", {}, el("b", {}, what), `, ${who}`), el("img", { src: picture, alt: `${what} pictures with what ${who} finds` }))))];
}

function answersOf(name, answers) {
  if (answers.pictures) return shownOf(name, answers);
  const victim = data.close_ups.victims[name], asked = { victim: victim.asked, ...answers.asked };
  const rows = Object.entries(MODELS).filter(([key]) => asked[key]).map(([key, text]) => ({ kind: key === "purified" ? "chosen" : null, cells: [text,
    ...["clean_right", "triggered_wanted", "triggered_right"].map((score) => percent(asked[key][score]))] }));
  const made = Boolean(answers.synthesised.each);
  return [
    el("h3", {}, "What its models answer"),
    asked.inverse ? el("p", { class: "note" }, "The masks split the victim in two: the purified model shall answer clean and triggered images alike, the inverse twin shall keep the backdoor and forget the task.") : null,
    el("div", { class: "wide" }, table(["on val", "clean: right", "triggered: as the attacker wants", "triggered: right"], rows)),
    el("h3", {}, made ? "The true trigger, and what was made up in its place" : "The true trigger"),
    made ? el("p", { class: "note" }, synthesisText(victim, answers)) : null,
    el("div", { class: "wide" }, pictureStrip(victim, answers)),
  ].filter(Boolean);
}

function synthesisText(victim, answers) {
  const { counts, total, top } = concentration(victim, answers.synthesised.each.answers.victim);
  return `Perturbations are found ${answers.asked.inverse ? "with the inverse twin, " : ""}from clean images alone. Under one for each of ${total} images the victim says “${victim.classes[top]}” `
    + `${counts[top]} times; the attacker's class is “${[...new Set(victim.wanted)].map((w) => victim.classes[w]).join("”, “")}”. Grey is no change; black and white are the largest one.`;
}

function concentration(victim, counts) {
  return { counts, total: counts.reduce((a, b) => a + b, 0), top: counts.indexOf(Math.max(...counts)) };
}

function pictureStrip(victim, answers) {
  const images = victim.true.length, asked = { victim: victim.asked, ...answers.asked };
  const row = (text, under, pictures, caption, only = images) => el("div", {}, el("div", {}, el("b", {}, text), under ? el("figcaption", {}, under) : null),
    [...Array(images).keys()].map((i) => i >= only ? el("span") : el("figure", {}, el("div", { class: "pixels", role: "img", "aria-label": `${text}, image ${i + 1}`,
      style: `background-image:url(${pictures});background-position:${images > 1 ? (100 * i) / (images - 1) : 0}% 0` }), caption ? el("figcaption", {}, caption(i)) : null)));
  const said = (model, where) => (i) => {
    const answer = asked[model][where][i];
    const kind = answer === victim.true[i] ? "right" : answer === victim.wanted[i] ? "fooled" : "";
    return el("span", { class: kind }, `${kind === "right" ? "✓" : kind === "fooled" ? "▲" : "✗"} ${victim.classes[answer]}`);
  };
  const lines = [
    row("clean", "the victim says", victim.clean, said("victim", "shown_clean")),
    row("triggered", "the victim says; then the purified model", victim.triggered, (i) => el("span", {}, said("victim", "shown_triggered")(i), el("br"), said("purified", "shown_triggered")(i))),
    row("true trigger", `changes by at most ${victim.trigger_max.toFixed(2)}`, victim.trigger),
  ];
  const made = { each: "synthesised, one an image", common: "synthesised, one for all" };
  for (const [kind, text] of Object.entries(made)) {
    const synthesised = answers.synthesised[kind];
    if (synthesised) lines.push(row(text, `at most ${synthesised.max.toFixed(2)}`, synthesised.pictures, null, kind === "common" ? 1 : images));
  }
  return el("div", {}, el("div", { class: "strip", style: `--images:${images}` }, lines),
    el("p", { class: "note", style: "margin-top:.75rem" }, "✓ the true class   ▲ what the attacker wants   ✗ neither"));
}
