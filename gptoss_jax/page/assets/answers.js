// Prompts and replies, token by token: which experts each chose, and two traces or two models side by side.

function answers(at) {
  const traces = page.said.traces ?? [];
  const asked = page.said.evaluations.filter((one) => one.replies.length);
  if (!traces.length && !asked.length) {
    return [element("p", {}, "No trace and no evaluation with replies was given: no prompt and no reply is shown.")];
  }
  return [...(traces.length ? strips(at, traces) : []), ...(asked.length ? replied(at, asked) : [])];
}

/** The place of a prompt in a trace's arrays: its first token, and its first one with experts. */
function promptOf(trace, id) {
  const n = trace.ids.indexOf(id);
  if (n < 0) return null;
  const [first, routed] = [trace.shown, trace.routed].map((counts) => d3.sum(counts.slice(0, n)));
  const pieces = arrayOf(trace.pieces).values.subarray(first, first + trace.shown[n]);
  const segments = arrayOf(trace.of_segment).values.subarray(first, first + trace.shown[n]);
  return { trace, n, first, routed, pieces, segments, known: trace.routed[n] };
}

function strips(at, traces) {
  const trace = traces.find((one) => one.name === at.trace) ?? traces[0];
  const id = trace.ids.includes(at.prompt) ? at.prompt : trace.ids[0];
  const other = traces.find((one) => one.name === at.than_trace && one !== trace);
  const one = promptOf(trace, id);
  const two = other ? promptOf(other, id) : null;
  const differ = two ? firstDifference(one.pieces, two.pieces) : -1;
  const beside = traces.filter((each) => each !== trace && each.ids.includes(id)).map((each) => each.name);
  return [
    element(
      "div",
      { class: "choices" },
      choiceOf("Trace", "trace", traces.map((each) => each.name), trace.name),
      choiceOf("Prompt", "prompt", trace.ids, id),
      beside.length ? choiceOf("Beside", "than_trace", [["", "none"], ...beside], other?.name ?? "") : null,
    ),
    element("div", { class: "sides" }, stripOf(one, at, differ, "token"), two ? stripOf(two, at, differ, "than_token") : null),
    routesOf(one, tokenAt(one, at.token), "routes"),
    two ? routesOf(two, tokenAt(two, at.than_token ?? at.token), "routes-beside") : null,
  ].filter((part) => part !== null);
}

/** The token of a prompt that an address names; where it has none of that number, the nearest. */
function tokenAt(prompt, text) {
  return Math.max(0, Math.min(prompt.pieces.length - 1, Math.trunc(Number(text ?? 0)) || 0));
}

/** The first place at which two lists differ, or −1. */
function firstDifference(one, other) {
  const most = Math.max(one.length, other.length);
  for (let n = 0; n < most; n++) if (one[n] !== other[n]) return n;
  return -1;
}

/** Scrolls a list of tokens to where it stood, and as little further as shows the chosen one. */
function keepChosenInSight(strip, before) {
  strip.scrollTop = before;
  const [around, token] = [strip, strip.querySelector("[aria-selected=true]")].map((one) => one?.getBoundingClientRect());
  if (token) strip.scrollTop += Math.max(0, token.bottom - around.bottom) + Math.min(0, token.top - around.top);
}

/** The tokens of a prompt as a list in which keys and clicks choose one. */
function stripOf(prompt, at, differ, name) {
  const { trace, n } = prompt;
  const now = tokenAt(prompt, at[name] ?? at.token);
  const id = (token) => `${name}-${token}`;
  const tokens = Array.from(prompt.pieces, (piece, token) =>
    element(
      "span",
      {
        role: "option",
        id: id(token),
        class: `token ${page.said.segments[prompt.segments[token]]}${token === differ ? " differs" : ""}`,
        "aria-selected": token === now ? "true" : "false",
        "aria-label": page.said.pieces[piece].trim() ? null : JSON.stringify(page.said.pieces[piece]),
      },
      page.said.pieces[piece],
    ),
  );
  const go = (token) => {
    if (token >= 0 && token < tokens.length) choose({ [name]: String(token) });
  };
  const list = element(
    "div",
    {
      class: "strip",
      role: "listbox",
      tabindex: "0",
      id: `${name}-strip`,
      "aria-label": `Tokens of ${trace.ids[n]} in ${trace.name}`,
      "aria-activedescendant": id(now),
      keydown: (event) => {
        const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -10, ArrowDown: 10 }[event.key];
        if (step === undefined) return;
        event.preventDefault();
        go(now + step);
      },
      click: (event) => {
        const token = event.target.closest(".token");
        if (token) go(tokens.indexOf(token));
      },
    },
    tokens,
  );
  const cut = trace.shown[n] < trace.tokens[n] ? `; the first ${trace.shown[n]} of ${trace.tokens[n]} tokens` : "";
  const said = differ < 0 ? "" : `; they differ from token ${differ} on`;
  const few = trace.ids.length < trace.prompts ? `; the first ${trace.ids.length} of ${trace.prompts} prompts` : "";
  return element("section", {}, element("h2", {}, `${trace.name}${cut}${few}${said}`), list);
}

