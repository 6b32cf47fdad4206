// Layer × expert: how each expert scores, and how the mass of a layer is spread over its experts.

const SCALES = [
  ["layer", "share of the layer's highest"],
  ["plain", "the score itself"],
  ["all", "times the score over all rows"],
  ["domain", "share over domains"],
];

/** Those of a profile: shares over domains only where there are several. */
function scalesOf(profile) {
  return SCALES.filter(([name]) => name !== "domain" || profile.parts.length > 1);
}

/** The scores [L, E] that are chosen, what they are of, and the experts of each layer, best first. */
function scoresOf(at) {
  const profile = named("profiles", at.profile);
  const criterion = Math.max(0, profile.criteria.indexOf(at.criterion));
  const group = Math.max(0, profile.groups.indexOf(at.group));
  const [scores, order, halves, counts] = [profile.scores, profile.order, profile.halves, profile.counts].map(arrayOf);
  return {
    profile,
    criterion: profile.criteria[criterion],
    group: profile.groups[group],
    scores: partOf(scores, criterion, group),
    order: partOf(order, criterion, group),
    halves: partOf(halves, criterion, group),
    counts: partOf(counts, group),
  };
}

/** The scores as the heat map has them. */
function scaledOf(scale, of) {
  const { layers, experts } = page.said.sizes;
  const overGroup = (g) => partOf(arrayOf(of.profile.scores), of.profile.criteria.indexOf(of.criterion), g);
  const scaled = Float64Array.from(of.scores);
  if (scale === "layer") {
    for (let layer = 0; layer < layers; layer++) {
      const of = scaled.subarray(layer * experts, (layer + 1) * experts);
      const most = Math.max(...of);
      if (most > 0) of.forEach((value, n) => (of[n] = value / most));
    }
  } else if (scale === "all") {
    const all = overGroup(0);
    scaled.forEach((value, n) => (scaled[n] = all[n] ? value / all[n] : NaN));
  } else if (scale === "domain") {
    const each = of.profile.parts.map(overGroup);
    scaled.forEach((value, n) => {
      const sum = d3.sum(each, (scores) => scores[n]);
      scaled[n] = sum && isPart(of) ? value / sum : NaN;
    });
  }
  return scaled;
}

/** Whether the chosen rows are those of a domain, or another of the parts that make up all rows. */
function isPart(of) {
  return of.profile.parts.includes(of.profile.groups.indexOf(of.group));
}

function overview(at) {
  const of = scoresOf(at);
  const dead = of.counts.reduce((total, count) => total + (count === 0), 0);
  const thin = of.counts.reduce((total, count) => total + (count > 0 && count < page.said.thin), 0);
  const rest = `${dead} experts that no token chose, and ${thin} that fewer than ${page.said.thin} did`;
  return [
    element("p", { class: "lead" }, `${of.profile.model}: ${of.criterion} over ${groupName(of.group)}; ${rest}.`),
    heatMap(at, of),
    concentration(of),
  ];
}

function heatMap(at, of) {
  const { experts } = page.said.sizes;
  const sets = page.said.keep_sets.find((one) => one.name === at.keep);
  const stays = sets ? staysIn(sets) : () => true;
  const scale = scalesOf(of.profile).some(([name]) => name === at.scale) ? at.scale : DEFAULTS.scale;
  const scaled = scaledOf(scale, of);
  const cells = Array.from(scaled, (value, n) => {
    const [layer, expert] = [Math.floor(n / experts), n % experts];
    return { layer, expert, value, count: of.counts[n], stays: stays(layer, expert) };
  });
  const chosenCell = () => {
    const [layer, expert] = cellOf(chosen());
    return cells[layer * experts + expert];
  };
  const draw = (width) =>
    Plot.plot({
      ...gridOf(),
      width,
      height: heightOf(width),
      color: { scheme: "Cividis", legend: true, label: scaleName(scale, of), zero: true },
      ariaLabel: "Heat map of layers and experts",
      marks: [
        Plot.cell(cells, {
          x: "expert",
          y: "layer",
          fill: (cell) => (cell.count === 0 ? NaN : cell.value),
          inset: 0.25,
          fillOpacity: (cell) => (cell.stays ? 1 : 0.25),
          channels: { tokens: "count" },
          tip: { format: { fill: shown } },
        }),
        Plot.dot(cells.filter((cell) => cell.count > 0 && cell.count < page.said.thin), {
          x: "expert",
          y: "layer",
          r: 1.5,
          fill: COLOURS.other,
        }),
        Plot.text(cells.filter((cell) => cell.count === 0), { x: "expert", y: "layer", text: () => "×", fontSize: 8 }),
        Plot.cell([chosenCell()], { x: "expert", y: "layer", stroke: ON_ANY.stroke, strokeWidth: 5 }),
        Plot.cell([chosenCell()], { x: "expert", y: "layer", stroke: ON_ANY.fill, strokeWidth: 2 }),
      ],
    });
  const figure = figureOf("Experts by layer", "experts", draw, tableOfScores(of, scaled), noteOf(sets, scale, of));
  walk(figure.querySelector(".plot"), cells);
  return figure;
}

