// Two scans over an image: what each state still holds of every patch, when the scans meet at patch t.
const grid = data.grid, T = grid * grid, side = data.side;
const weights = Object.fromEntries(Object.entries(data.weights).map(([name, text]) => [name, bytes(text)]));
const photograph = document.createElement("canvas");
photograph.width = photograph.height = grid * side;
{
  const rgb = bytes(data.photograph), context = photograph.getContext("2d");
  const image = context.createImageData(grid * side, grid * side);
  for (let i = 0; i < rgb.length / 3; i++) image.data.set([rgb[3 * i], rgb[3 * i + 1], rgb[3 * i + 2], 255], 4 * i);
  context.putImageData(image, 0, 0);
}

const panels = { photo: "the image", fwd: "S<sub>fwd</sub>[t] holds", rev: "S<sub>rev</sub>[t] holds", both: "o[t]: the mean" };
$("stage").innerHTML = `<style>
  #panels { display: grid; gap: 10px; grid-template-columns: repeat(4, 1fr); }
  @media (max-width: 640px) { #panels { grid-template-columns: 1fr 1fr; } }
  #norms { margin-top: 14px; }
</style><div id="panels">` + Object.entries(panels).map(([id, title]) =>
  `<figure><figcaption style="color: var(--${id === "photo" ? "ink" : id})">${title}</figcaption><canvas id="${id}" width="448" height="448"></canvas></figure>`).join("") +
  `</div><figure id="norms"><figcaption>size of the state, |S|, when a scan has read patch t:
   <span style="color: var(--fwd)">fwd, from the left</span>, <span style="color: var(--rev)">rev, from the right</span></figcaption>
   <svg id="chart" viewBox="0 0 800 110" role="img" aria-label="norm of both states over t"></svg></figure>`;

const chooser = document.createElement("label");
chooser.innerHTML = `gate: <select id="gate">${Object.keys(weights).map((name) => `<option>${name}</option>`).join("")}</select>`;
$("controls").append(chooser);

function paint(id, t, weight) {
  const context = $(id).getContext("2d"), size = 448 / grid;
  context.globalAlpha = 1;
  context.fillStyle = colour("empty");
  context.fillRect(0, 0, 448, 448);
  for (let j = 0; j < T; j++) {
    const x = j % grid, y = Math.floor(j / grid);
    context.globalAlpha = weight(j);
    if (context.globalAlpha > 0 && weight(j) > 0) context.drawImage(photograph, x * side, y * side, side, side, x * size, y * size, size, size);
  }
  context.globalAlpha = 1;
  const x = (t % grid) * size, y = Math.floor(t / grid) * size;
  for (const [stroke, width] of [["white", 7], ["black", 3]]) {
    context.strokeStyle = stroke; context.lineWidth = width;
    context.strokeRect(x + 1, y + 1, size - 2, size - 2);
  }
}

function draw(t) {
  const w = weights[$("gate").value], at = (j) => w[t * T + j] / 255;
  paint("photo", t, () => 1);
  paint("fwd", t, (j) => (j <= t ? at(j) : 0));
  paint("rev", t, (j) => (j >= t ? at(j) : 0));
  paint("both", t, (j) => (j === t ? 1 : at(j) / 2));
  const norms = data.norms[$("gate").value], top = Math.max(...norms.fwd, ...norms.rev);
  const line = (values) => values.map((n, i) => `${(10 + 780 * i / (T - 1)).toFixed(1)},${(104 - 96 * n / top).toFixed(1)}`).join(" ");
  const x = 10 + 780 * t / (T - 1);
  $("chart").innerHTML = `<line x1="10" x2="790" y1="104" y2="104" stroke="var(--line)"/><line x1="${x}" x2="${x}" y1="4" y2="104" stroke="var(--muted)"/>` +
    ["fwd", "rev"].map((way) => `<polyline points="${line(norms[way])}" fill="none" stroke="var(--${way})" stroke-width="2"/>
      <circle cx="${x}" cy="${104 - 96 * norms[way][t] / top}" r="4" fill="var(--${way})"/>`).join("");
}

const player = play({
  steps: T,
  milliseconds: 90,
  where: (t) => `patch ${t} of ${T}`,
  caption: (t) => {
    const norms = data.norms[$("gate").value];
    return `The forward scan has read patches 0 to ${t}, |S<sub>fwd</sub>| = ${norms.fwd[t].toFixed(1)}; the reverse scan has read patches
      ${T - 1} to ${t}, |S<sub>rev</sub>| = ${norms.rev[t].toFixed(1)}. Token ${t} reads the mean: itself with weight 1, all others with half of what is left of them.`;
  },
  draw,
});
$("gate").addEventListener("change", player.again);
