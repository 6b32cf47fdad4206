// The page: which views there are, what can be chosen in each, and light or dark.
// `settle` says what is shown where nothing was chosen, `criteria` which are among the choices.

const VIEWS = {
  overview: { title: "Overview", show: overview, choices: ["profile", "group", "criterion", "scale", "keep"] },
  tradeoff: { title: "Trade-off", show: tradeoff, choices: ["profile", "group", "criterion", "axis"] },
  compare: { title: "Compare", show: compare, settle: comparedIn, criteria: sharedIn, choices: ["profile", "group", "than_profile", "than_group", "criterion"] },
  expert: { title: "Expert", show: expert, choices: ["profile", "group", "criterion"] },
  answers: { title: "Answers", show: answers, choices: [] },
};

/** What each choice is among in a view. */
function optionsOf(name, at, view) {
  const groups = (profile) => named("profiles", profile).groups.map((group) => [group, groupName(group)]);
  const found = {
    profile: () => ["Profile", page.said.profiles.map((one) => one.name)],
    than_profile: () => ["minus profile", page.said.profiles.map((one) => one.name)],
    group: () => ["Rows", groups(at.profile)],
    than_group: () => ["minus rows", groups(at.than_profile)],
    criterion: () => ["Criterion", view.criteria?.(at) ?? named("profiles", at.profile).criteria],
    scale: () => ["Shown as", scalesOf(named("profiles", at.profile))],
    axis: () => ["Against", page.said.sizes.bytes ? ["experts", "GiB"] : ["experts"]],
    keep: () => ["Keep-sets", [["", "none"], ...page.said.keep_sets.map((one) => one.name)]],
  };
  return found[name]();
}

function show() {
  const asked = chosen();
  const view = Object.hasOwn(VIEWS, asked.view) ? VIEWS[asked.view] : VIEWS.overview;
  const at = view.settle?.(asked) ?? asked;
  const held = document.activeElement?.id;
  const scrolled = new Map(Array.from(document.querySelectorAll(".strip[id]"), (strip) => [strip.id, strip.scrollTop]));
  const links = Object.entries(VIEWS).map(([name, of]) =>
    linkTo({ view: name }, of.title, { id: `view-${name}`, "aria-current": of === view ? "page" : null }),
  );
  document.getElementById("views").replaceChildren(...links);
  const choices = view.choices.map((name) => {
    const [label, options] = optionsOf(name, at, view);
    return options.length > 1 ? choiceOf(label, name, options, at[name]) : null;
  });
  document.getElementById("choices").replaceChildren(...choices.filter((choice) => choice !== null));
  document.getElementById("main").replaceChildren(...view.show(at));
  document.title = `${view.title} – ${page.said.title}`;
  for (const strip of document.querySelectorAll(".strip[id]")) keepChosenInSight(strip, scrolled.get(strip.id) ?? 0);
  if (held) document.getElementById(held)?.focus({ preventScroll: true });
}

function made() {
  const profiles = page.said.profiles.map((one) => [
    one.name,
    one.model,
    one.rows,
    one.tokens[0],
    one.counted,
    one.fingerprint.slice(0, 12),
    one.command,
  ]);
  const columns = ["profile", "model", "rows", "tokens", "counted", "fingerprint", "command"];
  const warnings = page.said.warnings.map((warning) => element("li", {}, warning));
  document.getElementById("made").replaceChildren(
    element("p", {}, `Made by gptoss-jax ${page.said.version}: `, element("code", {}, page.said.command)),
    ...(warnings.length ? [element("h2", {}, "Warnings"), element("ul", {}, warnings)] : []),
    tabled("Where it is from", "sources", { columns, rows: profiles }, "What experts are scored by"),
  );
}

/** Light, dark, or as the system has it. */
function theme() {
  const order = ["light dark", "dark", "light"];
  const root = document.documentElement;
  const now = order.indexOf(root.style.colorScheme || order[0]);
  root.style.colorScheme = order[(now + 1) % order.length];
  tell(`colours: ${["of the system", "dark", "light"][(now + 1) % order.length]}`);
  show();
}

document.getElementById("choices").addEventListener("submit", (event) => event.preventDefault());
document.getElementById("theme").addEventListener("click", theme);
document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address says what is shown
  document.getElementById("main").focus();
});
openPage().then(() => {
  watch(show);
  document.body.classList.add("open"); // all at once: nothing that is there moves when more comes
  made();
  show();
});
