// Similarities of chosen images and texts: one table for each column.

import { ask, latest, upload } from "./api.js";
import { shade, swatch } from "./column.js";
import { byId, cosine, h, say } from "./dom.js";
import { picture } from "./thumb.js";

export function startMatrix(page) {
  const texts = byId("matrix-texts");
  let asked = false;
  texts.value = (page.gallery?.examples ?? []).map((example) => example.text).join("\n");

  const typed = () => [...new Set(texts.value.split("\n").map((line) => line.trim()).filter(Boolean))].slice(0, 24);

  const run = latest(async () => {
    const lines = typed();
    if (!page.pins.length || !lines.length) return say("Pin an image and type a text");
    const pins = [...page.pins];
    const { columns } = await ask("matrix", { images: pins.map((pin) => pin.query), texts: lines, alpha: page.alpha() });
    asked = true;
    byId("matrices").replaceChildren(...columns.map((rows, i) => table(page.columns[i], pins, lines, rows)));
    say(`${pins.length} × ${lines.length} similarities`);
  });

  function table({ label, colour }, pins, lines, rows) {
    const values = rows.flat();
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const body = rows.map((row, i) => h("tr", {},
      h("th", { scope: "row" }, picture(pins[i].query, pins[i].caption || "your image")),
      ...row.map((value) => {
        const best = value === Math.max(...row);
        const cell = h("td", { class: best ? "cell best" : "cell" }, cosine(value), best ? h("span", { class: "unseen" }, ", highest of this image") : null);
        cell.style.setProperty("--heat", `${Math.round(45 * (value - low) / Math.max(high - low, 1e-9))}%`);
        return cell;
      })));
    return h("div", { class: `scroll heat ${shade(colour)}`, tabindex: "0", role: "region", "aria-label": `Similarities, ${label}` },
      h("table", {}, h("caption", {}, swatch(colour), label),
        h("thead", {}, h("tr", {}, h("td", {}), ...lines.map((line) => h("th", { scope: "col" }, line)))),
        h("tbody", {}, body)));
  }

  function pins() {
    byId("pins").replaceChildren(...page.pins.map((pin) => h("li", {},
      h("button", { type: "button", title: `Take out: ${pin.caption || "your image"}`, "aria-label": `Take out: ${pin.caption || "your image"}`,
        onclick: () => { page.pin(pin.query, pin.caption); byId("pins").querySelector("button")?.focus(); } }, picture(pin.query, "")))));
    if (!page.pins.length) byId("pins").replaceChildren(h("li", { class: "muted" }, "none yet"));
  }

  byId("matrix-form").addEventListener("submit", (event) => { event.preventDefault(); run(); });

  return {
    pinned() { pins(); if (asked && !byId("matrix").hidden) run(); },
    alpha: () => { if (asked) run(); },
    show() {
      if (!asked && !page.pins.length) for (const { image, text } of page.gallery?.examples ?? []) page.pin({ image }, text);
      pins();
      run();
    },
    async take(file) {
      say("Reading your image …");
      page.pin(await upload(file), file.name);
      await run();
    },
  };
}
