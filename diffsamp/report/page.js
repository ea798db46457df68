"use strict";
const runs = JSON.parse(document.getElementById("data").textContent);
const COLOURS = ["#2563eb", "#e11d48", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f", "#475569",
  "#ea580c", "#4338ca", "#0f766e", "#a16207", "#9333ea", "#b91c1c", "#15803d"];
const SVG = "http://www.w3.org/2000/svg";

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}
function shape(tag, attributes = {}, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}
let clips = 0;
const plain = (v) => Math.abs(v) >= 100 ? v.toFixed(0) : String(Number(v.toPrecision(2)));

function ticks(low, high, log) {
  const found = [];
  if (log) {
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++)
      for (const m of [1, 2, 5]) { const v = m * 10 ** e; if (v >= low && v <= high) found.push(v); }
    if (found.length >= 2) return found;
    found.length = 0;
  }
  const raw = (high - low) / 5, power = 10 ** Math.floor(Math.log10(raw || 1));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw) || power;
  for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-9; v += step) found.push(v);
  return found;
}

// The ends of what is drawn: values far outside the bulk would press all others onto one line.
function bulk(values, f) {
  const sorted = values.map(f).sort((a, b) => a - b), at = (share) => sorted[Math.round(share * (sorted.length - 1))];
  const reach = 3 * Math.max(at(.75) - at(.25), 1e-9), inside = values.filter((v) => f(v) >= at(.25) - reach && f(v) <= at(.75) + reach);
  return inside.length > 4 ? inside : values;
}

