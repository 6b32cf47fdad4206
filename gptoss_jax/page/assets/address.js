// What is shown is in the address: #VIEW?profile=…&layer=7&expert=12, so that a link opens it, and the browser's own
// back and forward go through what was looked at.

const DEFAULTS = { view: "overview", group: "", keep: "", than_trace: "", scale: "layer", layer: "0", expert: "0" };
const watchers = [];

/** What is chosen, all of it texts. */
function chosen() {
  const [view, query] = location.hash.slice(1).split("?");
  return { ...DEFAULTS, ...(view ? { view } : {}), ...Object.fromEntries(new URLSearchParams(query ?? "")) };
}

/** The layer and the expert that are chosen; where the model has none of that number, the nearest. */
function cellOf(at) {
  const nearest = (text, count) => Math.max(0, Math.min(count - 1, Math.trunc(Number(text)) || 0));
  return [nearest(at.layer, page.said.sizes.layers), nearest(at.expert, page.said.sizes.experts)];
}

/** The address where some of it is chosen otherwise. */
function addressOf(change) {
  const { view, ...rest } = { ...chosen(), ...change };
  const query = new URLSearchParams(Object.entries(rest).filter(([name, value]) => value !== DEFAULTS[name]));
  return `#${view}${query.size ? `?${query}` : ""}`;
}

/** Chooses otherwise. A new place in the history where another view is gone to, the same place for all else. */
function choose(change) {
  const address = addressOf(change);
  if (address === location.hash) return;
  if (change.view) location.hash = address;
  else {
    history.replaceState(null, "", address);
    for (const watcher of watchers) watcher();
  }
}

function watch(watcher) {
  watchers.push(watcher);
}

addEventListener("hashchange", () => watchers.forEach((watcher) => watcher()));
