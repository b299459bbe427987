// Search by text and by image: the best images, captions or both of every column, side by side.

import { ask, latest, upload } from "./api.js";
import { section, setWeight } from "./column.js";
import { byId, cosine, h, number, say } from "./dom.js";
import { picture, thumb } from "./thumb.js";

const ANSWERS = 12;

const KINDS = ["images", "captions"];

export function startSearch(page) {
  const text = byId("text");
  const wants = { text: "images", image: page.gallery?.captions ? "both" : "images" }; // what each kind of query finds, until the person chooses another
  let query = null;
  let caption = ""; // of an image that is searched with
  let columns = [];

  const kindOf = (asked) => (asked === null || asked.text !== undefined ? "text" : "image");

  const run = latest(async () => {
    if (query === null) return;
    const asked = query;
    const alpha = page.alpha();
    const want = wants[kindOf(asked)];
    const kinds = KINDS.filter((kind) => want === kind || want === "both");
    const start = performance.now();
    const found = await Promise.all(kinds.map((kind) => ask("search", { ...asked, want: kind, alpha, k: ANSWERS })));
    show(Object.fromEntries(kinds.map((kind, i) => [kind, found[i].columns])), asked, alpha);
    const counts = kinds.map((kind, i) => `${number(Math.max(...found[i].columns.map((items) => items.length)))} nearest ${kind}`);
    say(`${counts.join(" and ")} in ${Math.round(performance.now() - start)} ms`);
  });

  /** answers: what each column found, by kind; a kind that was not asked for is missing. */
  function show(answers, asked, alpha) {
    if (columns.length !== page.columns.length) {
      columns = page.columns.map((column) => section(page, column,
        KINDS.map((kind) => h("div", { class: `found ${kind}` }, h("h4", {}, `nearest ${kind}`), h("ol", {})))));
      byId("results").replaceChildren(...columns);
    }
    columns.forEach((column, i) => {
      setWeight(column, alpha);
      for (const kind of KINDS) {
        const part = column.querySelector(`.${kind}`);
        const items = answers[kind]?.[i];
        part.hidden = items === undefined;
        part.firstChild.hidden = Object.keys(answers).length < 2;
        if (kind === "images") showImages(part.lastChild, items ?? [], asked);
        else showCaptions(part.lastChild, items ?? []);
      }
    });
  }

  function showImages(list, items, asked) {
    const before = new Map([...list.children].map((each) => [each.dataset.image, each]));
    const places = new Map([...before].map(([id, each]) => [id, each.getBoundingClientRect()]));
    const focused = list.contains(document.activeElement) ? document.activeElement : null;
    list.className = "thumbs";
    list.replaceChildren(...items.map((item, rank) => {
      const right = asked.text !== undefined && item.captions.includes(asked.text);
      const made = thumb(page, item, rank + 1, { right });
      // the picture that is there already stays, so that nothing flickers
      const old = before.get(String(item.image))?.querySelector("img");
      if (old) made.querySelector("img").replaceWith(old);
      return made;
    }));
    if (focused) list.querySelector("button")?.focus({ preventScroll: true });
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) return;
    for (const each of list.children) {
      const was = places.get(each.dataset.image);
      if (!was) continue;
      const now = each.getBoundingClientRect();
      const [x, y] = [was.left - now.left, was.top - now.top];
      if (x || y) each.animate([{ transform: `translate(${x}px, ${y}px)` }, { transform: "none" }], { duration: 160, easing: "ease-out" });
    }
  }

  function showCaptions(list, items) {
    list.className = "texts";
    list.replaceChildren(...items.map((item) => h("li", {},
      h("button", { type: "button", class: "link", title: "Search with this caption", onclick: () => searchText(item.captions[0]) }, item.captions[0]),
      h("small", {}, ` ${cosine(item.score)}`, item.trained ? ", trained on" : null))));
  }

  function searchText(words) {
    text.value = words;
    setQuery({ text: words });
    run();
  }

  function setQuery(next, words = "") {
    query = next;
    caption = words;
    const kind = kindOf(query);
    byId("want-label").textContent = kind === "text" ? "A text finds" : "An image finds";
    document.querySelector(`input[name=want][value=${wants[kind]}]`).checked = true;
    const box = byId("chosen");
    box.hidden = query === null || query.text !== undefined;
    if (box.hidden) return;
    text.value = "";
    box.replaceChildren(picture(query, ""),
      h("p", {}, "Searching with ", caption ? h("q", {}, caption) : "your image"),
      h("button", { type: "button", onclick: () => { setQuery(null); byId("results").replaceChildren(); columns = []; say(""); text.focus(); } }, "Clear"));
  }

  byId("search-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const words = text.value.trim();
    if (words) { setQuery({ text: words }); run(); }
    else if (query === null) say("Type what to look for, or choose an image");
  });
  for (const radio of document.querySelectorAll("input[name=want]")) {
    radio.addEventListener("change", () => { wants[kindOf(query)] = radio.value; run(); });
  }
  if (page.gallery?.examples.length) {
    byId("examples").replaceChildren(h("span", { class: "muted" }, "for example "),
      ...page.gallery.examples.map((example) => h("button", { type: "button", class: "chip", onclick: () => searchText(example.text) }, example.text)));
  }

  return {
    alpha: run,
    show: () => {},
    begin() {
      const first = page.gallery?.examples[0];
      if (first) searchText(first.text);
    },
    searchText,
    searchImage(given, words) {
      setQuery(given, words);
      run();
    },
    async take(file) {
      say("Reading your image …");
      setQuery(await upload(file));
      await run();
    },
  };
}
