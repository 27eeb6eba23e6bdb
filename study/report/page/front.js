// Clean quality against what is left of a backdoor: one mark a trial, a brush that keeps a rectangle.

// The victims themselves; of a suspect there is no such point.
const before = data.before && LEFT in data.before ? data.before : null;

function drawFront() {
  if (!complete.length) return false;
  const container = slot("front");
  if (LEFT === "risk") slot("front-left").textContent = `the risk that it leaves and by its ${PRICE}`;
  const near = closeUp();
  let view = "all", redraw = () => {};
  slot("front-bar").append(...keptBar(), near
    ? segments("Part shown", [["all", "Everything"], ["near", "Close-up"]], view, (value) => { view = value; redraw(); })
    : "");
  slot("front-legend").append(
    ...defencesSeen().map((name) => legendItem("front", name, false, colourOfDefence(name))),
    legendItem("front", "on the front", false, data.defences.length ? "var(--ink)" : null), legendItem("dominated", "dominated"),
    data.chosen === null ? "" : legendItem(roleOf(byNumber.get(data.chosen)), "chosen", true, colourOf(byNumber.get(data.chosen))),
    data.paper === null ? "" : legendItem("paper", "the paper's defaults"),
    before ? legendItem("victim", "the victim, before") : "");
  redraw = responsive(container, (width) => scatter(width, view === "near" ? near : everything()));
  return true;
}

// The range of everything that is drawn, with a margin.
function everything() {
  const points = [...complete, ...(before ? [before] : [])];
  const low = Math.min(...points.map((p) => p[QUALITY]), data.bound ?? 1);
  const margin = Math.max(0.004, 0.06 * (1 - low));
  const most = Math.max(...points.map((p) => p[LEFT]));
  return { x: [-0.02 * most - 0.001, most * 1.03 + 0.002], y: [low - margin, 1 + margin / 2] };
}

// The corner where a choice is made: the front's points of little attack success. None without such.
function closeUp() {
  const front = complete.filter((t) => onFront.has(t.number) && t[LEFT] <= 0.25);
  if (front.length < 2) return null;
  const x = Math.max(0.02, ...front.map((t) => t[LEFT]));
  const y = front.map((t) => t[QUALITY]);
  const low = Math.min(...y, data.bound ?? 1), high = Math.max(...y, data.bound ?? 0);
  const margin = Math.max(0.004, 0.15 * (high - low));
  return { x: [-0.06 * x, 1.12 * x], y: [low - margin, Math.min(1.002, high + margin)] };
}

