// Small things that figures are made of: nodes, numbers as text, ticks.

const SVG = "http://www.w3.org/2000/svg";
const GLYPHS = {
  resume: "\u25b6\ufe0e",
  stop: "\u25a0",
  rollback: "\u25c0\ufe0e",
  spike: "\u25b2",
  nonfinite: "\u2715",
  "save failed": "!",
  "checkpoint set aside": "\u25bd",
  failed: "\u25cf",
};
const LINED = ["resume", "stop", "rollback", "failed"];
const AXES = { tokens: "tokens", flops: "FLOPs (6ND)", steps: "steps" };

function make(name, attributes, parent) {
  const node = document.createElementNS(SVG, name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (parent) parent.appendChild(node);
  return node;
}

function element(name, attributes, text, parent) {
  const node = document.createElement(name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (text !== undefined && text !== null) node.textContent = text;
  if (parent) parent.appendChild(node);
  return node;
}

const SUPERS = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079";
const raised = (n) =>
  String(n)
    .replace(/-/, "\u207b")
    .replace(/\d/g, (d) => SUPERS[d]);

// 1.5M, 0.003, 2 x 10^-5: short, for axes.
function short(value, digits = 4) {
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e15 || size < 1e-4) {
    const power = Math.floor(Math.log10(size) + 1e-9);
    const head = Number((value / 10 ** power).toPrecision(digits));
    return (head === 1 ? "" : head + "\u00d7") + "10" + raised(power);
  }
  for (const [unit, name] of [
    [1e12, "T"],
    [1e9, "B"],
    [1e6, "M"],
    [1e3, "k"],
  ]) {
    if (size >= unit) return Number((value / unit).toPrecision(digits)) + name;
  }
  return String(Number(value.toPrecision(digits)));
}

// As many digits as float32 holds.
function exact(value) {
  if (Number.isNaN(value)) return "\u2013";
  if (!Number.isFinite(value)) return "not finite";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-4 || size >= 1e7)) return value.toExponential(5);
  return Number(value.toPrecision(7)).toLocaleString("en", { maximumFractionDigits: 7 });
}

const whole = (value) => Math.round(value).toLocaleString("en");

function ticksLinear(low, high, count) {
  const raw = (high - low) / Math.max(1, count),
    power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].find((s) => s * power >= raw * 0.75) * power;
  const out = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++)
    out.push(i * step);
  return out;
}

function ticksLog(low, high, count) {
  const from = Math.floor(Math.log10(low)),
    to = Math.ceil(Math.log10(high)),
    span = Math.log10(high / low);
  if (span < 0.6) return ticksLinear(low, high, count).filter((v) => v > 0);
  const heads = span > 3 ? [1] : span > 1.5 ? [1, 3] : [1, 2, 3, 5, 7];
  const every = Math.max(1, Math.ceil(span / count)),
    out = [];
  for (let p = from; p <= to; p++) {
    if (p % every) continue;
    for (const head of heads) {
      const value = head * 10 ** p;
      if (value >= low * 0.999 && value <= high * 1.001) out.push(value);
    }
  }
  return out;
}
