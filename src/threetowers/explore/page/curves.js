// Learning curves of every run, drawn again every few seconds while one of them goes on.

import { ask, latest } from "./api.js";
import { shade, swatch } from "./column.js";
import { byId, h, number, say } from "./dom.js";

const FIRST = ["train/loss", "val/mean_r@1", "train/accuracy/img-txt", "train/loss/img-txt"];
const EVERY = 3000; // ms
const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [420, 230, 46, 12, 10, 26];

export function startCurves() {
  let timer = null;

  const load = latest(async () => {
    const runs = await ask("curves");
    draw(runs);
    clearTimeout(timer);
    const going = runs.filter((run) => !run.finished);
    say(going.length ? `${going.length} of ${runs.length} runs go on; the curves follow` : `${runs.length} finished runs`);
    if (going.length) timer = setTimeout(() => { if (!byId("curves").hidden && !document.hidden) load(); }, EVERY);
  });

  function draw(runs) {
    byId("legend").replaceChildren(...runs.map((run) => {
      const steps = Math.max(0, ...Object.values(run.metrics).map((points) => points.at(-1)?.[0] ?? 0));
      return h("li", {}, swatch(run.colour), run.label,
        h("small", {}, ` ${run.name}, `, run.finished ? `finished, ${number(steps)} steps` : `step ${number(steps)} of ${number(run.steps)}`));
    }));
    const names = [...new Set(runs.flatMap((run) => Object.keys(run.metrics)))].sort();
    const first = FIRST.filter((name) => names.includes(name));
    const rest = names.filter((name) => !first.includes(name) && name !== "seconds");
    byId("plots").replaceChildren(...first.map((name) => plot(name, runs)));
    byId("further").hidden = !rest.length;
    byId("further-plots").replaceChildren(...rest.map((name) => plot(name, runs)));
    if (!names.length) byId("plots").replaceChildren(h("p", { class: "muted" }, "No metrics are written yet."));
  }

  function plot(name, runs) {
    const lines = runs.map((run) => run.metrics[name] ?? []);
    const values = lines.flat().map((point) => point[1]);
    const [low, high] = spread(Math.min(...values), Math.max(...values));
    const last = Math.max(1, ...runs.filter((run) => run.metrics[name]).map((run) => run.steps), ...lines.flat().map((point) => point[0]));
    const x = (step) => LEFT + (WIDTH - LEFT - RIGHT) * (step / last);
    const y = (value) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / (high - low));
    const ticks = ticksOf(low, high);
    const ends = runs.map((run, i) => (lines[i].length ? `${run.label} (${run.name}) ${short(lines[i].at(-1)[1])}` : null)).filter(Boolean);
    return h("figure", {},
      h("figcaption", {}, name),
      h("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${name}: ${ends.join(", ")}` },
        ticks.map((value) => [
          h("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }),
          h("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, short(value)),
        ]),
        h("text", { x: LEFT, y: HEIGHT - 6 }, "0"),
        h("text", { x: WIDTH - RIGHT, y: HEIGHT - 6, "text-anchor": "end" }, `step ${number(last)}`),
        lines.map((points, i) => points.length === 1
          ? h("circle", { class: `curve ${shade(runs[i].colour)}`, cx: x(points[0][0]), cy: y(points[0][1]), r: 3 })
          : h("path", { class: `curve ${shade(runs[i].colour)}${runs[i].colour >= 8 ? " dashed" : ""}`, d: points.map((point, j) => `${j ? "L" : "M"}${x(point[0]).toFixed(1)} ${y(point[1]).toFixed(1)}`).join("") }))));
  }

  const spread = (low, high) => (low === high ? [low - Math.abs(low || 1) / 2, high + Math.abs(high || 1) / 2] : [low, high]);

  function ticksOf(low, high) {
    const rough = (high - low) / 4;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * ([1, 2, 5, 10].find((factor) => factor * power >= rough) ?? 10);
    const found = [];
    for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step) found.push(value);
    return found;
  }

  const short = (value) => (value === 0 ? "0" : Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(3))));

  document.addEventListener("visibilitychange", () => { if (!document.hidden && !byId("curves").hidden) load(); });
  return { alpha: () => {}, show: load };
}
