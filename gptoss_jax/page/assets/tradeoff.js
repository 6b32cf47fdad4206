// What it costs to keep fewer experts: mass, expectations and answers that go, of rankings, keep-sets and evaluations.

function tradeoff(at) {
  const of = scoresOf(at);
  const kept = keptBy(at.axis);
  const parts = [
    massDropped(of, kept),
    lossByGroup(of, kept),
    ...setsBeside(of),
    tried(),
    elsewhere(),
    tailRisk(of, kept),
    eliminated(kept),
    ...page.said.evaluations.flatMap((evaluation) => qualities(evaluation, of.group, kept)),
    ...page.said.healings.flatMap(healing),
  ];
  if (!page.said.evaluations.length) {
    parts.push(element("p", { class: "note" }, "No evaluation was given: what expectations and answers lose is not shown."));
  }
  return parts.filter((part) => part !== null);
}

/** The bytes of a checkpoint in which so many experts of each layer stay, as GiB: of each one more as much more. */
function gibOf(n) {
  const { bytes, experts } = page.said.sizes;
  return (bytes[0] + ((bytes[experts] - bytes[0]) * n) / experts) / 2 ** 30;
}

/** What plots have as their x of points with `n` experts: that number, or what the checkpoint then takes. */
function keptBy(axis) {
  const { bytes, experts } = page.said.sizes;
  if (axis !== "GiB" || !bytes) return { at: "n", axis: { label: "experts kept of each layer", domain: [0, experts] } };
  return { at: ({ n }) => gibOf(n), axis: { label: "GiB of the checkpoint", domain: [gibOf(0), gibOf(experts)] } };
}

/** The mean over layers of the share of a group's mass that is not in the sets. `has(layer, expert)` says what stays. */
function dropped(masses, has) {
  const { layers, experts } = page.said.sizes;
  return d3.mean(d3.range(layers), (layer) => {
    const own = masses.subarray(layer * experts, (layer + 1) * experts);
    const total = d3.sum(own);
    return total ? d3.sum(own, (mass, e) => (has(layer, e) ? 0 : mass)) / total : 0;
  });
}

/** For each number of experts what a ranking drops of a group's mass. */
function curveOf(order, masses) {
  const { layers, experts } = page.said.sizes;
  const shares = new Float64Array(experts + 1);
  for (let layer = 0; layer < layers; layer++) {
    const own = masses.subarray(layer * experts, (layer + 1) * experts);
    const total = d3.sum(own) || 1;
    let left = d3.sum(own);
    shares[0] += left / total / layers;
    rankingOf(order, layer).forEach((e, n) => {
      left -= own[e];
      shares[n + 1] += Math.max(0, left) / total / layers;
    });
  }
  return shares;
}

/** The mass of the chosen rows that goes, by each criterion, beside keep-sets drawn at random. */
function massDropped(of, kept) {
  const { experts } = page.said.sizes;
  const { profile } = of;
  const group = profile.groups.indexOf(of.group);
  const [order, masses] = [profile.order, profile.masses].map(arrayOf);
  const of_group = partOf(masses, group);
  const points = profile.criteria.flatMap((name, c) =>
    Array.from(curveOf(partOf(order, c, group), of_group), (share, n) => ({ name, n, share })),
  );
  const random = d3.range(experts + 1).map((n) => ({ name: "random, expected", n, share: 1 - n / experts }));
  const sets = page.said.keep_sets.map((one) => {
    return { name: one.name, n: d3.mean(one.numbers), share: dropped(of_group, staysIn(one)) };
  });
  const draw = (width) =>
    Plot.plot({
      width,
      height: 340,
      x: kept.axis,
      y: { label: `share of ${profile.mass} that goes`, grid: true, domain: [0, 1] },
      color: inksOf(points.map((p) => p.name), of.criterion),
      ariaLabel: "Mass dropped against experts kept",
      marks: [
        Plot.line(random, { x: kept.at, y: "share", stroke: COLOURS.grey, strokeDasharray: "4 4" }),
        Plot.line(points, { x: kept.at, y: "share", stroke: "name", strokeWidth: (p) => (p.name === of.criterion ? 3 : 1), tip: true }),
        Plot.dot(sets, { x: kept.at, y: "share", symbol: "diamond", fill: "currentColor", r: 5 }),
        Plot.text(labelled(sets, "share", 0.045), { x: kept.at, y: "label", text: "name", ...BESIDE }),
      ],
    });
  const rows = [...points, ...random, ...sets].map(({ name, n, share }) => [name, n, share]);
  const table = { columns: ["chosen by", "experts", "share that goes"], rows };
  const note = `Of ${groupName(of.group)}, mean over layers. Dashed: what experts drawn at random would drop. ◆ keep-sets.`;
  return figureOf("Mass that goes", "mass-dropped", draw, table, note);
}

