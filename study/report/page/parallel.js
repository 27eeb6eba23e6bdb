// Parallel coordinates: an axis a setting, a line a trial. Upright where there is room, else lying.

function drawParallel() {
  if (!searched.length) return false;
  slot("parallel-bar").append(...keptBar());
  if (data.importance[LEFT])
    slot("axis-order").textContent = `; the settings that matter most for ${SCORES[LEFT].name} come first`;
  if (data.paper === null) slot("paper-aside").remove();
  const redraw = responsive(slot("parallel"), parallel);
  if (data.defences.length) {
    const names = defencesSeen();
    const { select, nodes } = picker("defence", "Settings of", names.map((name) => [name, name]), (name) => {
      showDefence(name);
      redraw();
      update({ ranges: state.ranges });
    });
    select.value = state.defence;
    slot("parallel-bar").append(...nodes);
  }
  return true;
}

function parallel(width) {
  const lying = width < 70 * axes.length;
  const row = 58, height = lying ? row * axes.length + 16 : 410;
  const begin = lying ? 34 : 100, size = lying ? width - 24 : height - begin - 26;
  const step = lying ? row : (width - 80) / (axes.length - 1 || 1);
  // where a share of an axis is on the picture
  const at = lying
    ? (i, share) => [12 + share * size, begin + i * step]
    : (i, share) => [40 + i * step, begin + (1 - share) * size];

  const lines = new Map(), reaches = new Map();
  for (const trial of searched) {
    const d = pathOf(trial, at);
    const colour = colourOf(trial);
    lines.set(trial.number, svg("path", { d, style: colour ? `stroke:${colour}` : null, class: `trial-line ${roleOf(trial)}${trial.number === data.chosen ? " chosen" : ""}` }));
    reaches.set(trial.number, svg("path", {
      d, class: "trial-reach", onclick: () => update({ trial: trial.number }),
      onpointermove: (event) => {
        if (state.hover !== trial.number) update({ hover: trial.number });
        trialTip(trial, event.clientX, event.clientY);
      },
      onpointerleave: () => { update({ hover: null }); hideTip(); },
    }));
  }
  const order = [...searched].sort((a, b) => rank(a) - rank(b)).map((trial) => trial.number);
  const layer = svg("g", { "aria-hidden": "true" }, order.map((n) => lines.get(n)), order.map((n) => reaches.get(n)));
  const pieces = axes.map((axis, i) => axisPiece(axis, i, at, lying, size, step));
  const picture = canvasOf(width, height, "Settings and scores of every searched trial", pieces.map((p) => p.back), layer, pieces.map((p) => p.front));

  const paint = () => {
    for (const trial of searched) {
      const out = !kept(trial), line = lines.get(trial.number);
      line.classList.toggle("out", out);
      reaches.get(trial.number).classList.toggle("out", out);
      const over = state.hover === trial.number;
      if (over && !line.classList.contains("hover")) line.parentNode.insertBefore(line, reaches.get(order[0]));
      line.classList.toggle("hover", over);
    }
    for (const piece of pieces) piece.paint();
  };
  parallel.paint = paint;
  paint();
  return picture;
}
listeners.push(() => parallel.paint?.());

const rank = (trial) => (trial.number === data.chosen ? 2 : onFront.has(trial.number) ? 1 : 0);

// A line through the axes where the trial has a value; it breaks where it has none.
function pathOf(trial, at) {
  let d = "", pen = "M";
  axes.forEach((axis, i) => {
    const value = valueOn(axis, trial);
    if (value === undefined) { pen = "M"; return; }
    const [x, y] = at(i, Math.min(1, Math.max(0, axis.scale.of(value))));
    d += `${pen}${x.toFixed(1)} ${y.toFixed(1)}`;
    pen = "L";
  });
  return d;
}

