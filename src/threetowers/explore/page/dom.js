// Elements without markup: every text is set as text, so that a caption can hold anything.

const SVG = new Set(["svg", "path", "line", "circle", "text", "g", "title"]);

/** An element with attributes, listeners (`onclick: f`) and children; strings become text, null is left out. */
export function h(tag, attributes = {}, ...children) {
  const element = SVG.has(tag)
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

export const byId = (id) => document.getElementById(id);

/** A line that screen readers say; also where errors are shown. */
export function say(text, wrong = false) {
  const status = byId("status");
  status.textContent = text;
  status.classList.toggle("wrong", wrong);
}

/** A number as people write it. */
export const number = (value) => value.toLocaleString("en");

/** A cosine, or a weighted sum of two. */
export const cosine = (value) => value.toFixed(2).replace("-", "−");
