// The data, and what the reader has done to them: which ranges are kept, which trial is looked at.

const data = JSON.parse(document.getElementById("data").textContent);

// What says how much of a backdoor is left: of a suspect, whose trigger nobody knows, the risk.
const LEFT = data.left;

// The clean score that a defence may not cost, as `Task.quality`; what it is called in a sentence.
const QUALITY = data.quality, PRICE = data.price;

const SCORES = Object.fromEntries(data.scores.map((key) => [key, data.metrics[key]]));

const complete = data.trials.filter((trial) => trial.status === "COMPLETE");
const isPaper = (trial) => trial.preset === "paper";
const searched = complete.filter((trial) => !isPaper(trial));
const byNumber = new Map(data.trials.map((trial) => [trial.number, trial]));
const onFront = new Set(data.front);

const roleOf = (trial) =>
  isPaper(trial) ? "paper" : onFront.has(trial.number) ? "front" : "dominated";

function titleOf(trial) {
  const said = [];
  if (trial.defence) said.push(trial.defence);
  if (isPaper(trial)) said.push("the paper's defaults");
  if (trial.number === data.chosen) said.push("chosen");
  else if (onFront.has(trial.number)) said.push("on the front");
  return `Trial ${trial.number}${said.length ? `, ${said.join(", ")}` : ""}`;
}

// Of several defences each has a colour; its name is in every title, tip and table as well.
const colourOf = (trial) => (trial.defence ? colourOfDefence(trial.defence) : null);
function colourOfDefence(name) {
  const at = data.defences.indexOf(name);
  return `oklch(${at % 2 ? 68 : 58}% .16 ${Math.round((250 + 137.5 * at) % 360)})`;
}
const defencesSeen = () => data.defences.filter((name) => complete.some((trial) => trial.defence === name));

const scoresText = (trial) => Object.entries(SCORES)
  .map(([key, score]) => `${score.name} ${percent(trial[key])}`).join(", ");

// Ranges by axis, as shares [low, high] of it. An axis without one keeps everything.
const state = { ranges: new Map(), hover: null, trial: null, victim: null, defence: null };
const axes = [];
const listeners = [];

function axisOf(name) { return axes.find((axis) => axis.name === name); }

function valueOn(axis, trial) {
  return axis.objective ? trial[axis.name] : trial.parameters[axis.name];
}

// Whether a trial lies in every range; one without a value on a restricted axis does not.
function kept(trial) {
  for (const [name, [low, high]] of state.ranges) {
    const value = valueOn(axisOf(name), trial);
    if (value === undefined) return false;
    const share = axisOf(name).scale.of(value);
    if (share < low - 1e-9 || share > high + 1e-9) return false;
  }
  return true;
}

function update(change) {
  Object.assign(state, change);
  for (const listener of listeners) listener(change);
}

// Keeps a range of an axis; the whole of it is none.
function keepRange(name, low, high) {
  if (low <= 0 && high >= 1) state.ranges.delete(name);
  else state.ranges.set(name, [Math.max(0, low), Math.min(1, high)]);
  update({ ranges: state.ranges });
}

function clearRanges() {
  state.ranges.clear();
  update({ ranges: state.ranges });
}

function trialTip(trial, x, y) {
  showTip(x, y, el("b", {}, titleOf(trial)),
    el("table", {}, Object.entries(SCORES).map(([key, score]) =>
      el("tr", {}, el("th", {}, score.name), el("td", {}, percent(trial[key])
        + (trial.spread ? ` ± ${(100 * trial.spread[key].std).toFixed(1)}` : ""))))),
    el("span", {}, `${duration(trial.seconds)}, ${count(trial.rounds, "round")}`));
}

// How many trials are kept, with the button that keeps them all again.
function keptBar() {
  const text = el("span", { class: "grow", "aria-live": "polite" });
  const clear = el("button", { type: "button", onclick: clearRanges }, "Keep all");
  const draw = () => {
    const left = complete.filter(kept).length;
    clear.hidden = !state.ranges.size;
    text.textContent = state.ranges.size
      ? `${left} of ${complete.length} trials lie in the ranges kept`
      : `${count(complete.length, "trial")} with a result, ${data.front.length} on the front`;
  };
  listeners.push(draw);
  draw();
  return [text, clear];
}

function buildAxes() {
  const spread = (key) => {
    const values = complete.map((trial) => trial[key]);
    const low = Math.min(...values), high = Math.max(...values);
    return high > low ? [low, high] : [low - 0.01, high + 0.01];
  };
  const objectives = new Set([LEFT, QUALITY, ...Object.keys(data.objectives)]);
  for (const key of objectives) {
    const [low, high] = spread(key);
    axes.push({ name: key, label: data.metrics[key]?.name ?? key.replaceAll("_", " "), objective: true,
      scale: scaleOf({ kind: "float", low, high, percent: key !== "seconds" }) });
  }
  const weight = data.importance[LEFT] || {};
  const parameters = data.parameters.filter(shownOnAxis).sort((a, b) => (weight[b.name] || 0) - (weight[a.name] || 0));
  for (const parameter of parameters)
    axes.push({ name: parameter.name, label: settingOf(parameter.name), scale: scaleOf(parameter) });
}

// Of several defences the axes are those of one, which the reader picks.
const shownOnAxis = ({ name }) => !data.defences.length || name === "defence" || name.startsWith(`${state.defence}.`);
const settingOf = (name) => (data.defences.length ? name.slice(name.indexOf(".") + 1) : name);

function showDefence(name) {
  state.defence = name;
  axes.length = 0;
  buildAxes();
  for (const axis of [...state.ranges.keys()]) if (!axisOf(axis)) state.ranges.delete(axis);
}
if (complete.length)
  showDefence((byNumber.get(data.chosen) ?? byNumber.get(data.front[0]))?.defence ?? data.defences[0] ?? null);