function chart(run, metric, colour, off) {
  const W = 520, H = 300, L = 52, R = 12, T = 10, B = 36;
  const series = new Map();
  for (const cell of run.cells) {
    const found = cell.metrics[metric.key];
    if (!found || found.v[0] === null) continue;
    if (cell.broken) { off.push(cell); continue; }
    if (!series.has(cell.name)) series.set(cell.name, []);
    series.get(cell.name).push({x: cell.calls, v: found.v, cell});
  }
  const points = [...series.values()].flat();
  const svg = shape("svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${metric.label} against network calls`});
  if (!points.length) return svg;
  const xs = points.map((p) => p.x), all = points.flatMap((p) => p.v.filter((v) => v !== null));
  const log = metric.lower && Math.min(...all) > 0 && Math.max(...all) / Math.min(...all) > 4;
  const kept = bulk(points.map((p) => p.v[0]), log ? Math.log : (v) => v);
  const near = (p) => p.v[0] >= Math.min(...kept) && p.v[0] <= Math.max(...kept);
  const ends = points.filter(near).flatMap((p) => p.v.filter((v) => v !== null));
  let low = Math.min(...ends), high = Math.max(...ends);
  for (const p of points) if (!near(p)) off.push(p.cell);
  const floor = metric.key === "fd" ? run.reference.floor : null;
  if (floor && (!log || floor > 0)) low = Math.min(low, floor);
  const pad = log ? 0 : ((high - low) || Math.abs(high) || 1) * 0.06;
  low -= pad; high += pad;
  if (log) { low /= 1.15; high *= 1.15; }
  const x0 = Math.min(...xs) - 0.5, x1 = Math.max(...xs) + 0.5;
  const X = (v) => L + (v - x0) / (x1 - x0) * (W - L - R);
  const f = log ? Math.log : (v) => v;
  const Y = (v) => H - B - (f(v) - f(low)) / (f(high) - f(low)) * (H - T - B);
  for (const v of ticks(low, high, log)) {
    svg.append(shape("line", {class: "grid", x1: L, x2: W - R, y1: Y(v), y2: Y(v)}));
    svg.append(shape("text", {x: L - 8, y: Y(v) + 4, "text-anchor": "end"}, plain(v)));
  }
  for (const v of [...new Set(xs)].sort((a, b) => a - b))
    svg.append(shape("text", {x: X(v), y: H - B + 18, "text-anchor": "middle"}, v));
  svg.append(shape("text", {x: (L + W - R) / 2, y: H - 3, "text-anchor": "middle"}, "network calls"));
  if (floor && floor >= low) {
    svg.append(shape("line", {class: "floor", x1: L, x2: W - R, y1: Y(floor), y2: Y(floor)}));
    svg.append(shape("text", {x: W - R, y: Y(floor) - 4, "text-anchor": "end"}, "floor: real against real"));
  }
  const clip = `clip-${metric.key}-${clips++}`, frame = shape("clipPath", {id: clip});
  frame.append(shape("rect", {x: L, y: T, width: W - L - R, height: H - T - B}));
  svg.append(frame);
  for (const [name, line] of series) {
    line.sort((a, b) => a.x - b.x);
    const stroke = colour.get(name), group = shape("g", {class: "series", "clip-path": `url(#${clip})`});
    group.dataset.name = name;
    svg.append(group);
    const path = line.map((p, i) => `${i ? "L" : "M"}${X(p.x).toFixed(1)},${Y(p.v[0]).toFixed(1)}`).join("");
    group.append(shape("path", {d: path, fill: "none", stroke, "stroke-width": 2, "stroke-dasharray": line[0].cell.stock ? "5 4" : "none"}));
    for (const p of line) {
      const [v, a, b] = p.v;
      if (a !== null && b !== null && (!log || a > 0))
        group.append(shape("line", {class: "interval", x1: X(p.x), x2: X(p.x), y1: Y(a), y2: Y(b), stroke, "stroke-width": 1.4, opacity: .6}));
      const dot = shape("circle", {cx: X(p.x), cy: Y(v), r: 3.5, fill: stroke});
      dot.append(shape("title", {}, `${name}, ${p.x} calls: ${p.cell.metrics[metric.key].text}`));
      group.append(dot);
    }
  }
  return svg;
}

function table(run) {
  const columns = [
    {label: "solver", get: (c) => c.name, text: (c) => c.name},
    {label: "calls", get: (c) => c.calls, text: (c) => String(c.calls)},
    ...run.metrics.map((m) => ({label: m.label + (m.lower ? " ↓" : " ↑"), metric: m,
      get: (c) => c.metrics[m.key] ? c.metrics[m.key].v[0] : null, text: (c) => c.metrics[m.key] ? c.metrics[m.key].text : ""})),
    {label: "s / picture", get: (c) => c.seconds, text: (c) => c.seconds.toFixed(3)},
  ];
  const bests = new Map();
  for (const cell of run.cells) for (const m of run.metrics) {
    if (cell.broken) continue;
    const found = cell.metrics[m.key]; if (!found || found.v[0] === null) continue;
    const key = m.key + cell.nfe, have = bests.get(key);
    if (have === undefined || (m.lower ? found.v[0] < have : found.v[0] > have)) bests.set(key, found.v[0]);
  }
  const body = el("tbody"), head = el("tr");
  const rows = run.cells.map((cell) => {
    const row = el("tr");
    for (const column of columns) {
      const td = el("td", {}, column.label === "solver" ? el("code", {}, column.text(cell)) : column.text(cell));
      const value = column.get(cell);
      if (column.metric && value !== null && !cell.broken && bests.get(column.metric.key + cell.nfe) === value) td.className = "best";
      row.append(td);
    }
    return {cell, row};
  });
  columns.forEach((column) => {
    const button = el("button", {type: "button"}, column.label), th = el("th", {scope: "col"}, button);
    button.addEventListener("click", () => {
      const up = th.getAttribute("aria-sort") !== "ascending";
      for (const other of head.children) other.removeAttribute("aria-sort");
      th.setAttribute("aria-sort", up ? "ascending" : "descending");
      rows.sort((a, b) => {
        const p = column.get(a.cell), q = column.get(b.cell);
        if (p === null || q === null) return (p === null) - (q === null);
        return (p < q ? -1 : p > q ? 1 : 0) * (up ? 1 : -1);
      });
      body.append(...rows.map((r) => r.row));
    });
    head.append(th);
  });
  body.append(...rows.map((r) => r.row));
  return el("table", {}, el("thead", {}, head), body);
}

function strips(run) {
  const box = el("div", {class: "strips"});
  for (const calls of [...new Set(run.cells.map((c) => c.nfe))].sort((a, b) => a - b)) {
    box.append(el("h3", {}, `at most ${calls} network calls`));
    for (const cell of run.cells.filter((c) => c.nfe === calls && c.strip))
      box.append(el("code", {}, cell.name), el("img", {src: cell.strip, alt: `${cell.name}: seeds ${run.seeds.join(" to ")}`}));
  }
  return box;
}

const facts = (found) => el("dl", {}, ...Object.entries(found).flatMap(([k, v]) => [el("dt", {}, k), el("dd", {}, String(v))]));
const card = (title, ...content) => el("section", {class: "card"}, el("h2", {}, title), ...content);

const main = document.getElementById("report");
main.replaceChildren();
for (const run of runs) {
  const names = [...new Set(run.cells.map((c) => c.name))];
  const colour = new Map(names.map((name, i) => [name, COLOURS[i % COLOURS.length]]));
  main.append(el("h1", {}, `Quality against network calls: ${run.model}`));
  main.append(el("p", {class: "sub"}, `${run.cells.length} cells, ${run.cells[0].n} pictures each, bars are 95 % intervals${names.length > 6 ? "; choose solvers below to see them alone" : ""}`));
  for (const text of run.warnings) main.append(el("section", {class: "card warning"}, text));
  const broken = run.cells.filter((c) => c.broken).map((c) => `${c.name} at ${c.calls} calls (${c.broken} of ${c.n})`);
  if (broken.length) main.append(el("section", {class: "card warning"}, `Pictures that are not finite: ${broken.join(", ")}`));
  const legend = el("div", {class: "legend"}), charts = el("div", {class: "charts"});
  for (const name of names) {
    const stock = run.cells.find((c) => c.name === name).stock;
    const item = el("button", {type: "button", "aria-pressed": "false"},
      el("i", {class: stock ? "stock" : "", style: `border-color:${colour.get(name)}`}), name);
    item.addEventListener("click", () => {
      item.setAttribute("aria-pressed", String(item.getAttribute("aria-pressed") !== "true"));
      const picked = new Set([...legend.children].filter((i) => i.getAttribute("aria-pressed") === "true").map((i) => i.textContent));
      for (const group of charts.querySelectorAll(".series")) group.classList.toggle("dim", picked.size > 0 && !picked.has(group.dataset.name));
      for (const other of legend.children) other.classList.toggle("dim", picked.size > 0 && !picked.has(other.textContent));
    });
    legend.append(item);
  }
  main.append(legend);
  for (const metric of run.metrics) {
    const off = [], drawn = chart(run, metric, colour, off), at = new Map();
    for (const cell of off) at.set(cell.name, [...(at.get(cell.name) || []), cell.calls]);
    const list = [...at].map(([name, calls]) => `${name} at ${calls.sort((a, b) => a - b).join(", ")}`).join("; ");
    const told = off.length ? [el("p", {class: "off"}, `Off this chart: ${list}.`)] : [];
    charts.append(card(`${metric.label} (${metric.lower ? "lower" : "higher"} is better)`, drawn, ...told));
  }
  main.append(charts);
  main.append(card("Table", table(run)));
  main.append(card(`Pictures: seeds ${run.seeds.join(" to ")}, the same in every row`, strips(run)));
  main.append(el("div", {class: "two"}, card("Recipe", facts(run.recipe)), card("Environment", facts(run.environment))));
}
document.documentElement.dataset.ready = "yes";
