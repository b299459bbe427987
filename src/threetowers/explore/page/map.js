// A map of the embeddings on a canvas: zoom, hover, and the keyboard.

import { ask, latest } from "./api.js";
import { byId, h, number, say } from "./dom.js";
import { picture } from "./thumb.js";

const REACH = 14; // px from a dot within which it is pointed at
const MARGIN = 24;

export function startMap(page) {
  const canvas = byId("canvas");
  const context = canvas.getContext("2d");
  const system = byId("map-system");
  let points = [];
  let view = { x: 0, y: 0, scale: 1, whole: 1 }; // the middle in the map's units, px per unit, and of them what shows all
  let chosen = -1;
  const known = new Map(); // what a dot is, once it was asked
  const fingers = new Map();
  let moved = 0;

  byId("map-column").replaceChildren(...page.columns.map((column, i) => h("option", { value: i }, column.label)));
  byId("map-legend").replaceChildren(h("span", { class: "dot" }), "image ", h("span", { class: "cross" }, "×"), "caption");

  const load = latest(async () => {
    const column = Number(byId("map-column").value);
    const third = page.columns[column]?.third ?? null;
    system.disabled = third === null;
    if (third === null) system.value = "main";
    say("Drawing the map …");
    const found = await ask("map", { column, system: system.value, kind: byId("map-kind").value });
    points = found.points;
    known.clear();
    choose(-1);
    all();
    const share = found.variance.map((value) => `${Math.round(100 * value)} %`).join(" and ");
    say(`${number(points.length)} points; the two directions hold ${share} of the variance`);
  });

  const size = () => [canvas.clientWidth, canvas.clientHeight];
  const place = ([x, y]) => {
    const [width, height] = size();
    return [width / 2 + (x - view.x) * view.scale, height / 2 - (y - view.y) * view.scale];
  };

  /** The middle of all points, and the px per unit at which they fit the canvas. */
  function extent() {
    const [width, height] = size();
    const xs = points.map((point) => point[0]);
    const ys = points.map((point) => point[1]);
    const [left, right, low, high] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
    const whole = Math.min((width - 2 * MARGIN) / (right - left || 1), (height - 2 * MARGIN) / (high - low || 1));
    return { x: (left + right) / 2, y: (low + high) / 2, whole };
  }

  function all() {
    if (!points.length || !size()[0]) return;
    const found = extent();
    view = { ...found, scale: found.whole };
    draw();
  }

  /** Keeps in view what is in view when the canvas gets another size. */
  function resized() {
    if (!points.length || !size()[0]) return;
    const { whole } = extent();
    view.scale *= whole / view.whole;
    view.whole = whole;
    draw();
  }

  function draw() {
    const [width, height] = size();
    const ratio = devicePixelRatio || 1;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    const colour = getComputedStyle(canvas);
    const [images, captions, ink, paper] = ["--s3", "--s1", "--ink", "--paper"].map((name) => colour.getPropertyValue(name));
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    context.lineWidth = 1.2;
    const radius = points.length > 2000 ? 2.2 : 3.2;
    for (const side of [1, 0]) {
      context.fillStyle = images;
      context.strokeStyle = captions;
      context.globalAlpha = 0.75;
      context.beginPath();
      for (const point of points) {
        if (point[3] !== side) continue;
        const [x, y] = place(point);
        if (x < -9 || y < -9 || x > width + 9 || y > height + 9) continue;
        if (side === 0) { context.moveTo(x + radius, y); context.arc(x, y, radius, 0, 7); }
        else { context.moveTo(x - radius, y - radius); context.lineTo(x + radius, y + radius); context.moveTo(x - radius, y + radius); context.lineTo(x + radius, y - radius); }
      }
      if (side === 0) context.fill(); else context.stroke();
    }
    context.globalAlpha = 1;
    if (chosen >= 0) {
      const [x, y] = place(points[chosen]);
      context.lineWidth = 5;
      context.strokeStyle = paper;
      context.beginPath(); context.arc(x, y, 8, 0, 7); context.stroke();
      context.lineWidth = 2;
      context.strokeStyle = ink;
      context.stroke();
    }
    showSpot();
  }

  const tell = latest(async (which) => {
    const [, , row, side] = points[which] ?? [];
    if (row === undefined) return;
    const found = await ask("item", side ? { caption: row } : { image: row });
    known.set(which, { ...found, side });
    if (which === chosen) {
      byId("spot-text").textContent = `${side ? "caption" : "image"}: ${found.captions[0] ?? "no caption"}${found.trained ? ", trained on" : ""}`;
      fillSpot();
      showSpot();
    }
  });

  function choose(which) {
    if (which === chosen) return;
    chosen = which;
    fillSpot();
    if (which >= 0) tell(which);
  }

  function fillSpot() {
    const found = known.get(chosen);
    byId("spot").replaceChildren(...(found ? [picture({ image: found.image }, ""), h("p", {}, found.captions[0] ?? "no caption"), found.trained ? h("small", {}, "trained on") : null].filter(Boolean) : []));
  }

  function showSpot() {
    const spot = byId("spot");
    spot.hidden = chosen < 0 || !known.has(chosen);
    if (spot.hidden) return;
    const [width, height] = size();
    const [x, y] = place(points[chosen]);
    spot.style.left = `${Math.max(4, Math.min(x + 16, width - spot.offsetWidth - 4))}px`;
    spot.style.top = `${y + 16 + spot.offsetHeight < height ? y + 16 : Math.max(4, y - 16 - spot.offsetHeight)}px`;
  }

  function nearest(x, y, reach = REACH, fits = () => true) {
    let [best, least] = [-1, reach * reach];
    points.forEach((point, i) => {
      const [a, b] = place(point);
      const distance = (a - x) ** 2 + (b - y) ** 2;
      if (distance < least && fits(a - x, b - y, i)) [best, least] = [i, distance];
    });
    return best;
  }

  function zoom(factor, x = size()[0] / 2, y = size()[1] / 2) {
    const scale = Math.max(view.whole / 4, Math.min(view.whole * 400, view.scale * factor));
    const [width, height] = size();
    // what is under (x, y) stays there
    view.x += (x - width / 2) * (1 / view.scale - 1 / scale);
    view.y -= (y - height / 2) * (1 / view.scale - 1 / scale);
    view.scale = scale;
    draw();
  }

  function open() {
    const found = known.get(chosen);
    if (!found) return;
    if (found.side) page.searchText(found.captions[0]);
    else page.searchImage({ image: found.image }, found.captions[0] ?? "");
  }

  /** The next dot in a direction, at most 45° off it. */
  function step(dx, dy) {
    const [width, height] = size();
    const [x, y] = chosen < 0 ? [width / 2, height / 2] : place(points[chosen]);
    const fits = chosen < 0 ? undefined : (a, b, i) => i !== chosen && (dx ? Math.sign(a) === dx && Math.abs(a) >= Math.abs(b) : Math.sign(b) === dy && Math.abs(b) >= Math.abs(a));
    const next = nearest(x, y, Infinity, fits);
    if (next < 0) return;
    choose(next);
    const [a, b] = place(points[next]);
    if (a < 0 || b < 0 || a > width || b > height) [view.x, view.y] = points[next];
    draw();
  }

  const KEYS = {
    ArrowLeft: () => step(-1, 0), ArrowRight: () => step(1, 0), ArrowUp: () => step(0, -1), ArrowDown: () => step(0, 1),
    "+": () => zoomChosen(1.5), "=": () => zoomChosen(1.5), "-": () => zoomChosen(1 / 1.5), 0: all, Enter: open,
    Escape: () => { choose(-1); draw(); },
  };
  const zoomChosen = (factor) => (chosen < 0 ? zoom(factor) : zoom(factor, ...place(points[chosen])));

  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !KEYS[event.key] || !points.length) return;
    event.preventDefault();
    KEYS[event.key]();
  });
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), event.offsetX, event.offsetY);
  }, { passive: false });
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, [event.offsetX, event.offsetY]);
    moved = 0;
  });
  canvas.addEventListener("pointermove", (event) => {
    const now = [event.offsetX, event.offsetY];
    const was = fingers.get(event.pointerId);
    if (!was) {
      choose(nearest(...now));
      draw();
      return;
    }
    const other = [...fingers].find(([id]) => id !== event.pointerId)?.[1];
    if (other) {
      const length = ([x, y]) => Math.hypot(x - other[0], y - other[1]);
      zoom(length(now) / Math.max(length(was), 1), ...other);
    } else {
      view.x -= (now[0] - was[0]) / view.scale;
      view.y += (now[1] - was[1]) / view.scale;
      draw();
    }
    moved += Math.hypot(now[0] - was[0], now[1] - was[1]);
    fingers.set(event.pointerId, now);
  });
  canvas.addEventListener("pointerup", (event) => {
    const single = fingers.size === 1;
    fingers.delete(event.pointerId);
    if (!single || moved > 5) return;
    const touched = nearest(event.offsetX, event.offsetY, event.pointerType === "mouse" ? REACH : 2 * REACH);
    if (touched >= 0 && touched === chosen && known.has(touched)) open();
    else { choose(touched); draw(); }
  });
  canvas.addEventListener("pointercancel", (event) => fingers.delete(event.pointerId));
  canvas.addEventListener("pointerleave", (event) => {
    if (event.pointerType === "mouse" && document.activeElement !== canvas) { choose(-1); draw(); }
  });
  byId("zoom-in").addEventListener("click", () => zoomChosen(1.5));
  byId("zoom-out").addEventListener("click", () => zoomChosen(1 / 1.5));
  byId("zoom-all").addEventListener("click", all);
  for (const id of ["map-column", "map-system", "map-kind"]) byId(id).addEventListener("change", load);
  new ResizeObserver(resized).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

  return {
    alpha: () => {},
    show: () => { if (points.length) draw(); else load(); },
    take: (file) => page.takeToSearch(file),
  };
}
