// What the page is made of: words from JSON, and arrays from one compressed block of bytes, read when they are asked for.

const ARRAYS = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array };

const page = { said: null, block: null };

/** Reads both parts of the page. */
async function openPage() {
  page.said = JSON.parse(document.getElementById("said").textContent);
  const packed = Uint8Array.from(atob(document.getElementById("arrays").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  page.block = await new Response(stream).arrayBuffer();
}

/** An array of the block, with its shape. Those of bfloat16, the upper halves of float32, are made once. */
function arrayOf(named) {
  if (named.values) return named;
  const size = named.shape.reduce((product, n) => product * n, 1);
  named.values =
    named.array === "b2"
      ? new Float32Array(Uint32Array.from(new Uint16Array(page.block, named.at, size), (half) => half << 16).buffer)
      : new ARRAYS[named.array](page.block, named.at, size);
  return named;
}

/** The part of an array at some of its first indices: of [C, G, L, E] at (c, g) what is [L, E]. */
function partOf(array, ...indices) {
  const size = array.shape.slice(indices.length).reduce((product, n) => product * n, 1);
  const place = indices.reduce((at, index, n) => at * array.shape[n] + index, 0);
  return array.values.subarray(place * size, (place + 1) * size);
}

/** The profile, keep-sets or evaluation of a name; the first one where there is none of it. */
function named(kind, name) {
  return page.said[kind].find((one) => one.name === name) ?? page.said[kind][0];
}

/** What a number looks like: four digits, as the tables of the command line have it. */
function shown(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  if (Number.isInteger(value) && Math.abs(value) < 1e15) return value.toLocaleString("en");
  const size = Math.abs(value);
  const text = size >= 1e5 || size < 1e-4 ? value.toExponential(3) : value.toPrecision(4);
  return text.replace("-", "−");
}

/** Where keep-sets are from, as text: files write names of it as code. */
function originOf(sets) {
  return sets.origin.replaceAll("`", "");
}

/** Says of a layer and an expert whether the keep-sets have it. */
function staysIn(sets) {
  const { values, shape } = arrayOf(sets.kept);
  return (layer, expert) => values[layer * shape[1] + expert] === 1;
}

function groupName(group) {
  return group === "" ? "all rows" : group;
}