/** What each domain loses where experts are chosen by the chosen rows; of traces, each segment. */
function lossByGroup(of, kept) {
  const { profile } = of;
  if (profile.parts.length < 2) return null;
  const masses = arrayOf(profile.masses);
  const points = profile.parts.flatMap((g) =>
    Array.from(curveOf(of.order, partOf(masses, g)), (share, n) => ({ group: profile.groups[g], n, share })),
  );
  const draw = (width) =>
    Plot.plot({
      width,
      height: 340,
      x: kept.axis,
      y: { label: `share of its ${profile.mass} that goes`, grid: true, domain: [0, 1] },
      color: inksOf(points.map((p) => p.group), of.group),
      ariaLabel: "What each domain loses",
      marks: [
        Plot.line(points, { x: kept.at, y: "share", stroke: "group", strokeWidth: (p) => (p.group === of.group ? 3 : 1), tip: true }),
      ],
    });
  const table = { columns: ["domain", "experts", "share that goes"], rows: points.map((p) => [p.group, p.n, p.share]) };
  return figureOf("What each domain loses", "domain-losses", draw, table, `Chosen by ${of.criterion} over ${groupName(of.group)}.`);
}

/** The keep-sets side by side: how many stay, what of each group goes, and what was measured of them. */
function setsBeside(of) {
  const sets = page.said.keep_sets;
  if (!sets.length) return [element("p", { class: "note" }, "No keep-sets were given: none stand side by side.")];
  const { profile } = of;
  const { bytes } = page.said.sizes;
  const masses = arrayOf(profile.masses);
  const rows = sets.map((one) => {
    const has = staysIn(one);
    const number = d3.mean(one.numbers);
    const size = bytes ? [gibOf(number)] : [];
    return [one.name, number, ...size, originOf(one), ...profile.groups.map((_, g) => dropped(partOf(masses, g), has))];
  });
  const columns = ["keep-sets", "experts", ...(bytes ? ["GiB"] : []), "chosen", ...profile.groups.map((group) => `${groupName(group)} goes`)];
  const files = sets
    .filter((one) => one.file)
    .map((one) =>
      element(
        "button",
        { type: "button", click: () => save("keep.json", "application/json", one.file) },
        `${one.name} as keep.json`,
      ),
    );
  const caption = `Share of ${profile.mass} that goes, mean over layers`;
  return [
    tabled("Keep-sets side by side", "keep-sets", { columns, rows }, caption),
    files.length ? element("div", { class: "files" }, files) : null,
  ];
}

/** What keep-sets were picked of, and what each of that was worth. */
function tried() {
  const rows = page.said.keep_sets.flatMap((sets) =>
    (sets.tried ?? []).map(({ name, keep, kl, match }) => [sets.name, name, keep, ...kl, ...(match ?? [null, null, null])]),
  );
  if (!rows.length) return null;
  const columns = [
    ...["keep-sets", "of", "experts", "KL", "KL low", "KL high"],
    ...["right answers", "right low", "right high"],
  ];
  return tabled("What was tried", "tried", { columns, rows }, "On rows that were held out, nats a token");
}

/** What keep-sets cost in domains that they were not chosen for. */
function elsewhere() {
  const rows = page.said.keep_sets.flatMap((sets) =>
    Object.entries(sets.elsewhere ?? {}).map(([domain, kl]) => [sets.name, domain, ...kl]),
  );
  if (!rows.length) return null;
  const columns = ["keep-sets", "domain", "KL", "low", "high"];
  return tabled("Lost elsewhere", "elsewhere", { columns, rows }, "Domains that they were not chosen for, nats a token");
}

/** What goes that led tokens: for each number of experts the share of tokens whose first expert in a layer goes, in the
 * mean over layers, and how many experts go that led a token at all. */