/** Which experts a token chose in each layer, and with which gates; `name` is the figure's. */
function routesOf(prompt, token, name) {
  const { layers, top_k: k } = page.said.sizes;
  const piece = page.said.pieces[prompt.pieces[token]] ?? "";
  const title = `Token ${token}, ${JSON.stringify(piece)}, in ${prompt.trace.name}`;
  if (token >= prompt.known) {
    return element("p", { class: "note" }, `${title}: it was generated last, and no step was taken behind it.`);
  }
  const from = (prompt.routed + token) * layers * k;
  const [chosenExperts, gates] = [prompt.trace.experts, prompt.trace.gates].map((named) => arrayOf(named).values);
  const cells = d3.range(layers * k).map((n) => ({
    layer: Math.floor(n / k),
    expert: chosenExperts[from + n],
    gate: gates[from + n] / 255,
  }));
  const draw = (width) =>
    Plot.plot({
      ...gridOf(),
      width,
      height: Math.max(120, Math.min(520, 40 + layers * 16)),
      padding: 0.1,
      color: { scheme: "Cividis", domain: [0, 1], legend: true, label: "gate" },
      ariaLabel: "Experts and gates of the token",
      marks: [Plot.cell(cells, { x: "expert", y: "layer", fill: "gate" })],
    });
  const table = { columns: ["layer", "expert", "gate"], rows: cells.map((c) => [c.layer, c.expert, c.gate]) };
  return figureOf(title, name, draw, table);
}

/** The tokens that chose an expert with the highest gates, in context; nothing where no trace was given. */
function tokensOf(layer, id) {
  const traces = page.said.traces ?? [];
  if (!traces.length) return null;
  const { layers, top_k: k } = page.said.sizes;
  const found = [];
  for (const trace of traces) {
    const [ids, gates] = [trace.experts, trace.gates].map((named) => arrayOf(named).values);
    trace.ids.forEach((prompt, n) => {
      const of = promptOf(trace, prompt);
      for (let token = 0; token < of.known; token++) {
        for (let rank = 0; rank < k; rank++) {
          const at = ((of.routed + token) * layers + layer) * k + rank;
          if (ids[at] === id) found.push({ trace, prompt, n, of, token, gate: gates[at] / 255 });
        }
      }
    });
  }
  const best = found.sort((a, b) => b.gate - a.gate).slice(0, 12);
  if (!best.length) return element("p", { class: "note" }, "No token of the traces chose it.");
  const text = (of, first, last) =>
    Array.from(of.pieces.subarray(Math.max(0, first), Math.max(0, last)), (piece) => page.said.pieces[piece]).join("");
  const rows = best.map(({ trace, prompt, of, token, gate }) => [
    gate,
    element("span", {}, text(of, token - 8, token), element("mark", {}, text(of, token, token + 1)), text(of, token + 1, token + 6)),
    linkTo({ view: "answers", trace: trace.name, prompt, token: String(token) }, prompt),
  ]);
  const table = { columns: ["gate", "in context", "prompt"], rows };
  return tabled("Tokens with the highest gates", "expert-tokens", table, "Of the traces on this page");
}

/** What models replied to a question of an evaluation, with the first place where they differ. */
function replied(at, asked) {
  const of = asked.find((one) => one.name === at.evaluation) ?? asked[0];
  const ids = of.replies.map((question) => question.id);
  const question = of.replies[Math.max(0, ids.indexOf(at.question))];
  const whole = question.said[""];
  const sides = Object.entries(question.said).map(([model, text]) => {
    const [letters, ofWhole] = [[...text], [...(whole ?? text)]]; // whole characters, none of which is cut in two
    const differ = firstDifference(ofWhole, letters);
    const [same, rest] = [letters.slice(0, differ), letters.slice(differ)].map((part) => part.join(""));
    const parts = differ < 0 ? [text] : [same, element("mark", {}, rest || "∎")];
    return element("section", {}, element("h3", {}, model || of.setting.baseline), element("div", { class: "strip" }, parts));
  });
  return [
    element("h2", {}, `Replies: ${of.name}`),
    element(
      "div",
      { class: "choices" },
      asked.length > 1 ? choiceOf("Evaluation", "evaluation", asked.map((one) => one.name), of.name) : null,
      choiceOf("Question", "question", ids, question.id),
    ),
    element("div", { class: "sides" }, sides),
  ];
}