function scatter(width, view) {
  const narrow = width < 560, height = narrow ? 340 : 430;
  const left = 46, right = width - 14, top = 14, bottom = height - 46;
  const X = (v) => left + ((v - view.x[0]) / (view.x[1] - view.x[0])) * (right - left);
  const Y = (v) => bottom - ((v - view.y[0]) / (view.y[1] - view.y[0])) * (bottom - top);
  const xBack = (px) => view.x[0] + ((px - left) / (right - left)) * (view.x[1] - view.x[0]);
  const yBack = (px) => view.y[0] + ((bottom - px) / (bottom - top)) * (view.y[1] - view.y[0]);
  const inside = (p) => p[LEFT] >= view.x[0] && p[LEFT] <= view.x[1]
    && p[QUALITY] >= view.y[0] && p[QUALITY] <= view.y[1];

  const grid = svg("g", { "aria-hidden": "true" });
  const digits = (span) => (span < 0.04 ? 1 : 0);
  for (const tick of ticksOf(Math.max(0, view.x[0]), Math.min(1, view.x[1]), narrow ? 4 : 8))
    grid.append(svg("line", { class: "gridline", x1: X(tick), x2: X(tick), y1: top, y2: bottom }),
      svg("text", { x: X(tick), y: bottom + 18, "text-anchor": "middle" }, (100 * tick).toFixed(digits(view.x[1] - view.x[0]))));
  for (const tick of ticksOf(view.y[0], Math.min(1, view.y[1]), 6))
    grid.append(svg("line", { class: "gridline", x1: left, x2: right, y1: Y(tick), y2: Y(tick) }),
      svg("text", { x: left - 8, y: Y(tick) + 4, "text-anchor": "end" }, (100 * tick).toFixed(digits(view.y[1] - view.y[0]))));
  grid.append(
    svg("text", { x: right, y: height - 6, "text-anchor": "end" }, `${SCORES[LEFT].name} on val, % (lower is better)`),
    svg("text", { x: left, y: 4, "text-anchor": "start" }, `${SCORES[QUALITY].name} on val, % (higher is better)`));
  if (data.bound !== null && data.bound >= view.y[0] && data.bound <= view.y[1])
    grid.append(svg("line", { class: "bound", x1: left, x2: right, y1: Y(data.bound), y2: Y(data.bound) }),
      svg("text", { class: "halo", x: right, y: Y(data.bound) + 15, "text-anchor": "end" }, `${PRICE} asked for, ${percent(data.bound)}`));

  const line = data.front.map((n) => byNumber.get(n)).filter(inside)
    .sort((a, b) => a[LEFT] - b[LEFT]);
  const steps = line.map((t, i) => (i ? `H${X(t[LEFT])}V${Y(t[QUALITY])}` : `M${X(t[LEFT])} ${Y(t[QUALITY])}`)).join("");
  const brush = svg("rect", { class: "brush", visibility: "hidden" });
  const hit = svg("rect", { class: "hit", x: left, y: top, width: right - left, height: bottom - top });
  const picture = canvasOf(width, height, `Every trial: ${SCORES[QUALITY].name} against ${SCORES[LEFT].name}`,
    grid, line.length > 1 ? svg("path", { class: "step", d: steps }) : null, hit, brush);

  const order = (trial) => (trial.number === data.chosen ? 3 : { dominated: 0, front: 1, paper: 2 }[roleOf(trial)]);
  const drawn = complete.filter(inside).sort((a, b) => order(a) - order(b) || a[LEFT] - b[LEFT]);
  const groups = new Map(drawn.map((trial) => [trial.number, pointOf(trial, X(trial[LEFT]), Y(trial[QUALITY]))]));
  const layer = svg("g", { role: "group", "aria-label": "Trials; arrow keys go from one to the next" }, [...groups.values()]);
  const sequence = [...drawn].sort((a, b) => a[LEFT] - b[LEFT] || a.number - b.number).map((t) => t.number);
  layer.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const at = sequence.indexOf(Number(document.activeElement.dataset.number));
    const next = groups.get(sequence[(at + step + sequence.length) % sequence.length]);
    for (const group of groups.values()) group.setAttribute("tabindex", -1);
    next.setAttribute("tabindex", 0);
    next.focus();
  });
  picture.append(layer, labels(drawn, inside, X, Y, left, right, bottom));
  (groups.get(data.chosen) || groups.get(sequence[0]))?.setAttribute("tabindex", 0);

  const near = nearest(drawn.map((t) => [t.number, X(t[LEFT]), Y(t[QUALITY])]));
  pointAt(picture, hit, near);
  brushRectangle(picture, hit, brush, near, (x0, y0, x1, y1) => {
    const on = (name, a, b) => {
      const scale = axisOf(name).scale;
      keepRange(name, scale.of(a), scale.of(b));
    };
    on(LEFT, xBack(x0), xBack(x1));
    on(QUALITY, yBack(y1), yBack(y0));
  });
  const paint = () => {
    for (const [number, group] of groups) {
      group.classList.toggle("out", !kept(byNumber.get(number)));
      group.classList.toggle("hover", state.hover === number);
      group.querySelector(".seen")?.setAttribute("visibility", state.trial === number ? "visible" : "hidden");
    }
  };
  scatter.paint = paint;
  paint();
  return picture;
}
listeners.push(() => scatter.paint?.());

function pointOf(trial, x, y) {
  const focused = (event) => {
    const box = event.currentTarget.getBoundingClientRect();
    update({ hover: trial.number });
    trialTip(trial, box.left + box.width / 2, box.top + box.height / 2);
  };
  const left = () => { update({ hover: null }); hideTip(); };
  const look = () => update({ trial: trial.number });
  const role = roleOf(trial);
  return svg("g", {
    class: `point ${role}`, transform: `translate(${x} ${y})`, tabindex: -1, role: "button", "data-number": trial.number,
    "aria-label": `${titleOf(trial)}: ${scoresText(trial)}`,
    onfocus: focused, onblur: left, onclick: look,
    onkeydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); look(); } },
  },
  trial.number === data.chosen ? svg("circle", { class: "ring", r: 10.5 }) : null,
  mark(role, { dominated: 3.6, front: 4.6, paper: 7 }[role], colourOf(trial)));
}