function tailRisk(of, kept) {
  const { layers, experts } = page.said.sizes;
  const { profile } = of;
  if (!profile.leads) return element("p", { class: "note" }, "This profile does not say which experts led tokens.");
  const leads = partOf(arrayOf(profile.leads), profile.groups.indexOf(of.group));
  const led = d3.range(layers).flatMap((layer) =>
    rankingOf(of.order, layer).flatMap((e, place) => (leads[layer * experts + e] ? [{ layer, e, place }] : [])),
  );
  const ranked = Array.from(curveOf(of.order, leads), (share, n) => {
    return { name: of.criterion, n, share, count: led.filter(({ place }) => place >= n).length };
  });
  const sets = page.said.keep_sets.map((one) => {
    const has = staysIn(one);
    const count = led.filter(({ layer, e }) => !has(layer, e)).length;
    return { name: one.name, n: d3.mean(one.numbers), share: dropped(leads, has), count };
  });
  const draw = (width) =>
    Plot.plot({
      width,
      height: 300,
      x: kept.axis,
      y: { label: "share of tokens that lose their first expert", grid: true, domain: [0, 1] },
      ariaLabel: "Tokens that lose their first expert",
      marks: [
        Plot.line(ranked, { x: kept.at, y: "share", stroke: COLOURS.one, strokeWidth: 2, channels: { "experts gone": "count" }, tip: true }),
        Plot.dot(sets, { x: kept.at, y: "share", symbol: "diamond", fill: "currentColor", r: 5, channels: { name: "name", "experts gone": "count" }, tip: true }),
      ],
    });
  const columns = ["chosen by", "experts", "share of tokens", "experts gone that led a token"];
  const table = { columns, rows: [...ranked, ...sets].map(({ name, n, share, count }) => [name, n, share, count]) };
  const note = `Of ${groupName(of.group)}, by ${of.criterion}; mean over layers. ◆ keep-sets.`;
  return figureOf("Tail risk", "tail-risk", draw, table, note);
}

/** Of eliminations what the layers lose, against how many experts stay: the mean, and the layer that loses most. */
function eliminated(kept) {
  const { layers, experts } = page.said.sizes;
  const points = page.said.rankings
    .filter((ranking) => ranking.losses)
    .flatMap((ranking) => {
      const losses = arrayOf(ranking.losses);
      return d3.range(1, experts).map((n) => {
        const each = d3.range(layers).map((layer) => partOf(losses, layer)[n - 1]);
        return { name: ranking.name, n, mean: d3.mean(each), most: d3.max(each), layer: d3.maxIndex(each) };
      });
    });
  if (!points.length) return null;
  const draw = (width) =>
    Plot.plot({
      width,
      height: 340,
      x: kept.axis,
      y: { label: "loss of a layer", type: "log", grid: true, tickFormat: "~g" },
      color: inksOf(points.map((point) => point.name), points[0].name),
      ariaLabel: "What layers lose by elimination",
      marks: [
        Plot.line(points, { x: kept.at, y: "mean", stroke: "name", strokeWidth: 2, tip: true }),
        Plot.line(points, { x: kept.at, y: "most", stroke: "name", strokeDasharray: "2 3" }),
      ],
    });
  const rows = points.map(({ name, n, mean, most, layer }) => [name, n, mean, most, layer]);
  const table = { columns: ["ranking", "experts", "mean loss", "most", "in layer"], rows };
  const note = "The change of a layer's output where so many stay, as the elimination weighs it: mean over layers; dotted, the layer that loses most.";
  return figureOf("What layers lose", "eliminated", draw, table, note);
}

/** An evaluation: how far each model's expectations are from the baseline's, with intervals, over the chosen rows where
 * it knows of them; and the gate, which is of all. */
function qualities(of, group, kept) {
  if (!of.entries.length) return [];
  const isOfGroup = of.entries.every((entry) => group !== "" && Object.hasOwn(entry.by_domain, group));
  const estimatesOf = (entry) => (isOfGroup ? entry.by_domain[group] : entry.quality[of.length]).estimates;
  const placed = of.entries.filter((entry) => entry.experts.length);
  const points = placed.map((entry) => ({
    name: entry.name,
    n: d3.mean(entry.experts),
    ...estimatesOf(entry).kl,
    control: entry.origin.criterion === "random",
    passed: entry.gate.passed,
  }));
  const draw = (width) =>
    Plot.plot({
      width,
      height: 340,
      x: kept.axis,
      y: { label: "KL of the baseline, nats a token", grid: true, zero: true },
      ariaLabel: "Quality against experts kept",
      marks: [
        Plot.ruleX(points, { x: kept.at, y1: "low", y2: "high", stroke: colourOf }),
        Plot.dot(points, { x: kept.at, y: "value", fill: colourOf, symbol: (p) => (p.passed ? "circle" : "times"), stroke: colourOf, tip: true }),
        Plot.text(labelled(points, "value", 0.045 * d3.max(points, (p) => p.high)), {
          x: kept.at,
          y: "label",
          text: "name",
          ...BESIDE,
        }),
      ],
    });
  const rows = of.entries.map((entry) => {
    const { kl, ppl, agreement } = estimatesOf(entry);
    const right = entry.replies?.estimates.correct;
    const ends = (estimate) => (estimate ? [estimate.value, estimate.low, estimate.high] : [null, null, null]);
    const number = entry.experts.length ? d3.mean(entry.experts) : null;
    return [entry.name, number, ...ends(kl), ppl.value, agreement.value, ...ends(right), entry.gate.passed ? "passes" : "fails"];
  });
  const columns = [
    ...["model", "experts", "KL", "KL low", "KL high", "PPL", "same top token"],
    ...["right answers", "right low", "right high", "near-lossless gate"],
  ];
  const note =
    `${isOfGroup ? `${group} of ` : ""}${of.setting.rows} rows beside ${of.setting.baseline}, in blocks of ${of.length} tokens; ` +
    `lines are ${page.said.level * 100} % intervals. Grey: experts drawn at random. × does not pass the near-lossless gate.` +
    (placed.length < of.entries.length ? " What is of an unknown number of experts stands in the table alone." : "");
  const figure = figureOf(`Quality: ${of.name}`, `quality-${page.said.evaluations.indexOf(of)}`, draw, { columns, rows }, note);
  return [figure, repliesOf(of), domainsOf(of)].filter((part) => part !== null);
}

