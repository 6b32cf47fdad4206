// One expert: where it is used, who runs beside it, which tokens choose it, and whether it stays.

function expert(at) {
  const { experts } = page.said.sizes;
  const [layer, id] = cellOf(at);
  const of = scoresOf(at);
  const place = layer * experts + id;
  const n = rankingOf(of.order, layer).indexOf(id) + 1;
  const parts = [
    steps(layer, id),
    element(
      "p",
      { class: "lead" },
      `Layer ${layer}, expert ${id}: ${shown(of.counts[place])} tokens of ${groupName(of.group)}; ${of.criterion} `,
      `${shown(of.scores[place])}, place ${n} of ${experts}: it ${n === 1 ? "goes last" : `goes where fewer than ${n} stay`}.`,
    ),
    byGroup(of, layer, id),
    stays(layer, id),
    partners(of, layer, id),
    tokensOf(layer, id),
  ];
  return parts.filter((part) => part !== null);
}

/** Links to the neighbours. */
function steps(layer, id) {
  const { layers, experts } = page.said.sizes;
  const to = (l, e, text) =>
    l < 0 || e < 0 || l >= layers || e >= experts
      ? null
      : linkTo({ layer: String(l), expert: String(e) }, text, { id: `step-${l - layer}-${e - id}` });
  return element(
    "p",
    { class: "steps" },
    to(layer, id - 1, "← expert"),
    to(layer, id + 1, "expert →"),
    to(layer - 1, id, "↑ layer"),
    to(layer + 1, id, "layer ↓"),
  );
}

/** The experts of a layer, best first, of the order [L, E] of all. */
function rankingOf(order, layer) {
  const { experts } = page.said.sizes;
  return Array.from(order.subarray(layer * experts, (layer + 1) * experts));
}

/** Its score over each domain, with its interval. */
function byGroup(of, layer, id) {
  const { profile } = of;
  const { experts } = page.said.sizes;
  const place = layer * experts + id;
  const criterion = profile.criteria.indexOf(of.criterion);
  const [scores, halves, counts] = [profile.scores, profile.halves, profile.counts].map(arrayOf);
  const points = profile.groups.map((group, g) => {
    const [score, half] = [partOf(scores, criterion, g)[place], partOf(halves, criterion, g)[place]];
    const known = Number.isFinite(half);
    const count = partOf(counts, g)[place];
    return { group: groupName(group), score, low: known ? score - half : NaN, high: known ? score + half : NaN, count };
  });
  const draw = (width) =>
    Plot.plot({
      width,
      marginLeft: Math.min(180, width / 3),
      x: { label: of.criterion, grid: true, nice: true },
      y: { label: null, domain: points.map((point) => point.group) },
      ariaLabel: "The expert's score by domain",
      marks: [
        Plot.ruleX([0]),
        Plot.barX(points, { x: "score", y: "group", fill: COLOURS.one, fillOpacity: 0.75 }),
        Plot.ruleY(points.filter((point) => Number.isFinite(point.low)), { x1: "low", x2: "high", y: "group" }),
      ],
    });
  const table = {
    columns: ["rows", of.criterion, "low", "high", "tokens"],
    rows: points.map(({ group, score, low, high, count }) => [group, score, low, high, count]),
  };
  const note = `Lines are ${page.said.level * 100} % intervals, over folds of the rows.`;
  return figureOf("By domain", "expert-by-domain", draw, table, note);
}

/** Whether each of the keep-sets has it and why, and where each of the rankings lets it go. */
function stays(layer, id) {
  const { experts } = page.said.sizes;
  const ranked = page.said.rankings.map((ranking) => {
    const place = partOf(arrayOf(ranking.order), layer).indexOf(id) + 1;
    return [ranking.name, place === 1 ? "goes last" : `goes when fewer than ${place} stay`, "–", originOf(ranking)];
  });
  const sets = page.said.keep_sets.map((sets) => {
    const has = staysIn(sets);
    const kept = has(layer, id);
    const at = d3.range(experts).filter((e) => has(layer, e)).indexOf(id);
    return [sets.name, kept ? "stays" : "goes", (kept && sets.reasons?.[layer]?.[at]) || "–", originOf(sets)];
  });
  const table = { columns: ["name", "decision", "why", "chosen"], rows: [...sets, ...ranked] };
  return table.rows.length ? tabled("Whether it stays", "expert-stays", table, "In keep-sets and rankings") : null;
}

/** The experts that its tokens chose besides. */
function partners(of, layer, id) {
  const { profile } = of;
  if (!profile.partners) return null;
  const { experts } = page.said.sizes;
  const [others, together] = [profile.partners, profile.together].map(arrayOf);
  const count = partOf(arrayOf(profile.counts), 0)[layer * experts + id];
  const times = partOf(together, layer, id);
  const points = Array.from(partOf(others, layer, id), (other, n) => ({
    other,
    times: times[n],
    share: count ? times[n] / count : 0,
  })).filter((point) => point.times > 0);
  const draw = (width) =>
    Plot.plot({
      width,
      height: 60 + 22 * points.length,
      x: { label: "share of its tokens", domain: [0, 1], grid: true },
      y: { label: "expert", domain: points.map((point) => point.other), type: "band" },
      ariaLabel: "Experts that run on the same tokens",
      marks: [Plot.barX(points, { x: "share", y: "other", fill: COLOURS.third }), Plot.ruleX([0])],
    });
  const rows = points.map(({ other, times: n, share }) => [other, n, share]);
  const table = { columns: ["expert", "tokens", "share"], rows };
  return figureOf("Who runs beside it", "partners", draw, table, "Over all rows of the profile.");
}
