// A plot with all that belongs to it: its table, and files of both.

// Those of Okabe and Ito, which the colour-blind tell apart, without yellow, which is pale on white, and some of Tol's.
const COLOURS = { one: "#0072b2", other: "#d55e00", third: "#009e73", grey: "#888888" };
const INKS = [COLOURS.one, COLOURS.other, COLOURS.third, "#cc79a7", "#e69f00", "#56b4e9", "#a65628", "#882255", "#999933"];

/** How lines of several names are drawn: each in its colour, or where they are too many for that all grey but the
 * chosen one; what a line is of then shows where it is pointed at. */
function inksOf(names, chosenName) {
  const each = [...new Set(names)];
  if (each.length <= INKS.length) return { legend: true, domain: each, range: INKS.slice(0, each.length) };
  return { legend: false, domain: each, range: each.map((name) => (name === chosenName ? COLOURS.one : COLOURS.grey)) };
}

// How a name stands beside its point, readable above lines.
const BESIDE = { dx: 8, textAnchor: "start", fill: "currentColor", stroke: "var(--paper)", strokeWidth: 4 };
// How marks are seen on cells, pale and dark ones, in both themes.
const ON_ANY = { fill: "#000000", stroke: "#ffffff", strokeWidth: 1 };
const NARROWEST = 240; // pixels, below which a plot is cut rather than drawn anew
const MARGIN = 12; // pixels around a plot that stands alone: numbers at its legend's ends need them
const unfolded = new Set(); // the names of figures whose table is open: it stays so where another thing is chosen

/** A figure: `draw` gives the plot for a width, `table` is { columns, rows }, `name` that of the files. */
function figureOf(title, name, draw, table, note = "") {
  const place = element("div", { class: "plot", id: `${name}-plot` });
  const plot = () => place.firstElementChild;
  const more = element("details", { open: unfolded.has(name) }, element("summary", {}, "Table"));
  const fill = () => {
    if (more.open && more.children.length === 1) more.append(tableOf(title, table.columns, table.rows));
  };
  more.addEventListener("toggle", () => {
    unfolded[more.open ? "add" : "delete"](name);
    fill();
  });
  fill();
  const pictures = {
    SVG: () => save(`${name}.svg`, "image/svg+xml", standing(plot())),
    PNG: () => savePicture(`${name}.png`, plot()),
  };
  const figure = element(
    "figure",
    { id: name },
    element("figcaption", {}, element("h2", {}, title), note ? element("p", { class: "note" }, note) : null),
    place,
    filesOf(title, name, table, pictures),
    more,
  );
  drawn(place, draw);
  return figure;
}

/** A table that no plot belongs to; its caption says what it is of, its title what it is. */
function tabled(title, name, table, caption) {
  const shownTable = tableOf(caption, table.columns, table.rows);
  return element("section", { id: name }, element("h2", {}, title), shownTable, filesOf(title, name, table));
}

/** Buttons that give a table as files, and what else there is to give, by its kind. */
function filesOf(title, name, table, others = {}) {
  const kinds = {
    ...others,
    CSV: () => save(`${name}.csv`, "text/csv", csvOf(table)),
    JSON: () => save(`${name}.json`, "application/json", jsonOf(table)),
  };
  const buttons = Object.entries(kinds).map(([kind, click]) =>
    element("button", { type: "button", click, "aria-label": `${title} as ${kind}` }, kind),
  );
  return element("div", { class: "files" }, buttons);
}

/** Draws a plot as wide as its place, and again where that changes. At first it is as wide as the view, so that nothing
 * moves once the place is there. */
function drawn(place, draw) {
  let width = document.getElementById("main").clientWidth;
  place.append(pictured(draw(Math.max(NARROWEST, width))));
  new ResizeObserver(() => {
    if (place.clientWidth === width || !place.clientWidth) return;
    width = place.clientWidth;
    place.replaceChildren(pictured(draw(Math.max(NARROWEST, width))));
  }).observe(place);
}

