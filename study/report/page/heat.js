// Victims by configurations: a cell a score, darker where the defence did worse.

function drawHeat() {
  const names = data.victims.map((victim) => victim.name);
  if (names.length < 2 || !complete.length) return false;
  let score = "attack_success", redraw = () => {};
  const ramp = el("span", { class: "legend" });
  slot("heat-bar").append(
    segments("Score shown", Object.entries(SCORES).map(([key, s]) => [key, s.name]), score, (value) => { score = value; legend(); redraw(); }),
    ramp);
  const legend = () => {
    const cells = [0, 0.25, 0.5, 0.75, 1].map((share) => shade(share)).join(", ");
    const [best, worst] = SCORES[score].good === "low" ? ["0 %", "100 %"] : ["100 %", `${percent(floorOf(score), 0)} or less`];
    ramp.replaceChildren(el("span", {}, best, el("span", { class: "ramp", style: `background:linear-gradient(to right, ${cells})` }), worst));
  };
  legend();
  redraw = responsive(slot("heat"), (width) => heat(width, score));
  return true;
}

// Paper-white to the warning colour; the browser mixes, so that both modes have their own.
const shade = (share) => `color-mix(in oklab, var(--warm) ${Math.round(100 * share)}%, var(--grid))`;

// How bad a score is, 0 to 1: attack success itself; accuracies from the victim's own down.
const floorOf = (score) => (score === QUALITY ? 0.8 : 0);
function badness(value, score) {
  if (SCORES[score].good === "low") return value;
  return Math.min(1, Math.max(0, (1 - value) / (1 - floorOf(score))));
}

function heat(width, score) {
  const trials = [...complete].sort((a, b) => a.attack_success - b.attack_success || b[QUALITY] - a[QUALITY]);
  const narrow = width < 560, label = narrow ? 0 : roomFor(data.victims.map((victim) => victim.name), 170, width);
  const row = narrow ? 40 : 26, bar = narrow ? 20 : 22, top = 24;
  const cell = (width - label) / trials.length, gap = cell > 6 ? 1.5 : 0;
  const height = top + row * data.victims.length + 22;
  const picture = canvasOf(width, height, `${SCORES[score].name} of every victim under every trial`);
  trials.forEach((trial, i) => {
    const x = label + i * cell, column = svg("g", {
      "data-number": trial.number,
      onpointermove: (event) => { if (state.hover !== trial.number) update({ hover: trial.number }); heatTip(trial, score, event); },
      onpointerleave: () => { update({ hover: null }); hideTip(); },
      onclick: () => update({ trial: trial.number }),
      style: "cursor:pointer",
    });
    if (roleOf(trial) !== "dominated")
      column.append(svg("g", { transform: `translate(${x + cell / 2} 12)` },
        trial.number === data.chosen ? svg("circle", { class: "ring", r: 8 }) : null, mark(roleOf(trial), Math.min(4, Math.max(2, cell / 2)), colourOf(trial))));
    data.victims.forEach((victim, k) => {
      const value = trial.scores[victim.name]?.[score];
      if (value === undefined) return;
      const y = top + k * row + (row - bar);
      column.append(svg("rect", { x: x + gap / 2, y, width: Math.max(0.5, cell - gap), height: bar, style: `fill:${shade(badness(value, score))}` }));
      if (cell > 26) column.append(svg("text", { x: x + cell / 2, y: y + bar - 6, "text-anchor": "middle", style: `fill:var(--ink)` }, (100 * value).toFixed(0)));
    });
    picture.append(column);
  });
  data.victims.forEach((victim, k) => picture.append(svg("text", narrow
    ? { x: 0, y: top + k * row + 14 } : { x: 0, y: top + k * row + row - 7 }, victim.name)));
  picture.append(svg("text", { x: label, y: height - 4 }, "least attack success"),
    svg("text", { x: width, y: height - 4, "text-anchor": "end" }, "most"));
  return picture;
}

function heatTip(trial, score, event) {
  showTip(event.clientX, event.clientY, el("b", {}, titleOf(trial)),
    el("table", {}, data.victims.map((victim) => el("tr", {}, el("th", {}, victim.name),
      el("td", {}, percent(trial.scores[victim.name]?.[score]))))), el("span", {}, SCORES[score].name));
}
