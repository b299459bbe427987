// An image with its rank and score, which can be searched with and pinned.

import { source } from "./api.js";
import { cosine, h } from "./dom.js";

/** An img that shows small pictures with sharp pixels. */
export function picture(query, alt) {
  const img = h("img", { src: source(query), alt, decoding: "async" });
  img.addEventListener("load", () => img.classList.toggle("pixels", img.naturalWidth <= 128));
  img.addEventListener("error", () => img.classList.add("missing"));
  return img;
}

const pinWord = (pinned) => (pinned ? "Pinned" : "Pin");

/** A thumbnail of an answer: {image, captions, score}. */
export function thumb(page, item, rank, { right = false, score = cosine } = {}) {
  const caption = item.captions[0] ?? "no caption";
  const said = `${rank}: ${caption}, score ${score(item.score)}${right ? ", has this caption" : ""}${item.trained ? ", trained on" : ""}`;
  const query = { image: item.image };
  const pinned = page.isPinned(query);
  return h("li", { class: right ? "thumb right" : "thumb", "data-image": item.image },
    h("button", {
      type: "button", class: "picture", title: [...item.captions, `score ${score(item.score)}`, ...(item.trained ? ["a run was trained on it"] : [])].join("\n"),
      "aria-label": `${said}. Search with this image`, onclick: () => page.searchImage(query, caption),
    }, picture(query, "")),
    h("button", {
      type: "button", class: "pin", "aria-pressed": String(pinned), "aria-label": `Pin: ${caption}`,
      title: "Pin for Similarities",
      onclick: ({ currentTarget: button }) => {
        const now = page.pin(query, caption);
        button.setAttribute("aria-pressed", String(now));
        button.textContent = pinWord(now);
      },
    }, pinWord(pinned)),
    right ? h("span", { class: "tick", "aria-hidden": "true" }, "✓") : null,
    h("span", { class: "score", "aria-hidden": "true" }, score(item.score)),
    item.trained ? h("span", { class: "trained", "aria-hidden": "true" }, "trained on") : null,
    h("span", { class: "words", "aria-hidden": "true" }, caption));
}
