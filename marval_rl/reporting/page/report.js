const page = JSON.parse(document.getElementById("page").textContent);
const $ = (selector, root = document) => [...root.querySelectorAll(selector)];
const byId = id => document.getElementById(id);
const number = value => value == null ? "n/a" : String(+value.toPrecision(4)).replace("-", "−");
const colour = run => `c${run % 8}`;
const state = {smoothing: 0.04, x0: 0, x1: page.last, hidden: [], cursor: null};

// Charts: Vega draws them; a chart off the screen is drawn when the browser is idle.
const charts = $(".chart").map(figure => ({figure, spec: page.charts[figure.dataset.chart], isCurve: figure.matches(".curve")}));
for (const chart of charts) {
  chart.rows = chart.spec.data.find(data => data.name === "rows").values;
  chart.runs = page.names.map((_, run) => chart.rows.filter(row => row.r === run));
  if (chart.isCurve) readOut(chart);
}

function apply(chart) {
  if (!chart.view) return;
  chart.view.signal("hidden", state.hidden);
  if (chart.isCurve) {
    const longest = Math.max(...chart.runs.map(rows => rows.length));
    const smoothing = "evaluation" in chart.figure.dataset ? 0 : state.smoothing;
    chart.view.signal("half", Math.round(smoothing * longest / 2)).signal("x0", state.x0).signal("x1", state.x1);
    chart.view.signal("at", state.cursor ?? -1);
  }
  chart.view.runAsync();
}

async function draw(chart) {
  if (chart.isBegun) return;
  chart.isBegun = true;
  const plot = chart.figure.querySelector(".plot");
  chart.view = (await vegaEmbed(plot, chart.spec, {mode: "vega", renderer: "svg", actions: false, ast: true, defaultStyle: false})).view;
  apply(chart);
  if (chart.isCurve) listen(chart, plot);
}

function listen(chart, plot) {
  let from = null, brush = null;
  const stepAt = event => {
    const x = event.clientX - plot.getBoundingClientRect().left - chart.view.origin()[0];
    return Math.min(Math.max(Math.round(chart.view.scale("x").invert(x)), state.x0), state.x1);
  };
  const end = () => { brush?.remove(); from = brush = null; };
  plot.addEventListener("pointermove", event => {
    point(stepAt(event));
    if (!from || Math.abs(event.clientX - from.clientX) < 6) return;
    if (!brush) { brush = document.createElement("div"); brush.className = "brush"; plot.append(brush); }
    const left = plot.getBoundingClientRect().left;
    brush.style.left = `${Math.min(from.clientX, event.clientX) - left}px`;
    brush.style.width = `${Math.abs(event.clientX - from.clientX)}px`;
  });
  plot.addEventListener("pointerdown", event => { if (event.pointerType === "mouse" && event.button === 0) { from = event; event.preventDefault(); } });
  plot.addEventListener("pointerup", event => {
    const steps = brush && [stepAt(from), stepAt(event)].sort((a, b) => a - b);
    end();
    if (steps && steps[1] > steps[0]) zoom(...steps);
  });
  plot.addEventListener("pointerleave", () => { end(); point(null); });
  plot.addEventListener("dblclick", () => zoom(0, page.last));
}

function point(step) {
  state.cursor = step;
  for (const chart of charts.filter(chart => chart.isCurve && chart.isSeen)) { readOut(chart); apply(chart); }
}

function zoom(first, last) {
  [state.x0, state.x1] = [first, Math.max(last, first + 1)];
  [byId("from").value, byId("to").value] = [state.x0, state.x1];
  byId("all").hidden = state.x0 === 0 && state.x1 === page.last;
  charts.forEach(apply);
}

// Below a chart: the logged values nearest to the pointer, or the last ones.
function readOut(chart) {
  const output = chart.figure.querySelector("output");
  const parts = [state.cursor == null ? "last" : `step ${state.cursor.toLocaleString("en")}`];
  chart.runs.forEach((rows, run) => {
    if (!rows.length || state.hidden.includes(run)) return;
    const row = state.cursor == null ? rows.at(-1)
      : rows.reduce((best, row) => Math.abs(row.s - state.cursor) < Math.abs(best.s - state.cursor) ? row : best);
    const mark = document.createElement("span");
    mark.append(Object.assign(document.createElement("i"), {className: colour(run)}), number(row.v));
    if (row.d != null) mark.append(` ± ${number(row.d)}`);
    else if (row.l !== row.h) mark.append(` (${number(row.l)} to ${number(row.h)})`);
    mark.title = page.names[run];
    parts.push(mark);
  });
  output.replaceChildren(...parts);
}

