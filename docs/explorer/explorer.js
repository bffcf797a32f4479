// The page explorer.md: which patches a token reads, forward, reverse and merged. Every number comes from data.js, which
// precompute.py wrote; here they are only looked up, added and painted.
"use strict";

const GRID = EXPLORER.grid;
const T = GRID * GRID;
const MAPS = ["fwd", "rev", "both"];
const COLOURS = { positive: "213, 94, 0", negative: "0, 114, 178" };
const PIXELS = 32; // of a patch, on a canvas

const state = { token: 5 * GRID + 6, setting: 5 };
const element = (id) => document.getElementById(id);

/** Row `token` of A_fwd, A_rev and their sum, each `[T]`, from the bytes and the row's scale. */
function rows({ token, setting }) {
  const { bytes, scale } = decoded(setting);
  const both = Float64Array.from(bytes.subarray(token * T, (token + 1) * T), (byte) => byte * scale[token]);
  const part = (met, j) => (j === token ? both[j] / 2 : met ? both[j] : 0);
  return { fwd: both.map((_, j) => part(j < token, j)), rev: both.map((_, j) => part(j > token, j)), both };
}

function decoded(setting) {
  const { weights, scale, totals } = EXPLORER.settings[setting];
  const buffer = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer;
  const [bytes, floats] = [new Int8Array(buffer(weights)), (text) => new Float32Array(buffer(text))];
  return { bytes, scale: floats(scale), totals: floats(totals) };
}

const place = (token) => `row ${Math.floor(token / GRID)}, column ${token % GRID}`;
const signed = (x) => `${x < 0 ? "−" : ""}${Math.abs(x).toFixed(2)}`;

/** The sums of magnitudes over the other tokens, of each map. */
function sums({ token, setting }) {
  const { totals } = decoded(setting);
  const [fwd, rev] = [totals[token], totals[T + token]];
  return { fwd, rev, both: fwd + rev };
}

/** The other token with the largest weight. */
function summary(map, token) {
  const others = [...map.keys()].filter((j) => j !== token);
  const strongest = others.reduce((best, j) => (Math.abs(map[j]) > Math.abs(map[best]) ? j : best), others[0]);
  return { strongest, weight: map[strongest] };
}

function paint(canvas, map, most) {
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  if (map) {
    map.forEach((weight, j) => {
      const strength = Math.min(1, Math.abs(weight) / most);
      context.fillStyle = `rgba(${weight < 0 ? COLOURS.negative : COLOURS.positive}, ${(0.95 * strength).toFixed(3)})`;
      context.fillRect((j % GRID) * PIXELS, Math.floor(j / GRID) * PIXELS, PIXELS, PIXELS);
    });
  }
  const [x, y] = [(state.token % GRID) * PIXELS, Math.floor(state.token / GRID) * PIXELS];
  for (const [colour, width] of [["#000", 7], ["#fff", 3]]) {
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.strokeRect(x, y, PIXELS, PIXELS);
  }
}

function describeGate() {
  const { tau, mean_alpha: alpha } = EXPLORER.settings[state.setting];
  const life = Math.log(0.5) / Math.log(alpha);
  const told = {
    0: "every gate is 0: a scan forgets all that it met before",
    "∞": "every gate is 1: nothing is forgotten, which is plain linear attention",
  };
  const kept = `a gate keeps ${(100 * alpha).toFixed(1)} % of the state on average, so half of it is left after about ` +
    `${life < 10 ? life.toFixed(1) : life.toFixed(0)} tokens`;
  element("explorer-gate").textContent = `τ = ${tau}${tau === "16" ? ", as in ViG" : ""}: ${told[tau] ?? kept}.`;
  element("explorer-tau").setAttribute("aria-valuetext", `tau ${tau}`);
}

function update() {
  const { token } = state;
  const [maps, totals] = [rows(state), sums(state)];
  const most = Math.max(...maps.both.map((weight, j) => (j === token ? 0 : Math.abs(weight)))) || 1;
  paint(element("explorer-photo"), null, 1);
  element("explorer-token").textContent =
    `Token ${token}: ${place(token)}. It reads itself with weight ${signed(maps.both[token])}.`;
  for (const name of MAPS) {
    paint(element(`explorer-${name}`), maps[name], most);
    const { strongest, weight } = summary(maps[name], token);
    const cells = weight === 0 ? ["0.00", "none", "0.00"] : [totals[name].toFixed(2), place(strongest), signed(weight)];
    [...element(`explorer-row-${name}`).querySelectorAll("td")].forEach((cell, n) => (cell.textContent = cells[n]));
  }
  describeGate();
}

/** The token under a pointer: canvases are shown at any size. */
function tokenAt(canvas, event) {
  const { left, top, width, height } = canvas.getBoundingClientRect();
  const cell = (x, length) => Math.max(0, Math.min(GRID - 1, Math.floor((GRID * x) / length)));
  return cell(event.clientY - top, height) * GRID + cell(event.clientX - left, width);
}

function moveBy(rows, columns) {
  const row = Math.floor(state.token / GRID) + rows;
  const column = (state.token % GRID) + columns;
  if (row >= 0 && row < GRID && column >= 0 && column < GRID) state.token = row * GRID + column;
  update();
}

const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

for (const name of ["photo", ...MAPS]) {
  const canvas = element(`explorer-${name}`);
  canvas.width = canvas.height = GRID * PIXELS;
  canvas.addEventListener("click", (event) => {
    state.token = tokenAt(canvas, event);
    update();
  });
}
element("explorer-photo").addEventListener("keydown", (event) => {
  if (event.key in ARROWS) {
    event.preventDefault();
    moveBy(...ARROWS[event.key]);
  }
});
element("explorer-tau").max = EXPLORER.settings.length - 1;
element("explorer-tau").value = state.setting;
element("explorer-tau").addEventListener("input", (event) => {
  state.setting = Number(event.target.value);
  update();
});
update();
