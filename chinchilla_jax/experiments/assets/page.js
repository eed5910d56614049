// The page: its state, its controls, and what tests and the console may ask of it.

function swatch(run) {
  const node = make("svg", {
    class: "swatch",
    viewBox: "0 0 22 10",
    width: 22,
    height: 10,
    "aria-hidden": "true",
  });
  make("line", { x1: 0, x2: 22, y1: 5, y2: 5, class: `c${run.colour} d${run.dash}` }, node);
  return node;
}

const SPECS = [
  {
    id: "loss",
    title: "Loss",
    unit: "nats per token, dots: validation",
    large: true,
    series: [
      { name: "loss", label: "training" },
      { name: "eval_loss", label: "validation", dots: true },
    ],
  },
  {
    id: "bits",
    title: "Bits per byte",
    unit: "of held-out text",
    series: [{ name: "eval_bits_per_byte", label: "validation", dots: true }],
  },
  {
    id: "rate",
    title: "Learning rate",
    unit: "of each step",
    plain: true,
    series: [{ name: "learning_rate", label: "" }],
  },
  {
    id: "speed",
    title: "Throughput",
    unit: "tokens per second",
    series: [{ name: "tokens_per_second", label: "" }],
  },
  {
    id: "mfu",
    title: "MFU",
    unit: "of the bfloat16 peak, dashes: mfu_causal",
    series: [
      { name: "mfu", label: "mfu" },
      { name: "mfu_causal", label: "mfu_causal", second: true },
    ],
  },
  {
    id: "grad",
    title: "Gradient norm",
    unit: "before clipping",
    log: true,
    series: [{ name: "grad_norm", label: "" }],
  },
  {
    id: "update",
    title: "Update norm",
    unit: "of the change of the float32 weights",
    log: true,
    series: [{ name: "update_norm", label: "" }],
  },
  {
    id: "param",
    title: "Parameter norm",
    unit: "before the update",
    series: [{ name: "param_norm", label: "" }],
  },
];

class Page {
  constructor(data, controls, figures) {
    Object.assign(this, {
      runs: data.runs.map(decodeRun),
      axis: "tokens",
      logX: false,
      smooth: 0,
      marks: true,
      range: null,
      at: null,
      reading: null,
    });
    const specs = SPECS.map((spec) => ({
      ...spec,
      series: spec.series.filter((series) => this.runs.some((run) => run.curves[series.name])),
    })).filter((spec) => spec.series.length);
    if (!specs.some((spec) => spec.series.some((series) => series.second))) {
      for (const spec of specs) spec.unit = spec.unit.replace(/, dashes: .*/, "");
    }
    this.longest = Math.max(
      1,
      ...this.runs.flatMap((run) => Object.values(run.curves).map((c) => c.to[c.to.length - 1])),
    );
    this.controls(controls);
    this.figures = specs.map((spec) => new Figure(spec, this, figures));
    this.draw();
    let width = figures.clientWidth;
    new ResizeObserver(() => {
      if (figures.clientWidth !== width) {
        width = figures.clientWidth;
        this.draw();
      }
    }).observe(figures);
  }

  // Along the axis: what is zoomed to, or all that is shown.
  view() {
    if (this.range) return this.range;
    let low = Infinity,
      high = 0;
    for (const run of this.runs) {
      if (!run.shown) continue;
      for (const curve of Object.values(run.curves)) {
        const xs = along(run, curve, this.axis);
        if (!xs || !xs.length) continue;
        const first = xs[0] > 0 ? xs[0] : xs[indexAt(xs, Number.MIN_VALUE)];
        if (first > 0) low = Math.min(low, first);
        high = Math.max(high, xs[xs.length - 1]);
      }
    }
    if (!high) high = 1;
    if (!(low < high)) low = high / 10;
    return this.logX ? [low, high] : [0, high];
  }

  zoom(from, to) {
    const range = this.range;
    this.range = null;
    const all = this.view();
    const [low, high] = [
      Math.max(all[0], Math.min(from, to)),
      Math.min(all[1], Math.max(from, to)),
    ];
    if (!(high - low > Math.abs(all[1]) * 1e-9)) {
      this.range = range;
      return;
    }
    if (low > all[0] || high < all[1]) this.range = [low, high];
    this.draw();
  }

  reset() {
    this.range = null;
    for (const figure of this.figures) figure.viewY = null;
    this.draw();
  }