function axisPiece(axis, i, at, lying, size, step) {
  const [x0, y0] = at(i, 0), [x1, y1] = at(i, 1);
  const back = svg("line", { class: "axis", x1: x0, y1: y0, x2: x1, y2: y1 });
  const text = svg("g", { "aria-hidden": "true", "pointer-events": "none" }), kind = axis.objective ? "label halo" : "halo";
  if (lying) text.append(svg("text", { class: kind, x: x0, y: y0 - 12 }, axis.label));
  else {
    const parts = axis.label.replaceAll("_", "_ ").split(" ");
    parts.forEach((part, k) => text.append(svg("text", { class: kind, x: x1, y: y1 - 31 - 14 * (parts.length - 1 - k), "text-anchor": "middle" }, part)));
  }
  axis.scale.ticks.forEach(([share, value], k) => {
    const [x, y] = at(i, share), last = k === axis.scale.ticks.length - 1;
    if (!lying) text.append(svg("text", { x, y: share === 0 ? y + 21 : share === 1 ? y - 13 : y + 4, dx: share === 0 || share === 1 ? 0 : 6, class: "halo", "text-anchor": share === 0 || share === 1 ? "middle" : "start" }, value));
    else text.append(svg("text", { x, y: y + 16, class: "halo", "text-anchor": share === 0 ? "start" : last && share === 1 ? "end" : "middle" }, value));
  });

  const half = lying ? 13 : Math.min(15, step / 2 - 2);
  const area = lying
    ? { x: x0, y: y0 - half, width: size, height: 2 * half }
    : { x: x1 - half, y: y1, width: 2 * half, height: size };
  const hit = svg("rect", { class: "hit", ...area }), range = svg("rect", { class: "brush", "pointer-events": "none" });
  const handles = [0, 1].map((side) => handleOf(axis, side));
  const front = svg("g", {}, text, hit, range, handles);
  dragRange(axis, hit, at, i, lying);
  handles.forEach((handle, side) => dragHandle(axis, handle, side, at, i, lying, front));

  const paint = () => {
    const [low, high] = state.ranges.get(axis.name) || [0, 1];
    [low, high].forEach((share, side) => {
      const [x, y] = at(i, share), moved = side ? share < 1 : share > 0;
      const turn = lying ? (side ? -90 : 90) : side ? 180 : 0;
      fill(handles[side], { transform: `translate(${x} ${y}) rotate(${turn})`, "aria-valuenow": share.toFixed(3), "aria-valuetext": axis.scale.words(share) }, []);
      handles[side].classList.toggle("moved", moved);
    });
    const [a, b] = [at(i, low), at(i, high)];
    fill(range, lying
      ? { x: a[0], y: a[1] - half, width: b[0] - a[0], height: 2 * half }
      : { x: b[0] - half, y: b[1], width: 2 * half, height: a[1] - b[1] }, []);
    range.setAttribute("visibility", state.ranges.has(axis.name) ? "visible" : "hidden");
  };
  return { back, front, paint };
}

// A triangle outside the end of the range, moved by pointer or arrow keys.
function handleOf(axis, side) {
  return svg("path", {
    class: "handle", d: "M0 0L5.5 8H-5.5Z", tabindex: 0, role: "slider",
    "aria-label": `${axis.label}, ${side ? "highest" : "lowest"} kept`, "aria-valuemin": 0, "aria-valuemax": 1,
    onkeydown: (event) => {
      const step = { ArrowUp: 0.05, ArrowRight: 0.05, ArrowDown: -0.05, ArrowLeft: -0.05, PageUp: 0.2, PageDown: -0.2, Home: -1, End: 1 }[event.key];
      if (event.key === "Escape") clearRanges();
      if (!step) return;
      event.preventDefault();
      moveEnd(axis, side, (state.ranges.get(axis.name) || [0, 1])[side] + step);
    },
  });
}

function moveEnd(axis, side, share) {
  const [low, high] = state.ranges.get(axis.name) || [0, 1];
  if (side) keepRange(axis.name, low, Math.min(1, Math.max(low, share)));
  else keepRange(axis.name, Math.max(0, Math.min(high, share)), high);
}

function shareAt(event, picture, at, i, lying) {
  const box = picture.getBoundingClientRect(), [x0, y0] = at(i, 0), [x1, y1] = at(i, 1);
  const share = lying ? (event.clientX - box.left - x0) / (x1 - x0) : (event.clientY - box.top - y0) / (y1 - y0);
  return Math.min(1, Math.max(0, share));
}

// Near an end the end is meant.
const toEnd = (share) => (share < 0.03 ? 0 : share > 0.97 ? 1 : share);

// Dragging along the axis keeps what was passed; a click on it keeps all of it again.
function dragRange(axis, hit, at, i, lying) {
  let from = null;
  hit.addEventListener("pointerdown", (event) => {
    from = shareAt(event, hit.ownerSVGElement, at, i, lying);
    hit.setPointerCapture(event.pointerId);
  });
  hit.addEventListener("pointermove", (event) => {
    if (from === null) return;
    const to = shareAt(event, hit.ownerSVGElement, at, i, lying);
    if (Math.abs(to - from) > 0.015) keepRange(axis.name, toEnd(Math.min(from, to)), toEnd(Math.max(from, to)));
  });
  hit.addEventListener("pointerup", (event) => {
    if (from === null) return;
    const to = shareAt(event, hit.ownerSVGElement, at, i, lying);
    if (Math.abs(to - from) <= 0.015) keepRange(axis.name, 0, 1);
    from = null;
  });
  hit.addEventListener("pointercancel", () => { from = null; });
}

function dragHandle(axis, handle, side, at, i, lying) {
  let held = false;
  handle.addEventListener("pointerdown", (event) => { held = true; handle.setPointerCapture(event.pointerId); });
  handle.addEventListener("pointermove", (event) => {
    if (held) moveEnd(axis, side, shareAt(event, handle.ownerSVGElement, at, i, lying));
  });
  for (const name of ["pointerup", "pointercancel"]) handle.addEventListener(name, () => { held = false; });
}
