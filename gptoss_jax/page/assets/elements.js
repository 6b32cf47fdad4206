// Elements of the page. Text is always text: nothing here reads markup.

/** An element with attributes and children, which are elements or texts. A function is a listener of its event. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

/** A choice of one of several, with its label. Options are [value, text] or texts; the first stands where none is the
 * value. */
function choiceOf(label, name, options, value) {
  const id = `choose-${name}`;
  const pairs = options.map((option) => (Array.isArray(option) ? option : [option, option]));
  const select = element(
    "select",
    { id, name, change: (event) => choose({ [name]: event.target.value }) },
    pairs.map(([of, text]) => element("option", { value: of, selected: of === value }, text)),
  );
  return element("span", { class: "choice" }, element("label", { for: id }, label), select);
}

/** A table: columns are names, rows are lists of numbers and texts; numbers and their names stand to the right. */
function tableOf(caption, columns, rows) {
  const isNumber = (value) => typeof value === "number" || value === null;
  const cell = (value) => (isNumber(value) ? element("td", { class: "number" }, shown(value)) : element("td", {}, value));
  const head = (name, n) => {
    const numbers = rows.length && rows.every((row) => isNumber(row[n]));
    return element("th", { scope: "col", class: numbers ? "number" : null }, name);
  };
  return element(
    "div",
    { class: "wide", tabindex: "0", role: "region", "aria-label": caption },
    element(
      "table",
      {},
      element("caption", {}, caption),
      element("thead", {}, element("tr", {}, columns.map(head))),
      element("tbody", {}, rows.map((row) => element("tr", {}, row.map(cell)))),
    ),
  );
}

/** Says something to whoever listens rather than looks. */
function tell(text) {
  document.getElementById("told").textContent = text;
}

/** A link to what another choice shows. */
function linkTo(change, text, attributes = {}) {
  return element("a", { href: addressOf(change), ...attributes }, text);
}