  draw() {
    for (const figure of this.figures) figure.draw();
    this.resetButton.disabled = !this.range && !this.figures.some((figure) => figure.viewY);
  }

  read(figure, x, aloud) {
    this.reading = figure;
    this.at = x;
    for (const one of this.figures) one.cross();
    if (aloud && figure) {
      document.getElementById("live").textContent = figure
        .rows(x)
        .map((row) => `${row.run.name} ${row.series.label}, step ${row.step}: ${row.text}`)
        .join("; ");
    }
  }

  set(name, value) {
    if (name === "axis" || name === "logX") this.reset();
    if (name === "axis" && this.axis !== value) this.at = null;
    this[name] = value;
    this.draw();
    this.sync();
  }

  toggle(run, alone) {
    if (alone) {
      const only = this.runs.every((other) => other.shown === (other === run));
      for (const other of this.runs) other.shown = only || other === run;
    } else run.shown = !run.shown;
    this.draw();
    this.sync();
  }

  controls(parent) {
    const bar = element("div", { class: "bar" }, null, parent);
    this.pressed = [];
    const choice = (label, name, options) => {
      const group = element(
        "div",
        { class: "group", role: "group", "aria-label": label },
        null,
        bar,
      );
      element("span", { "aria-hidden": "true" }, label, group);
      for (const [value, text, able] of options) {
        const button = element("button", { type: "button" }, text, group);
        button.disabled = able === false;
        button.addEventListener("click", () => this.set(name, value));
        this.pressed.push(() => button.setAttribute("aria-pressed", this[name] === value));
      }
    };
    choice("axis", "axis", [
      ["tokens", "tokens"],
      ["flops", "FLOPs", this.runs.some((run) => run.flops_per_token !== null)],
      ["steps", "steps"],
    ]);
    choice("scale", "logX", [
      [false, "linear"],
      [true, "log"],
    ]);
    const smoothing = element("div", {}, null, bar);
    element("label", { for: "smooth" }, "smoothing", smoothing);
    const slider = element(
      "input",
      { type: "range", id: "smooth", min: 0, max: 100, value: 0 },
      null,
      smoothing,
    );
    const told = element("output", { for: "smooth" }, "none", smoothing);
    slider.addEventListener("input", () => {
      // From one step to a fifth of the longest run, by even factors.
      const steps = Number(slider.value)
        ? Math.max(1, Math.round((this.longest / 5) ** (slider.value / 100)))
        : 0;
      told.textContent = steps ? `${whole(steps)} step${steps > 1 ? "s" : ""}` : "none";
      this.set("smooth", steps);
    });
    if (this.runs.some((run) => run.marks.length)) {
      const marks = element("button", { type: "button", class: "switch" }, "marks", bar);
      marks.addEventListener("click", () => this.set("marks", !this.marks));
      this.pressed.push(() => marks.setAttribute("aria-pressed", this.marks));
    }
    this.resetButton = element("button", { type: "button" }, "show all", bar);
    this.resetButton.addEventListener("click", () => this.reset());
    if (this.runs.length > 1) {
      const legend = element(
        "div",
        { class: "bar legend", role: "group", "aria-label": "runs" },
        null,
        parent,
      );
      for (const run of this.runs) {
        const button = element(
          "button",
          { type: "button", title: "click: hide or show; double-click: alone" },
          null,
          legend,
        );
        button.append(swatch(run), run.name);
        button.addEventListener("click", (event) => {
          if (event.detail < 2) this.toggle(run);
        });
        button.addEventListener("dblclick", () => {
          this.toggle(run);
          this.toggle(run, true);
        });
        this.pressed.push(() => button.setAttribute("aria-pressed", run.shown));
      }
    }
    parent.hidden = false;
    this.sync();
  }

  sync() {
    for (const press of this.pressed) press();
  }
}

const controls = document.getElementById("controls");
if (controls) {
  const page = new Page(
    JSON.parse(document.getElementById("data").textContent),
    controls,
    document.getElementById("figures"),
  );
  // For tests and for the console: chinchilla.read("loss", 1e6) gives the values at 1M tokens.
  window.chinchilla = {
    page,
    read: (id, x) =>
      page.figures
        .find((figure) => figure.spec.id === id)
        .rows(x)
        .map((row) => ({
          run: row.run.name,
          series: row.series.name,
          step: row.step,
          tokens: row.tokens,
          text: row.text,
        })),
  };
}
