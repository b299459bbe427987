// The page: tabs, α, pins, and images that are dropped, pasted or chosen.

import { ask, useGallery } from "./api.js";
import { startClasses } from "./classes.js";
import { startCurves } from "./curves.js";
import { byId, number, say } from "./dom.js";
import { startMap } from "./map.js";
import { startMatrix } from "./matrix.js";
import { startSearch } from "./search.js";

const tabs = [...document.querySelectorAll("[role=tab]")];
const slider = byId("alpha");
const views = {};
let current = "";

const page = {
  columns: [],
  gallery: null,
  pins: [],
  alpha: () => Number(slider.value),
  isPinned: (query) => page.pins.some((pin) => same(pin.query, query)),
  /** Pins an image, or takes it out; says whether it is pinned now. */
  pin(query, caption) {
    const was = page.isPinned(query);
    page.pins = was ? page.pins.filter((pin) => !same(pin.query, query)) : [...page.pins, { query, caption }].slice(-24);
    views.matrix?.pinned();
    return !was;
  },
  searchImage(query, caption) {
    select("search");
    views.search.searchImage(query, caption);
    scrollTo({ top: 0 });
  },
  searchText(text) {
    select("search");
    views.search.searchText(text);
    scrollTo({ top: 0 });
  },
  takeToSearch(file) {
    select("search");
    return views.search.take(file);
  },
};

const same = (a, b) => a.image === b.image && a.upload === b.upload;

function select(name, focus = false) {
  if (name === current || !views[name]) return;
  current = name;
  for (const tab of tabs) {
    const on = tab.getAttribute("aria-controls") === name;
    tab.setAttribute("aria-selected", String(on));
    tab.tabIndex = on ? 0 : -1;
    byId(tab.getAttribute("aria-controls")).hidden = !on;
    if (on && focus) tab.focus();
  }
  byId("alpha-box").hidden = !page.columns.some((column) => column.third !== null) || name === "map" || name === "curves";
  history.replaceState(null, "", `#${name}`);
  say("");
  views[name].show();
}

async function take(file) {
  try {
    await (views[current]?.take ?? page.takeToSearch)(file);
  } catch (error) {
    say(error.message, true);
  }
}

function listen() {
  for (const [i, tab] of tabs.entries()) {
    tab.addEventListener("click", () => select(tab.getAttribute("aria-controls")));
    tab.addEventListener("keydown", (event) => {
      const usable = tabs.filter((each) => !each.disabled);
      const at = usable.indexOf(tab);
      const next = { ArrowRight: usable[(at + 1) % usable.length], ArrowLeft: usable.at(at - 1), Home: usable[0], End: usable.at(-1) }[event.key];
      if (!next) return;
      event.preventDefault();
      select(next.getAttribute("aria-controls"), true);
    });
    tab.disabled = !views[tab.getAttribute("aria-controls")];
  }
  slider.addEventListener("input", () => {
    byId("alpha-value").textContent = page.alpha().toFixed(2);
    views[current].alpha();
  });
  for (const button of document.querySelectorAll(".pick")) button.addEventListener("click", () => byId("file").click());
  byId("file").addEventListener("change", (event) => {
    const [file] = event.target.files;
    event.target.value = "";
    if (file) take(file);
  });
  let depth = 0;
  const show = (by) => { depth = Math.max(0, depth + by); byId("drop").hidden = depth === 0; };
  addEventListener("dragenter", (event) => { if (event.dataTransfer?.types.includes("Files")) show(1); });
  addEventListener("dragleave", () => show(-1));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault(); // else the browser would leave the page for the file
    depth = 0;
    show(0);
    const file = event.dataTransfer?.files[0];
    if (file && page.columns.length) take(file);
  });
  addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files ?? [])].find((each) => each.type.startsWith("image/"));
    if (file && page.columns.length) take(file);
  });
}

/** Which images these are, and what a good answer to them is worth. */
function described({ name, images, captions, test, trained }) {
  const own = `${number(images)} ${test ? "test " : ""}images and ${number(captions)} captions of ${name}`;
  const other = test ? "; --data shows others" : "";
  if (trained) return `${own}${other}. Runs were trained on ${number(trained)} of these images, marked “trained on”, which look better than new ones will.`;
  if (trained === 0) return `${own}${other}. No run was trained on these images.`;
  if (test) return `${own}${other}. The first run was not trained on these images.`;
  return `${own}. It is not known whether runs were trained on some of them, which would then look better than new images will.`;
}

async function start() {
  const about = await ask("about");
  page.columns = about.columns;
  page.gallery = about.gallery;
  useGallery(about.gallery);
  views.curves = startCurves();
  if (page.columns.length) {
    byId("about").textContent = described(page.gallery);
    views.search = startSearch(page);
    views.classes = startClasses(page);
    views.matrix = startMatrix(page);
    views.map = startMap(page);
  } else {
    byId("about").textContent = "No run is finished yet: these are the curves so far.";
  }
  listen();
  const wanted = location.hash.slice(1);
  select(views[wanted] ? wanted : page.columns.length ? "search" : "curves");
  if (current === "search") views.search.begin();
}

start().catch((error) => say(error.message, true));
