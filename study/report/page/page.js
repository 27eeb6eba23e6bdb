// Every section draws itself, or is taken out where the study has nothing for it.

const SECTIONS = {
  finding: drawFinding, front: drawFront, parallel: drawParallel, importance: drawImportance, blind: drawBlind,
  unseen: drawUnseen, heat: drawHeat, "close-up": drawCloseUp, cost: drawCost, failures: drawFailures, provenance: drawProvenance,
};
for (const [id, draw] of Object.entries(SECTIONS)) if (!draw()) document.getElementById(id).remove();
if (searched.length) drawTrials();
slot("contents").append(...[...document.querySelectorAll("section[data-title]")].map((section) =>
  el("a", { href: `#${section.id}` }, section.dataset.title)));
document.addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