// The trial whose mark is nearest to a place in the picture, if one is near: marks may lie on each other.
const nearest = (places) => (x, y, reach) => {
  let found = null, least = reach;
  for (const [number, px, py] of places) {
    const distance = Math.hypot(px - x, py - y);
    if (distance < least) [found, least] = [number, distance];
  }
  return found;
};

const placeIn = (picture, event) => {
  const box = picture.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
};

function pointAt(picture, hit, near) {
  hit.addEventListener("pointermove", (event) => {
    const number = near(...placeIn(picture, event), 16);
    if (number !== state.hover) update({ hover: number });
    hit.style.cursor = number === null ? "crosshair" : "pointer";
    if (number === null) hideTip();
    else trialTip(byNumber.get(number), event.clientX, event.clientY);
  });
  hit.addEventListener("pointerleave", () => { update({ hover: null }); hideTip(); });
}

// Names beside the marks that the headline speaks of, moved apart where they would meet.
function labels(drawn, inside, X, Y, left, right, bottom) {
  const named = drawn.filter((t) => t.number === data.chosen || t.number === data.paper)
    .map((t) => ({ p: t, text: t.number === data.chosen ? `trial ${t.number}, ${t.defence ? `${t.defence}, ` : ""}chosen` : "the paper's defaults" }));
  if (before && inside(before)) named.push({ p: before, text: "the victim, before" });
  const placed = named.map(({ p, text }) => ({ text, x: X(p[LEFT]), y: Y(p[QUALITY]) }))
    .sort((a, b) => a.y - b.y);
  const group = svg("g", { "aria-hidden": "true" });
  let last = -99;
  if (before && inside(before))
    group.append(svg("g", { transform: `translate(${X(before[LEFT])} ${Y(before[QUALITY])})` }, mark("victim", 5)));
  for (const { text, x, y } of placed) {
    const end = x > (left + right) / 2, at = Math.min(bottom - 4, Math.max(y + 4, last + 16));
    last = at;
    group.append(svg("text", { class: "label halo", x: end ? x - 15 : x + 15, y: at, "text-anchor": end ? "end" : "start" }, text));
  }
  return group;
}

// Pointer down, move, up: a rectangle in the picture's pixels. A click looks at the trial there, or where
// there is none keeps all again.
function brushRectangle(picture, hit, brush, near, done) {
  let from = null;
  const place = (event) => {
    const [x, y] = placeIn(picture, event), area = hit.getBBox();
    const inX = (v) => Math.min(area.x + area.width, Math.max(area.x, v));
    const inY = (v) => Math.min(area.y + area.height, Math.max(area.y, v));
    return [inX(x), inY(y)];
  };
  const span = (to) => [Math.min(from[0], to[0]), Math.min(from[1], to[1]), Math.max(from[0], to[0]), Math.max(from[1], to[1])];
  hit.addEventListener("pointerdown", (event) => {
    from = place(event);
    hit.setPointerCapture(event.pointerId);
  });
  hit.addEventListener("pointermove", (event) => {
    if (!from) return;
    const [x0, y0, x1, y1] = span(place(event));
    fill(brush, { x: x0, y: y0, width: x1 - x0, height: y1 - y0, visibility: "visible" }, []);
  });
  const end = (event) => {
    if (!from) return;
    const [x0, y0, x1, y1] = span(place(event));
    from = null;
    brush.setAttribute("visibility", "hidden");
    if (event.type === "pointercancel") return;
    if (x1 - x0 < 4 && y1 - y0 < 4) {
      const number = near(...placeIn(picture, event), 16);
      if (number === null) clearRanges();
      else update({ trial: number });
    } else done(x0, y0, x1, y1);
  };
  hit.addEventListener("pointerup", end);
  hit.addEventListener("pointercancel", end);
}
