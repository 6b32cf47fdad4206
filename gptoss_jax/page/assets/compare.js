// Two profiles or two domains: by how much experts score otherwise, and in which layers most.

/** What is compared, also where nobody chose the other side: the next profile of the same kind, or the next domain. */
function comparedIn(at) {
  const own = named("profiles", at.profile);
  const next = page.said.profiles.find((one) => one.name !== own.name && one.mass === own.mass);
  const groups = own.groups.filter((group) => group !== at.group);
  const other = at.than_profile ?? (next ?? own).name;
  return { ...at, than_profile: other, than_group: at.than_group ?? (other === own.name ? groups[0] : at.group) };
}

/** The criteria that both sides have. */
function sharedIn(at) {
  const [one, other] = [at.profile, at.than_profile].map((name) => named("profiles", name).criteria);
  return one.filter((name) => other.includes(name));
}

function compare(at) {
  const shared = sharedIn(at);
  const criterion = shared.includes(at.criterion) ? at.criterion : shared[0];
  if (!criterion) return [element("p", {}, "These two have no criterion in common: choose others.")];
  const one = scoresOf({ ...at, criterion });
  const other = scoresOf({ ...at, criterion, profile: at.than_profile, group: at.than_group });
  const { experts } = page.said.sizes;
  const cells = Array.from(one.scores, (score, n) => {
    const known = one.counts[n] && other.counts[n];
    const half = Math.hypot(one.halves[n], other.halves[n]);
    const difference = known ? score - other.scores[n] : NaN;
    return { layer: Math.floor(n / experts), expert: n % experts, difference, half, clear: Math.abs(difference) > half };
  });
  const most = d3.max(cells, (cell) => Math.abs(cell.difference)) || 1;
  const draw = (width) =>
    Plot.plot({
      ...gridOf(),
      width,
      height: heightOf(width),
      color: { scheme: "PuOr", domain: [-most, most], legend: true, label: `difference in ${one.criterion}` },
      ariaLabel: "Heat map of differences",
      marks: [
        Plot.cell(cells, { x: "expert", y: "layer", fill: "difference", inset: 0.25, tip: { format: { fill: shown } } }),
        Plot.dot(cells.filter((cell) => cell.clear), { x: "expert", y: "layer", r: 1.5, ...ON_ANY }),
      ],
    });
  const table = {
    columns: ["layer", "expert", "difference", "low", "high"],
    rows: cells.map((c) => [c.layer, c.expert, c.difference, c.difference - c.half, c.difference + c.half]),
  };
  const name = (of) => (one.profile === other.profile ? "" : `${of.profile.name}, `) + groupName(of.group);
  const note = "● the interval of the difference, of independent rows, does not hold 0.";
  return [
    element("p", { class: "lead" }, `${name(one)} minus ${name(other)}, by ${one.criterion}.`),
    figureOf("Differences by expert", "differences", draw, table, note),
    layersApart(one, other),
  ];
}

/** Half the sum of differences between the shares of a layer's mass: 0 where they are alike, 1 where nothing is. */
function layersApart(one, other) {
  const { layers, experts } = page.said.sizes;
  const masses = [one, other].map((of) => partOf(arrayOf(of.profile.masses), of.profile.groups.indexOf(of.group)));
  const points = d3.range(layers).map((layer) => {
    const [a, b] = masses.map((mass) => {
      const own = mass.subarray(layer * experts, (layer + 1) * experts);
      const total = d3.sum(own) || 1;
      return Array.from(own, (value) => value / total);
    });
    return { layer, apart: d3.sum(a, (share, n) => Math.abs(share - b[n])) / 2 };
  });
  const draw = (width) =>
    Plot.plot({
      width,
      height: 240,
      x: { ...gridOf().y, type: "band" },
      y: { label: `share of ${one.profile.mass} that lies elsewhere`, grid: true },
      ariaLabel: "How far layers are apart",
      marks: [Plot.barY(points, { x: "layer", y: "apart", fill: COLOURS.one }), Plot.ruleY([0])],
    });
  const sorted = [...points].sort((a, b) => b.apart - a.apart);
  const table = { columns: ["layer", "share"], rows: sorted.map(({ layer, apart }) => [layer, apart]) };
  return figureOf("Layers that differ most", "layers-apart", draw, table);
}
