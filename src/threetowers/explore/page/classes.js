// Zero-shot classes: names that are typed in, the images that each column takes for them, and one image's probabilities.

import { ask, latest, upload } from "./api.js";
import { section, swatch } from "./column.js";
import { byId, h, number, say } from "./dom.js";
import { picture, thumb } from "./thumb.js";

const percent = (value) => `${(100 * value).toFixed(value < 0.1 ? 1 : 0)} %`;

export function startClasses(page) {
  const names = byId("names");
  let query = null;
  let asked = false;
  const template = byId("template");
  const templates = page.gallery?.templates ?? [];
  template.value = templates[0] ?? "";
  byId("templates").replaceChildren(...templates.map((each) => h("button", {
    type: "button", class: "chip", onclick: () => { template.value = each; if (typed().length) run(); },
  }, each)));
  names.value = (page.gallery?.classes ?? []).slice(0, 8).join("\n");

  const typed = () => [...new Set(names.value.split(/[\n,]/).map((name) => name.trim()).filter(Boolean))];

  const run = latest(async () => {
    const classes = typed();
    if (!classes.length) return say("Type at least one class name");
    const found = await ask("zero-shot", { classes, template: template.value, alpha: page.alpha(), query });
    asked = true;
    byId("class-results").replaceChildren(query === null ? "" : probabilities(classes, found.columns), sorted(found.columns));
    say(`${number(page.gallery.images)} images sorted into ${classes.length} classes`);
  });

  function probabilities(classes, columns) {
    const rows = classes.map((name, i) => h("tr", {}, h("th", { scope: "row" }, name),
      ...columns.map((column) => {
        const best = Math.max(...column.query) === column.query[i];
        return h("td", { class: best ? "best" : null }, percent(column.query[i]), meter(column.query[i]));
      })));
    return h("div", { class: "own" }, picture(query, "the image that is classified"),
      h("div", { class: "scroll" }, h("table", {}, h("caption", {}, "Probabilities of this image among these classes"),
        h("thead", {}, h("tr", {}, h("td", {}), ...page.columns.map((column) => h("th", { scope: "col" }, swatch(column.colour), column.label)))),
        h("tbody", {}, rows))));
  }

  function meter(share) {
    const bar = h("span", { class: "meter", "aria-hidden": "true" }, h("span", {}));
    bar.firstChild.style.width = `${100 * share}%`;
    return bar;
  }

  function sorted(columns) {
    return h("div", { class: "columns" }, columns.map((column, i) => {
      return section(page, page.columns[i],
        column.classes.map((each) => h("div", { class: "class" },
          h("h4", {}, each.name, h("small", {}, ` ${number(each.count)}`)),
          meter(each.count / page.gallery.images),
          each.items.length
            ? h("ol", { class: "thumbs", "aria-label": `surest images of ${each.name}` },
              each.items.map((item, rank) => thumb(page, item, rank + 1, { score: percent })))
            : h("p", { class: "muted small" }, "no image"))));
    }));
  }

  byId("classes-form").addEventListener("submit", (event) => { event.preventDefault(); run(); });

  return {
    alpha: () => { if (asked) run(); },
    show: () => { if (!asked && typed().length) run(); },
    async take(file) {
      say("Reading your image …");
      query = await upload(file);
      await run();
    },
  };
}
