// Draws the charts in the page's colours and width, anew where either changes, and keeps what was chosen.
const spec = JSON.parse(document.getElementById("explorer-spec").textContent);
const charts = document.getElementById("explorer-charts");
const controls = spec.params.map((p) => p.name);
let view = null;

function colours() {
  const style = getComputedStyle(document.body);
  const text = style.getPropertyValue("color");
  const grid = "rgba(128, 128, 128, 0.35)";
  const axis = { labelColor: text, titleColor: text, gridColor: grid, domainColor: text, tickColor: text, labelFontSize: 12, titleFontSize: 12 };
  return {
    background: "transparent", font: style.fontFamily, view: { stroke: grid }, axis, text: { color: text, fontSize: 12 },
    mark: { color: text }, rule: { color: text }, title: { color: text, fontSize: 14, subtitleColor: text, subtitleFontSize: 12 }, legend: { labelColor: text, labelFontSize: 12, orient: "bottom", columns: 2, symbolSize: 400 },
  };
}

async function draw() {
  const chosen = view ? Object.fromEntries(controls.map((c) => [c, view.signal(c)])) : {};
  const wide = charts.clientWidth > 800;
  const width = (wide ? charts.clientWidth / 2 : charts.clientWidth) - 75;
  const params = spec.params.map((p) => (p.name in chosen ? { ...p, value: chosen[p.name] } : p));
  const concat = spec.concat.map((c) => ({ ...c, width }));
  document.getElementById("explorer-controls").replaceChildren();
  const made = await vegaEmbed(charts, { ...spec, params, concat, columns: wide ? 2 : 1, config: colours() }, {
    actions: false, renderer: "svg", bind: "#explorer-controls",
  });
  view = made.view;
  controls.forEach((c) => view.addSignalListener(c, say));
  say();
}

// What the charts show at the chosen step, in words.
function say() {
  const s = Object.fromEntries(controls.map((c) => [c, view.signal(c)]));
  const rows = (name) => spec.datasets[name].filter((r) => r.task === s.task && r.step === s.step);
  const model = (r) => r.prior === s.prior && r.c_tr === s.c_tr && r.rate === s.rate;
  const percent = (r) => `${(100 * r.y).toFixed(0)} %`;
  const now = rows("behaviour").filter(model).map((r) => `${r.whose}, ${r.line}: ${percent(r)}`);
  const back = rows("revival").filter((r) => r.back === s.back && (r.line !== "reFT" || model(r))).map((r) => `${r.line}: ${percent(r)}`);
  document.getElementById("explorer-says").textContent =
    `At step ${s.step} of fine-tuning ${now.join("; ")}. At step ${s.step} of the way back ${back.join("; ") || "nothing was measured"}.`;
}

draw();
let width = charts.clientWidth;
addEventListener("resize", () => { if (charts.clientWidth !== width) { width = charts.clientWidth; draw(); } });
new MutationObserver(draw).observe(document.body, { attributes: true, attributeFilter: ["data-md-color-scheme"] });
