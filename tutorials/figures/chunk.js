// The chunked layer, step by step: which pairs meet when, the states, and what each token's result still lacks.
const { T, C, A, kinds } = data, N = T / C, K = data.S_own[0].length;
const levels = ["--level0", "--level1", "--level2", "--level3"];
const frames = [{ text: "<b>The work to do.</b> 24 tokens; row i, column j is what token i takes of token j. Empty above the diagonal: the forward scan has not met these.", part: 0 }];
const halves = ["<b>1. intra_chunk.</b> The diagonal: each token reads itself, with no gate in between.",
  "<b>1. intra_chunk, half = 1.</b> In every block of two, the later token reads the earlier one. The boundary is between them.",
  "<b>1. intra_chunk, half = 2.</b> In every block of four, the later half reads the earlier half: one factor decays from j to the middle, one from the middle to i.",
  "<b>1. intra_chunk, half = 4.</b> The two halves of each chunk. Now every pair inside a chunk has met once, and chunk 0 is finished."];
halves.forEach((text, level) => frames.push({ text, kind: level + 1, part: level + 1 }));
for (let n = 0; n < N; n++) frames.push({ text: `<b>2. S_own[${n}].</b> What chunk ${n} alone adds to the state at its end: its keys, decayed to the edge, times its values.`, own: n, part: 4 });
for (let n = 0; n < N; n++) frames.push({ text: n === 0 ? "<b>3. S_in[0]</b> is zero: nothing stands before the first chunk."
  : `<b>3. S_in[${n}]</b> = exp(total[${n - 1}]) ⊙ S_in[${n - 1}] + S_own[${n - 1}]: the recurrence, one step a chunk. Rows fade by ${data.decay[n - 1].map((d) => d.toFixed(2)).join(", ")}.`, enters: n, part: 4 });
for (let n = 1; n < N; n++) frames.push({ text: `<b>4. Across chunks.</b> The tokens of chunk ${n} read S_in[${n}], decayed down to each of them: ${n * C} columns at once, through ${K} × ${K} numbers.`, reads: n, part: 4 + n });
frames.push({ text: "<b>Done.</b> Every pair has met exactly once, no exponent was positive, and the result is that of the loop.", part: 3 + N });
frames.forEach((frame, n) => { frame.order = n; });

$("stage").innerHTML = `<style>
  :root { --level0: #16324f; --level1: #1f6fb4; --level2: #5b9bd5; --level3: #a9cdee; --state: #e9a23b; }
  @media (prefers-color-scheme: dark) { :root { --level0: #e3effa; --level1: #a9cdee; --level2: #5b9bd5; --level3: #2f7fc4; } }
  #parts { display: grid; gap: 16px; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); align-items: start; }
  @media (max-width: 640px) { #parts { grid-template-columns: minmax(0, 1fr); } }
  svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
</style><div id="parts">
  <figure><figcaption>the pairs: row i reads column j</figcaption><svg id="matrix" viewBox="0 0 ${T * 10 + 2} ${T * 10 + 2}" role="img" aria-label="matrix of pairs"></svg></figure>
  <div><figure><figcaption>the states, ${K} × ${K}: red positive, blue negative</figcaption><svg id="states" viewBox="0 0 330 190" role="img" aria-label="states"></svg></figure>
  <figure><figcaption>what the result of each token still lacks</figcaption><svg id="missing" viewBox="0 0 330 90" role="img" aria-label="bars of what is missing"></svg></figure></div>
</div>`;

const done = (frame, test) => frames.slice(0, frame.order + 1).some(test);
const largest = Math.max(...A.flat().map(Math.abs));

function cell(frame, i, j) {
  const kind = kinds[i][j], n = Math.floor(i / C);
  if (kind === 0) return ["none", 0];
  const met = kind < 0 ? done(frame, (f) => f.reads === n) : done(frame, (f) => f.kind === kind);
  if (!met) return ["var(--empty)", 1];
  const now = kind < 0 ? frame.reads === n : frame.kind === kind;
  const strength = 0.35 + 0.65 * Math.sqrt(Math.abs(A[i][j]) / largest);
  return [kind < 0 ? "var(--state)" : `var(${levels[kind - 1]})`, now ? 1 : strength];
}

