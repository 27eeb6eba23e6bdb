// The choice on every victim of the suite, purified anew with other seeds: what it is worth where it was not tuned.

const GROUPS = { tuning: "tuned on", held_out: "held out", control: "clean controls" };

function drawUnseen() {
  if (!data.suite && !data.leave_one_out) return false;
  if (data.suite) {
    const names = Object.values(data.suite)[0].victims;
    const wanted = Object.keys(GROUPS).map((role) => [role, Object.keys(names).filter((name) => names[name].role === role)]).filter(([, found]) => found.length);
    responsive(slot("unseen"), (width) => suiteChart(width, wanted));
    slot("unseen-legend").append(...legendOfSuite());
    slot("unseen-table").append(el("details", {}, el("summary", {}, "In numbers"), el("div", { class: "wide" }, suiteTable(wanted))));
  }
  if (data.leave_one_out) slot("unseen-table").append(...leaveOneOut());
  return true;
}

const legendOfSuite = () => [legendItem("front", "the chosen configuration: mean, and the range of its runs"),
  data.suite.paper_defaults ? legendItem("paper", "the paper's defaults") : "", legendItem("victim", "the victim, before")];

// Two panels with a row a victim: attack success left, accuracy lost right.
function suiteChart(width, wanted) {
  const narrow = width < 560, label = narrow ? 0 : roomFor(wanted.flatMap(([, names]) => names), 190, width), row = narrow ? 42 : 30, gap = 36, top = 34;
  const rows = wanted.flatMap(([role, names]) => [[role, null], ...names.map((name) => [role, name])]);
  const height = top + row * rows.length + 14, panel = (width - label - gap - 12) / 2;
  const drops = Object.values(data.suite).flatMap(({ victims }) => Object.values(victims).flatMap((v) => (v.accuracy_drop ? [v.accuracy_drop.min, v.accuracy_drop.max] : [])));
  const low = Math.min(0, ...drops), high = Math.max(0.01, ...drops);
  const scales = [
    { x: label, of: (v) => v, title: narrow ? "attack success, %" : "attack success on test, %", ticks: [0, 0.5, 1] },
    { x: label + panel + gap, of: (v) => (v - low) / (high - low), title: narrow ? `${PRICE} lost, points` : `${SCORES[QUALITY].name} lost on test, points`, ticks: ticksOf(low, high, 3) },
  ];
  const picture = canvasOf(width, height, `Attack success and ${PRICE} lost of every victim of the suite`);
  for (const { x, of, title, ticks } of scales) {
    picture.append(svg("text", { x, y: 8 }, title));
    for (const tick of ticks) picture.append(svg("line", { class: "gridline", x1: x + of(tick) * panel, x2: x + of(tick) * panel, y1: top, y2: height - 10 }),
      svg("text", { x: x + of(tick) * panel, y: top - 6, "text-anchor": "middle" }, words(100 * tick)));
  }
  rows.forEach(([role, name], i) => {
    const y = top + i * row + row - 10;
    if (!name) { picture.append(svg("text", { class: "label halo", x: 0, y: y + 4 }, GROUPS[role])); return; }
    picture.append(svg("text", { class: "halo", x: 0, y: narrow ? y - 12 : y + 4 }, name));
    for (const [configuration, kind] of [["paper_defaults", "paper"], ["chosen", "front"]]) {
      const victim = data.suite[configuration]?.victims[name];
      if (!victim) continue;
      if (kind === "front") picture.append(svg("g", { transform: `translate(${label + victim.before.attack_success * panel} ${y})` }, mark("victim", 4)));
      [["attack_success", scales[0]], ["accuracy_drop", scales[1]]].forEach(([key, { x, of }]) => {
        const spread = victim[key];
        if (!spread) return;
        const at = (value) => x + of(value) * panel;
        picture.append(svg("g", { onpointermove: (event) => spreadTip(event, name, configuration, key, spread), onpointerleave: hideTip },
          kind === "front" ? svg("line", { class: "range", x1: at(spread.min), x2: at(spread.max), y1: y, y2: y }) : null,
          svg("g", { transform: `translate(${at(spread.mean)} ${y})` }, mark(kind, kind === "paper" ? 6 : 4.6))));
      });
    }
  });
  return picture;
}

const NAMES = { chosen: "chosen", paper_defaults: "the paper's defaults" };
const spreadText = (spread, digits = 1) => (spread ? `${(100 * spread.mean).toFixed(digits)} ± ${(100 * spread.std).toFixed(digits)}` : "–");

function spreadTip(event, name, configuration, key, spread) {
  showTip(event.clientX, event.clientY, el("b", {}, `${name}, ${NAMES[configuration]}`),
    el("span", {}, `${key === "attack_success" ? "attack success, %" : `${PRICE} lost, points`}: ${spreadText(spread)}, from ${(100 * spread.min).toFixed(1)} to ${(100 * spread.max).toFixed(1)}, ${count(spread.n, "run")}`));
}

function suiteTable(wanted) {
  const rows = [];
  for (const [configuration, { victims, roles }] of Object.entries(data.suite))
    for (const [role, names] of wanted) {
      const line = (name, kind, found, before) => rows.push({ kind, cells: [name, NAMES[configuration], GROUPS[role],
        before === undefined ? "" : percent(before), spreadText(found.attack_success), spreadText(found.accuracy_drop), spreadText(found[data.recovered]),
        String(found.attack_success?.n ?? 0), found.n_failed ? String(found.n_failed) : ""] });
      for (const name of names) if (victims[name]) line(name, null, victims[name], victims[name].before.attack_success);
      if (roles[role]) line(`all ${GROUPS[role]}`, configuration === "chosen" ? "chosen" : null, roles[role]);
    }
  return table(["victim", "configuration", "role", "ASR before", "ASR % ± std", `${PRICE} lost, points ± std`, `${data.metrics[data.recovered].short} % ± std`, "runs", "failed"], rows, { left: [1, 2] });
}

function leaveOneOut() {
  const { exact, attacks } = data.leave_one_out;
  const cell = (point) => (point ? `trial ${point.number}: ASR ${percent(point.attack_success)}, ${data.metrics[QUALITY].short} ${percent(point[QUALITY])}` : "nothing to choose");
  const rows = Object.entries(attacks).map(([attack, found]) => ({ cells: [attack, cell(found.without), cell(found.with),
    found.loss ? `${(100 * found.loss.attack_success).toFixed(1)} points of ASR, ${(100 * found.loss[QUALITY]).toFixed(1)} of ${PRICE}` : "–"] }));
  if (!rows.length) return [];
  return [el("h3", {}, "Choosing without one attack"),
    el("p", { class: "note" }, "For each attack of the tuning victims, the trial that the same rule chooses from the others alone, scored on the attack left out (val). "
      + (exact ? "The trials would have been the same without it, so this is exact." : "The trials were proposed with the attack in view, so a study without it may do worse.")),
    el("div", { class: "wide" }, table(["left out", "chosen without it", "chosen with it", "what not seeing it costs"], rows, { left: [1, 2, 3] }))];
}
