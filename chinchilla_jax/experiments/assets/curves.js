// Curves: decoding them, smoothing them, and what of them falls on which pixel.
// A value is NaN where none was logged and Infinity where one was not finite.

function bytesOf(base64) {
  const text = atob(base64),
    bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes.buffer;
}

function decodeRun(run) {
  const train = run.train;
  const whole = (to) => ({
    steps: new Uint32Array(bytesOf(train["steps" + to])),
    tokens: new Float64Array(bytesOf(train["tokens" + to])),
  });
  const from = whole(""),
    to = train.thin ? whole("_to") : from;
  const middle = (a, b) => (train.thin ? a.map((value, i) => (value + b[i]) / 2) : a);
  const curves = {};
  for (const [name, parts] of Object.entries(train.series)) {
    const mean = new Float32Array(bytesOf(parts.mean));
    curves[name] = {
      mean,
      thin: train.thin,
      min: train.thin ? new Float32Array(bytesOf(parts.min)) : mean,
      max: train.thin ? new Float32Array(bytesOf(parts.max)) : mean,
      from: from.steps,
      to: to.steps,
      steps: middle(Float64Array.from(from.steps), to.steps),
      tokens: middle(from.tokens, to.tokens),
    };
  }
  for (const [name, found] of Object.entries(run.evals.series)) {
    const mean = Float64Array.from(found, (v) => (v === null ? NaN : v === "inf" ? Infinity : v));
    if (!mean.length || mean.every(Number.isNaN)) continue;
    const steps = Float64Array.from(run.evals.steps);
    curves["eval_" + name] = {
      mean,
      min: mean,
      max: mean,
      thin: false,
      from: steps,
      to: steps,
      steps,
      tokens: Float64Array.from(run.evals.tokens),
    };
  }
  return { ...run, curves, shown: true };
}

// Where a curve lies along the axis: steps, tokens or FLOPs; null if that is not known.
function along(run, curve, axis) {
  if (axis !== "flops") return curve[axis];
  if (run.flops_per_token === null) return null;
  if (!curve.flops) curve.flops = curve.tokens.map((tokens) => tokens * run.flops_per_token);
  return curve.flops;
}

// Exponential moving average over so many steps, corrected for its start. Gaps stay gaps.
function smoothed(curve, steps) {
  if (curve.smoothSteps === steps) return curve.smooth;
  const out = new Float64Array(curve.mean.length);
  let sum = 0,
    weight = 0,
    last = 0;
  for (let i = 0; i < out.length; i++) {
    const value = curve.mean[i];
    const keep = Math.exp(-(curve.to[i] - last) / steps);
    if (!Number.isFinite(value)) {
      out[i] = value;
      continue;
    }
    sum = sum * keep + value * (1 - keep);
    weight = weight * keep + (1 - keep);
    last = curve.to[i];
    out[i] = sum / weight;
  }
  curve.smoothSteps = steps;
  curve.smooth = out;
  return out;
}

// First index whose x is at least `x`.
function indexAt(xs, x) {
  let low = 0,
    high = xs.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle + 1;
    else high = middle;
  }
  return low;
}

// Index of the point nearest to x, by distance on the screen, that has a value (finite or not).
function nearest(xs, values, x, place) {
  let after = indexAt(xs, x),
    before = after - 1;
  while (after < xs.length && Number.isNaN(values[after])) after++;
  while (before >= 0 && Number.isNaN(values[before])) before--;
  if (before < 0) return after < xs.length ? after : -1;
  if (after >= xs.length) return before;
  return Math.abs(place(xs[before]) - place(x)) <= Math.abs(place(xs[after]) - place(x))
    ? before
    : after;
}

// What is seen of a curve between two x: its range of y, and points by pixel column.
// `most` is how many points share a column at most; 1 means that every point is drawn.
function columns(xs, mean, min, max, view, place, positive) {
  const first = Math.max(0, indexAt(xs, view[0]) - 1);
  const last = Math.min(xs.length, indexAt(xs, view[1]) + 2);
  const out = [];
  let open = null,
    gap = false,
    low = Infinity,
    high = -Infinity,
    most = 0;
  const usable = (v) => Number.isFinite(v) && (!positive || v > 0);
  for (let i = first; i < last; i++) {
    if (Number.isNaN(mean[i])) continue;
    if (!usable(mean[i])) {
      gap = true;
      continue;
    }
    const inside = xs[i] >= view[0] && xs[i] <= view[1];
    const bottom = positive && !(min[i] > 0) ? mean[i] : min[i];
    if (inside) {
      low = Math.min(low, bottom);
      high = Math.max(high, max[i]);
    }
    const px = place(xs[i]),
      column = Math.floor(px);
    if (!open || open.column !== column || gap) {
      open = { column, px: 0, sum: 0, count: 0, min: bottom, max: max[i], gap };
      out.push(open);
      gap = false;
    }
    open.px += px;
    open.sum += mean[i];
    open.count++;
    open.min = Math.min(open.min, bottom);
    open.max = Math.max(open.max, max[i]);
    most = Math.max(most, open.count);
  }
  return { points: out, low, high, most };
}
