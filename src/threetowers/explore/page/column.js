// The heading of a column: a run's colour and name, and what α does to it.

import { h } from "./dom.js";

/** The class of a run's colour, which is that of its method in reports. */
export const shade = (colour) => `s${colour % 8}`;

export const swatch = (colour) => h("span", { class: `swatch ${shade(colour)}`, "aria-hidden": "true" });

/** A section for a column's answers, which are the further arguments. Headings next to each other are equally high. */
export function section(page, column, ...content) {
  const weighs = page.columns.some((each) => each.third !== null);
  return h("section", { class: "column", "aria-label": column.label },
    h("div", { class: "head" },
      h("h3", {}, swatch(column.colour), column.label),
      weighs ? h("small", { class: column.third === null ? null : "weight" }, column.third === null ? "the same at every α" : weight(page.alpha())) : null),
    h("div", {}, content));
}

/** Says which α the answers of a column are for. */
export function setWeight(element, alpha) {
  const small = element.querySelector(".weight");
  if (small) small.textContent = weight(alpha);
}

const weight = (alpha) => `α ${alpha.toFixed(2)}`;