function scaleName(scale, of) {
  return scale === "plain" ? of.criterion : `${of.criterion}, ${Object.fromEntries(SCALES)[scale]}`;
}

function noteOf(sets, scale, of) {
  const dropped = sets ? " What the keep-sets drop is pale." : "";
  const among = of.profile.parts.map((n) => of.profile.groups[n]).join(", ");
  const parts = scale === "domain" && !isPart(of) ? ` Shares are over ${among}: choose the rows of one.` : "";
  const marks = `× no token chose it; ● fewer than ${page.said.thin} tokens did.`;
  return `Arrow keys and clicks choose an expert, Enter opens it. ${marks}${dropped}${parts}`;
}

function tableOfScores(of, scaled) {
  const { experts } = page.said.sizes;
  const rows = Array.from(of.scores, (score, n) => {
    const half = of.halves[n];
    return [Math.floor(n / experts), n % experts, of.counts[n], score, score - half, score + half, scaled[n]];
  });
  return { columns: ["layer", "expert", "tokens", of.criterion, "low", "high", "shown"], rows };
}

/** Lets keys and clicks choose an expert of the heat map. */
function walk(place, cells) {
  const { layers, experts } = page.said.sizes;
  place.setAttribute("tabindex", "0");
  place.setAttribute("role", "application");
  place.setAttribute("aria-label", "Heat map: arrow keys choose an expert, Enter opens it");
  const go = (layer, expert) => {
    if (layer < 0 || expert < 0 || layer >= layers || expert >= experts) return;
    const cell = cells[layer * experts + expert];
    tell(`layer ${layer}, expert ${expert}: ${shown(cell.value)}, ${shown(cell.count)} tokens`);
    choose({ layer: String(layer), expert: String(expert) });
  };
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  place.addEventListener("keydown", (event) => {
    const [layer, expert] = cellOf(chosen());
    if (event.key in steps) go(layer + steps[event.key][0], expert + steps[event.key][1]);
    else if (event.key === "Enter") choose({ view: "expert" });
    else return;
    event.preventDefault();
  });
  place.addEventListener("click", (event) => {
    const [expert, layer] = bandsAt(place.firstElementChild, event);
    if (layer in d3.range(layers) && expert in d3.range(experts)) go(layer, expert);
  });
  place.addEventListener("dblclick", () => choose({ view: "expert" }));
}

/** Which bands of a plot's axes are clicked at, whatever lies above them there. */
function bandsAt(plot, event) {
  const svg = svgOf(plot);
  const box = svg.getBoundingClientRect();
  const unit = svg.viewBox.baseVal.width / box.width;
  const places = { x: (event.clientX - box.left) * unit, y: (event.clientY - box.top) * unit };
  return Object.entries(places).map(([name, at]) => {
    const { range, step } = plot.scale(name);
    return Math.floor((at - range[0]) / step);
  });
}

/** Which share of a layer's mass its first experts hold. */
function concentration(of) {
  const { layers, experts } = page.said.sizes;
  const group = of.profile.groups.indexOf(of.group);
  const masses = partOf(arrayOf(of.profile.masses), group);
  const points = [];
  for (let layer = 0; layer < layers; layer++) {
    const sorted = Array.from(masses.subarray(layer * experts, (layer + 1) * experts)).sort((a, b) => b - a);
    const total = d3.sum(sorted) || 1;
    let held = 0;
    points.push({ layer, n: 0, share: 0 });
    sorted.forEach((mass, n) => points.push({ layer, n: n + 1, share: (held += mass) / total }));
  }
  const draw = (width) =>
    Plot.plot({
      width,
      height: 320,
      x: { label: "experts, those with most of it first" },
      y: { label: `share of ${of.profile.mass}`, domain: [0, 1], grid: true },
      color: { scheme: "Cividis", legend: true, label: "layer" },
      ariaLabel: "Concentration curves",
      marks: [
        Plot.line([[0, 0], [experts, 1]], { stroke: COLOURS.grey, strokeDasharray: "4 4" }),
        Plot.line(points, { x: "n", y: "share", z: "layer", stroke: "layer", strokeOpacity: 0.8 }),
      ],
    });
  const rows = points.filter(({ n }) => n).map(({ layer, n, share }) => [layer, n, share]);
  const table = { columns: ["layer", "experts", "share"], rows };
  return figureOf("How concentrated a layer is", "concentration", draw, table, "Dashed: all experts alike.");
}