function matrix(frame) {
  let text = "";
  for (let i = 0; i < T; i++) for (let j = 0; j <= i; j++) {
    const [fill, opacity] = cell(frame, i, j);
    text += `<rect x="${1 + 10 * j}" y="${1 + 10 * i}" width="9.2" height="9.2" fill="${fill}" opacity="${opacity.toFixed(2)}"><title>i = ${i}, j = ${j}: A = ${A[i][j].toFixed(3)}</title></rect>`;
  }
  for (let n = 0; n < N; n++) text += `<rect x="${10 * C * n + 0.5}" y="${10 * C * n + 0.5}" width="${10 * C}" height="${10 * C}" fill="none" stroke="var(--muted)"/>`;
  if (frame.own !== undefined) text += `<rect x="${10 * C * frame.own + 1}" y="${10 * C * (frame.own + 1) - 4}" width="${10 * C}" height="5" fill="var(--mark)"/>`;
  $("matrix").innerHTML = text;
}

function tile(values, x, y, known, now, name) {
  const top = Math.max(...data.S_in.flat(2).map(Math.abs), ...data.S_own.flat(2).map(Math.abs)), size = 14;
  let text = `<text x="${x + 2 * size}" y="${y - 5}" text-anchor="middle">${name}</text>`;
  values.forEach((row, r) => row.forEach((value, c) => {
    const fill = !known ? "var(--empty)" : value === 0 ? "var(--page)" : value > 0 ? "#c8362e" : "#2a6fb8";
    text += `<rect x="${x + size * c}" y="${y + size * r}" width="${size - 0.7}" height="${size - 0.7}" fill="${fill}" opacity="${known && value !== 0 ? (0.12 + 0.88 * Math.abs(value) / top).toFixed(2) : 1}"/>`;
  }));
  return text + `<rect x="${x - 1.5}" y="${y - 1.5}" width="${K * size + 2}" height="${K * size + 2}" fill="none" stroke="${now ? "var(--mark)" : "var(--line)"}" stroke-width="${now ? 3 : 1}"/>`;
}

function states(frame) {
  let text = "";
  for (let n = 0; n < N; n++) {
    const x = 25 + 108 * n;
    text += tile(data.S_own[n], x, 116, done(frame, (f) => f.own === n), frame.own === n || frame.enters === n + 1, `S_own[${n}]`);
    text += tile(data.S_in[n], x, 22, done(frame, (f) => f.enters === n), frame.enters === n || frame.reads === n, `S_in[${n}]`);
    if (n < N - 1) text += `<path d="M ${x + 60} 50 h 42 m -6 -4 l 6 4 l -6 4 M ${x + 60} 128 L ${x + 103} 82 m -7 1.5 l 7 -1.5 l -0.5 7" fill="none" stroke="var(--muted)" stroke-width="1.5"/>`;
  }
  $("states").innerHTML = text;
}

function missing(frame) {
  const top = Math.max(...data.missing.flat());
  $("missing").innerHTML = data.missing[frame.part].map((value, t) => {
    const height = 80 * value / top, x = 4 + 13.5 * t;
    return `<rect x="${x}" y="${(84 - height).toFixed(1)}" width="11" height="${height.toFixed(1)}" fill="var(--rev)"><title>token ${t}: ${value.toFixed(3)}</title></rect>`;
  }).join("") + `<line x1="2" x2="328" y1="84.5" y2="84.5" stroke="var(--muted)"/>`;
}

play({
  steps: frames.length,
  milliseconds: 1800,
  where: (step) => `step ${step + 1} of ${frames.length}`,
  caption: (step) => frames[step].text,
  draw: (step) => { matrix(frames[step]); states(frames[step]); missing(frames[step]); },
});