const watcher = new IntersectionObserver(entries => entries.forEach(entry => {
  const chart = charts.find(chart => chart.figure === entry.target);
  chart.isSeen = entry.isIntersecting;
  if (chart.isSeen) { draw(chart); apply(chart); }
}), {rootMargin: "200px"});
charts.forEach(chart => watcher.observe(chart.figure));
const idle = window.requestIdleCallback ?? (task => setTimeout(task, 50));
const drawRest = async () => {
  const chart = charts.find(chart => !chart.isBegun && chart.figure.offsetParent);
  if (chart) { await draw(chart); idle(drawRest); } else document.body.dataset.drawn = "";
};
addEventListener("load", () => idle(drawRest));
addEventListener("beforeprint", () => $("details").forEach(details => { details.open = true; }));

byId("smoothing")?.addEventListener("input", event => { state.smoothing = +event.target.value; charts.forEach(apply); });
for (const id of ["from", "to"]) byId(id)?.addEventListener("change", () => zoom(+byId("from").value, +byId("to").value));
byId("all")?.addEventListener("click", () => zoom(0, page.last));
$(".run").forEach(box => box.addEventListener("change", () => {
  state.hidden = $(".run").filter(box => !box.checked).map(box => +box.value);
  $("[data-run]").forEach(part => part.classList.toggle("gone", state.hidden.includes(+part.dataset.run)));
  charts.forEach(chart => { if (chart.isCurve) readOut(chart); apply(chart); });
}));

// Samples: one slider for all runs; a run shows its last grid up to that step.
const slider = byId("training");
if (slider) {
  const steps = [...new Set(page.strips.flatMap(grids => grids.map(grid => grid.step)))].sort((a, b) => a - b);
  const show = () => {
    const step = steps[+slider.value];
    byId("at").textContent = `step ${step.toLocaleString("en")}`;
    slider.setAttribute("aria-valuetext", byId("at").textContent);
    for (const figure of $(".samples")) {
      const grids = page.strips[figure.dataset.strip];
      const grid = "pinned" in figure.dataset ? grids[0] : grids.findLast(grid => grid.step <= step) ?? grids[0];
      const text = `step ${grid.step.toLocaleString("en")}${grid.step === 0 ? ", before training" : ""}`;
      figure.querySelector(".step").textContent = text;
      Object.assign(figure.querySelector("img"), {src: grid.src, alt: `samples of ${page.names[figure.dataset.run]}, ${text}`});
    }
  };
  slider.max = steps.length - 1;
  slider.value = steps.length - 1;
  slider.addEventListener("input", show);
  show();
  const dialog = document.querySelector("dialog");
  $(".samples button").forEach(button => button.addEventListener("click", () => {
    const image = button.querySelector("img");
    Object.assign(dialog.querySelector("img"), {src: image.src, alt: image.alt, className: image.className});
    dialog.showModal();
  }));
  dialog.addEventListener("click", () => dialog.close());
}

// Tables: a column's head sorts by it, numbers as numbers.
$(".sortable th button").forEach(button => button.addEventListener("click", () => {
  const head = button.parentElement, column = head.cellIndex, table = head.closest("table");
  const sign = head.ariaSort === "ascending" ? -1 : 1;
  $("th", head.parentElement).forEach(other => other.removeAttribute("aria-sort"));
  head.ariaSort = sign === 1 ? "ascending" : "descending";
  const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const order = (a, b) => sign * (value(a) - value(b) || value(a).localeCompare(value(b), "en", {numeric: true}));
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
}));

// A page that is served by `marval-rl report --watch` asks whether its runs have changed, and keeps the view then.
if (page.version) {
  const kept = JSON.parse(sessionStorage.getItem("view"));
  if (kept) {
    state.smoothing = byId("smoothing").value = kept.smoothing;
    for (const box of $(".run")) if (kept.hidden.includes(+box.value)) box.click();
    if (kept.zoom) zoom(...kept.zoom);
  }
  const ask = async () => {
    const answer = await fetch("/version").catch(() => null);
    if (!answer?.ok || await answer.text() === page.version) return setTimeout(ask, 3000);
    const isZoomed = state.x0 > 0 || state.x1 < page.last;
    const view = {smoothing: state.smoothing, hidden: state.hidden, zoom: isZoomed ? [state.x0, state.x1] : null};
    sessionStorage.setItem("view", JSON.stringify(view));
    location.reload();
  };
  setTimeout(ask, 3000);
}