/** How the replies of each model are: right, without loops, ended, in harmony's form. */
function repliesOf(of) {
  const points = [of.baseline, ...of.entries].flatMap((entry) =>
    Object.entries(page.said.of_replies).flatMap(([name, label]) => {
      const estimate = entry.replies?.estimates[name];
      return estimate ? [{ model: entry.name, label, ...estimate, control: entry.origin.criterion === "random" }] : [];
    }),
  );
  if (!points.length) return null;
  const models = [...new Set(points.map((point) => point.model))];
  const draw = (width) =>
    Plot.plot({
      width,
      height: 60 + (16 * models.length + 14) * new Set(points.map((point) => point.label)).size,
      marginLeft: Math.min(170, width / 3),
      marginRight: Math.min(110, width / 4),
      x: { label: "share of replies", domain: [0, 1], grid: true },
      y: { label: null, domain: models },
      fy: { label: null, domain: Object.values(page.said.of_replies) },
      ariaLabel: "How replies are",
      marks: [
        Plot.ruleY(points, { y: "model", fy: "label", x1: "low", x2: "high", stroke: colourOf }),
        Plot.dot(points, { y: "model", fy: "label", x: "value", fill: colourOf, tip: true }),
      ],
    });
  const rows = points.map(({ model, label, value, low, high }) => [model, label, value, low, high]);
  const table = { columns: ["model", "what", "share", "low", "high"], rows };
  return figureOf(`Replies: ${of.name}`, `replies-${page.said.evaluations.indexOf(of)}`, draw, table);
}

/** What each domain of an evaluation loses. */
function domainsOf(of) {
  const rows = of.entries.flatMap((entry) =>
    Object.entries(entry.by_domain).map(([domain, quality]) => {
      const { kl, ppl, agreement } = quality.estimates;
      return [entry.name, domain, kl.value, kl.low, kl.high, ppl.value, agreement.value];
    }),
  );
  if (!rows.length) return null;
  const columns = ["model", "domain", "KL", "low", "high", "PPL", "same top token"];
  const name = `domains-${page.said.evaluations.indexOf(of)}`;
  return tabled(`Domains: ${of.name}`, name, { columns, rows }, "KL of the baseline, nats a token");
}

/** A healing: what the rows that were held out lost before and after it, and how it went. */
function healing(of) {
  const points = of.steps.map((step, n) => ({ step, kl: of.held[n] }));
  const draw = (width) =>
    Plot.plot({
      width,
      height: 240,
      x: { label: "steps" },
      y: { label: "KL of the whole model, nats a token", grid: true, zero: true },
      ariaLabel: "How the healing went",
      marks: [Plot.line(points, { x: "step", y: "kl", stroke: COLOURS.one }), Plot.dot(points, { x: "step", y: "kl", tip: true })],
    });
  const rows = of.changes.map((one) => [one.name === "" ? "all" : one.name, one.rows, one.pruned[0], one.healed[0], ...one.difference]);
  const name = `healing-${page.said.healings.indexOf(of)}`;
  const note = `${of.rows} rows were learnt. ${of.is_kept ? "" : "It was not worth it, and was rolled back. "}KL of rows that were held out.`;
  const table = { columns: ["steps", "KL"], rows: points.map(({ step, kl }) => [step, kl]) };
  const columns = ["rows", "held out", "KL pruned", "KL healed", "difference", "low", "high"];
  return [
    figureOf(`Healing: ${of.name}`, name, draw, table, note),
    tabled(`Before and after: ${of.name}`, `${name}-changes`, { columns, rows }, "Rows that were held out"),
  ];
}

function colourOf(point) {
  return point.control ? COLOURS.grey : COLOURS.one;
}