/** The plot as one picture for whoever hears the page: its parts have no names of their own. */
function pictured(plot) {
  for (const svg of plot.matches("svg") ? [plot] : plot.querySelectorAll(":scope > svg")) svg.setAttribute("role", "img");
  for (const part of plot.querySelectorAll("g[aria-label]")) part.removeAttribute("aria-label");
  for (const legend of plot.querySelectorAll(":scope > svg:not([aria-label])")) legend.setAttribute("aria-label", "Legend");
  for (const swatch of plot.querySelectorAll(":scope > div svg")) swatch.setAttribute("aria-hidden", "true"); // a name stands beside it
  return plot;
}

/** The plot itself, which stands behind its legend. */
function svgOf(plot) {
  return plot.matches("svg") ? plot : plot.querySelector(":scope > svg:last-of-type");
}

/** What plots of layers by experts have in common. */
function gridOf() {
  const { layers, experts } = page.said.sizes;
  return {
    marginLeft: 40,
    padding: 0,
    x: { label: "expert", domain: d3.range(experts), tickFormat: (e) => (e % (experts > 40 ? 8 : 4) ? "" : e) },
    y: { label: "layer", domain: d3.range(layers), tickFormat: (l) => (l % (layers > 12 ? 4 : 1) ? "" : l) },
  };
}

/** As high as the layers of a heat map need. */
function heightOf(width) {
  const { layers, experts } = page.said.sizes;
  return Math.max(180, Math.min(620, 40 + layers * Math.max(8, Math.min(18, (width - 60) / experts))));
}

/** Points with a place for the label of each: those of the same n stand no nearer to one another than `gap`. */
function labelled(points, name, gap) {
  return d3.groups(points, (point) => point.n).flatMap(([, same]) => {
    let last = -Infinity;
    return d3.sort(same, (point) => point[name]).map((point) => {
      last = Math.max(point[name], last + gap);
      return { ...point, label: last };
    });
  });
}

/** The rows of a table as objects, as JSON. */
function jsonOf({ columns, rows }) {
  const named = rows.map((row) => Object.fromEntries(row.map((value, n) => [columns[n], plainOf(value)])));
  return `${JSON.stringify(named, null, 1)}\n`;
}

function csvOf({ columns, rows }) {
  const field = (value) => {
    const text = String(plainOf(value) ?? "");
    // A spreadsheet would run what begins so as a formula.
    const safe = typeof value === "number" ? text : text.replace(/^[=+\-@\t\r]/, "'$&");
    return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  return [columns, ...rows].map((row) => `${row.map(field).join(",")}\r\n`).join("");
}

function plainOf(value) {
  return value instanceof Node ? value.textContent : value;
}

/** Gives a file to whoever looks at the page. */
function save(name, type, content) {
  const address = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  element("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}

/** The plot and its legend as an SVG of their own, laid out as they are on the page, with its colours and fonts. */
function standing(plot) {
  const around = plot.getBoundingClientRect();
  const { color, backgroundColor } = getComputedStyle(document.body);
  const [width, height] = [around.width + 2 * MARGIN, around.height + 2 * MARGIN];
  const whole = d3.create("svg").attr("width", width).attr("height", height);
  whole.attr("viewBox", [-MARGIN, -MARGIN, width, height]);
  whole.attr("style", `color: ${color}; background: ${backgroundColor}; font: 10px sans-serif`);
  for (const svg of plot.matches("svg") ? [plot] : plot.querySelectorAll("svg")) {
    const { left, right, top, width, height } = svg.getBoundingClientRect();
    const copy = whole.append(() => svg.cloneNode(true));
    copy.attr("x", left - around.left).attr("y", top - around.top).attr("width", width).attr("height", height);
    copy.attr("overflow", "visible");
    if (!svg.parentElement.matches("span")) continue;
    // A swatch of the legend: its name stands beside it.
    const middle = top - around.top + height / 2;
    const name = whole.append("text").text(svg.parentElement.textContent);
    name.attr("x", right - around.left + 6).attr("y", middle).attr("dy", "0.35em").attr("fill", "currentColor");
  }
  return new XMLSerializer().serializeToString(whole.node());
}

function savePicture(name, plot) {
  const picture = new Image();
  picture.onload = () => {
    const canvas = element("canvas", { width: 2 * picture.naturalWidth, height: 2 * picture.naturalHeight });
    canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
    canvas.toBlob((blob) => save(name, "image/png", blob));
  };
  picture.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(standing(plot))}`;
}
