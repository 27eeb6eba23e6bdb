// What can be known without the attack, beside what is true: the blind choice and the oracle's.

function drawBlind() {
  if (!data.blind) return false;
  const { risk, spearman, chosen, oracle: best } = data.blind;
  const [oracle, blind] = [byNumber.get(best), byNumber.get(chosen)];
  slot("blind-text").textContent = `Over ${count(complete.length, "trial")} the rank correlation (Spearman) of the risk, which needs no attack, `
    + `and the true attack success is ${spearman === null ? "undefined" : spearman.toFixed(2)}.`
    + (oracle && blind ? ` The blind choice loses ${(100 * (blind.attack_success - oracle.attack_success)).toFixed(1)} points of attack success against the oracle's.` : "");
  responsive(slot("blind"), (width) => blindChart(width, risk, chosen));
  slot("blind-legend").append(legendItem("front", "on the front"), legendItem("dominated", "dominated"),
    oracle ? legendItem(roleOf(oracle), "the oracle's choice", true) : "", blind ? legendItem("triangle", "the blind choice") : "");
  const rows = [["the oracle's", oracle, best], ["blind", blind, chosen]].filter(([, trial]) => trial);
  slot("blind-table").append(table(["choice", "trial", "risk", ...Object.values(SCORES).map((s) => `${s.short} on val`)],
    rows.map(([who, trial, number]) => ({ cells: [who, number, words(risk[number]), ...Object.keys(SCORES).map((key) => percent(trial[key]))] }))));
  return true;
}

function blindChart(width, risk, chosen) {
  const height = 320, left = 46, right = width - 14, top = 14, bottom = height - 46;
  const risks = Object.values(risk), low = Math.min(...risks), high = Math.max(...risks), span = high - low || 1;
  const X = (v) => left + 12 + ((v - low) / span) * (right - left - 24), Y = (v) => bottom - v * (bottom - top);
  const picture = canvasOf(width, height, "True attack success against the risk that is known without the attack");
  for (const tick of ticksOf(low, high || 1, width < 560 ? 3 : 6)) picture.append(svg("line", { class: "gridline", x1: X(tick), x2: X(tick), y1: top, y2: bottom }),
    svg("text", { x: X(tick), y: bottom + 18, "text-anchor": "middle" }, words(tick)));
  for (const tick of [0, 0.25, 0.5, 0.75, 1]) picture.append(svg("line", { class: "gridline", x1: left, x2: right, y1: Y(tick), y2: Y(tick) }),
    svg("text", { x: left - 8, y: Y(tick) + 4, "text-anchor": "end" }, words(100 * tick)));
  picture.append(svg("text", { x: left, y: 4 }, "true attack success on val, %"), svg("text", { x: right, y: height - 6, "text-anchor": "end" }, "risk, known without the attack (lower is better)"));
  for (const trial of complete) {
    const place = `translate(${X(risk[trial.number])} ${Y(trial.attack_success)})`;
    picture.append(svg("g", {
      transform: place, style: "cursor:pointer", onclick: () => update({ trial: trial.number }),
      onpointermove: (event) => { if (state.hover !== trial.number) update({ hover: trial.number }); trialTip(trial, event.clientX, event.clientY); },
      onpointerleave: () => { update({ hover: null }); hideTip(); },
    }, trial.number === data.chosen ? svg("circle", { class: "ring", r: 9 }) : null, mark(roleOf(trial), roleOf(trial) === "dominated" ? 3.6 : 4.6, colourOf(trial))));
    if (trial.number === chosen) picture.append(svg("g", { transform: place, "pointer-events": "none" }, mark("triangle", 8)));
  }
  return picture;
}
