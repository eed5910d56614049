// One figure as it is drawn: axes, curves, marks. `Figure` is read and moved, too.

class Drawing {
  // spec: {id, title, unit, series: [{name, label, dots, second}], log, large, plain: not smoothed}
  constructor(spec, page, parent) {
    Object.assign(this, { spec, page, logY: !!spec.log, viewY: null, at: null });
    this.box = element(
      "figure",
      { id: "figure-" + spec.id, class: spec.large ? "large" : "" },
      null,
      parent,
    );
    const caption = element("figcaption", {}, null, this.box);
    element("strong", {}, spec.title, caption);
    this.note = element("span", { class: "quiet" }, "", caption);
    this.logButton = element("button", { type: "button", class: "switch" }, "log y", caption);
    this.logButton.addEventListener("click", () => {
      this.logY = !this.logY;
      this.viewY = null;
      this.draw();
    });
    this.svg = make("svg", { tabindex: 0, role: "img" }, this.box);
    this.tip = element("div", { class: "tip", hidden: "" }, null, this.box);
  }

  // Pixels for a value, and back.
  scale(low, high, from, to, log) {
    const f = log ? Math.log10 : (v) => v,
      a = f(low),
      b = f(high),
      k = (to - from) / (b - a || 1);
    const place = (v) => from + (f(v) - a) * k;
    place.back = (px) => (log ? 10 ** (a + (px - from) / k) : a + (px - from) / k);
    return place;
  }

  visible() {
    const out = [];
    for (const run of this.page.runs) {
      if (!run.shown) continue;
      for (const series of this.spec.series) {
        const curve = run.curves[series.name],
          xs = curve && along(run, curve, this.page.axis);
        if (xs && xs.length) out.push({ run, series, curve, xs });
      }
    }
    return out;
  }

  draw() {
    const { page, spec, svg } = this;
    const width = Math.max(260, this.box.clientWidth),
      height = spec.large ? Math.min(400, Math.max(280, width * 0.42)) : 250;
    const left = 60,
      right = 12,
      top = 22,
      bottom = 38;
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.logButton.setAttribute("aria-pressed", this.logY);
    const view = page.view();
    this.frame = { left, right: width - right, top, bottom: height - bottom, width, height };
    const placeX = (this.placeX = this.scale(view[0], view[1], left, width - right, page.logX));
    this.curves = this.visible();
    let low = Infinity,
      high = -Infinity,
      most = 0,
      thin = false;
    for (const one of this.curves) {
      const { curve, xs } = one;
      one.seen = columns(xs, curve.mean, curve.min, curve.max, view, placeX, this.logY);
      low = Math.min(low, one.seen.low);
      high = Math.max(high, one.seen.high);
      most = Math.max(most, one.seen.most);
      thin = thin || curve.thin;
      if (page.smooth && !one.series.dots && !spec.plain) {
        const values = smoothed(curve, page.smooth);
        one.smooth = columns(xs, values, values, values, view, placeX, this.logY);
      } else one.smooth = null;
    }
    const empty = !(low <= high);
    if (empty) [low, high] = this.logY ? [1, 10] : [0, 1];
    let range = this.viewY || this.padded(low, high);
    const placeY = (this.placeY = this.scale(range[0], range[1], height - bottom, top, this.logY));
    this.note.textContent = [
      spec.unit,
      empty
        ? "nothing to draw here"
        : most > 1 || thin
          ? "line: mean, band: smallest to largest"
          : "every logged value",
    ]
      .filter((text) => text)
      .join("; ");

    make(
      "rect",
      {
        class: "frame",
        x: left,
        y: top,
        width: width - left - right,
        height: height - top - bottom,
      },
      svg,
    );
    this.axes(view, range, placeX, placeY);
    const id = "clip-" + spec.id;
    // A little wider than the frame: dots at its edges are whole.
    make(
      "rect",
      {
        x: left - 5,
        y: top - 2,
        width: width - left - right + 10,
        height: height - top - bottom + 4,
      },
      make("clipPath", { id }, make("defs", {}, svg)),
    );
    const layer = make("g", { "clip-path": `url(#${id})` }, svg);
    this.marks(layer);
    for (const one of this.curves) this.curve(one, layer, placeY);
    this.over = make("g", {}, svg);
    const names = this.curves.map((one) => one.run.name);
    svg.setAttribute(
      "aria-label",
      `${spec.title} over ${AXES[page.axis]}: ${[...new Set(names)].join(", ")}. ` +
        "Arrow keys read values, plus and minus zoom, Escape shows all.",
    );
    this.cross();
  }

  padded(low, high) {
    if (this.logY) {
      const pad = Math.max((high / low) ** 0.05, 1.02);
      return [low / pad, high * pad];
    }
    const pad = (high - low) * 0.06 || Math.abs(high) * 0.05 || 0.5;
    return [low >= 0 && low - pad < 0 ? 0 : low - pad, high + pad];
  }

  axes(view, range, placeX, placeY) {
    const { left, right, top, bottom } = this.frame,
      { page, svg } = this;
    const rows = Math.round((bottom - top) / 42);
    const ys = this.logY
      ? ticksLog(range[0], range[1], rows)
      : ticksLinear(range[0], range[1], rows);
    for (const y of ys) {
      make("line", { class: "gridline", x1: left, x2: right, y1: placeY(y), y2: placeY(y) }, svg);
      make("text", { x: left - 7, y: placeY(y) + 4, "text-anchor": "end" }, svg).textContent =
        short(y);
    }
    const room = Math.max(2, Math.floor((right - left) / 80));
    const xs = page.logX ? ticksLog(view[0], view[1], room) : ticksLinear(view[0], view[1], room);
    for (const x of xs) {
      const px = placeX(x);
      make("line", { class: "gridline", x1: px, x2: px, y1: top, y2: bottom }, svg);
      if (px < left + 8 || px > right - 14) {
        make(
          "text",
          {
            x: px < left + 8 ? left : right,
            y: bottom + 16,
            "text-anchor": px < left + 8 ? "start" : "end",
          },
          svg,
        ).textContent = short(x);
      } else
        make("text", { x: px, y: bottom + 16, "text-anchor": "middle" }, svg).textContent =
          short(x);
    }
    make("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }, svg);
    make(
      "text",
      { x: (left + right) / 2, y: bottom + 32, "text-anchor": "middle" },
      svg,
    ).textContent = AXES[page.axis];
  }

  curve(one, layer, placeY) {
    const { run, series, seen, smooth } = one,
      under = smooth ? " under" : "";
    const line = (columns, extra) => {
      let path = "",
        lone = [];
      columns.points.forEach((point, i) => {
        const x = point.px / point.count,
          y = placeY(point.sum / point.count);
        const begins = point.gap || i === 0,
          next = columns.points[i + 1];
        path += `${begins ? "M" : "L"}${x.toFixed(1)} ${y.toFixed(1)}`;
        // Between two gaps, a line would not be seen.
        if (begins && (!next || next.gap)) lone.push([x, y]);
      });
      if (path)
        make(
          "path",
          {
            d: path,
            class: `curve c${run.colour} d${run.dash}${series.second ? " second" : ""}${extra}`,
          },
          layer,
        );
      if (!series.dots)
        for (const [x, y] of lone)
          make("circle", { cx: x, cy: y, r: 1.6, class: `f${run.colour}${extra}` }, layer);
    };
    // The band of smallest to largest, run by run between gaps.
    if (one.curve.thin || seen.most > 1) {
      let path = "",
        upper = "",
        lower = [];
      const close = () => {
        if (upper) path += upper + lower.reverse().join("") + "Z";
        upper = "";
        lower = [];
      };
      for (const point of seen.points) {
        if (point.gap) close();
        const x = (point.px / point.count).toFixed(1),
          from = placeY(point.max),
          to = Math.max(placeY(point.min), from + 0.5);
        upper += `${upper ? "L" : "M"}${x} ${from.toFixed(1)}`;
        lower.push(`L${x} ${to.toFixed(1)}`);
      }
      close();
      const names = `band f${run.colour} c${run.colour}${under}`;
      if (path) make("path", { d: path, class: names }, layer);
    }
    line(seen, under);
    if (smooth) line(smooth, "");
    if (series.dots) {
      for (const point of seen.points) {
        make(
          "circle",
          {
            cx: point.px / point.count,
            cy: placeY(point.sum / point.count),
            r: 3.4,
            class: `dot f${run.colour}`,
          },
          layer,
        );
      }
    }
  }

  marks(layer) {
    const { page, placeX } = this,
      { left, right, top, bottom } = this.frame;
    this.markPlaces = [];
    if (!page.marks) return;
    const taken = new Set(),
      glyphs = [];
    for (const run of page.runs) {
      if (!run.shown) continue;
      for (const mark of run.marks) {
        const x =
          page.axis === "steps"
            ? mark.step
            : page.axis === "tokens"
              ? mark.tokens
              : run.flops_per_token === null
                ? NaN
                : mark.tokens * run.flops_per_token;
        const px = placeX(x);
        if (!(px >= left - 0.5 && px <= right + 0.5)) continue;
        this.markPlaces.push({ px, run, mark });
        const key = `${Math.round(px / 2)} ${mark.kind} ${run.colour}`;
        if (taken.has(key)) continue; // Hundreds of spikes may fall on one pixel.
        taken.add(key);
        const tall = LINED.includes(mark.kind);
        make(
          "line",
          {
            x1: px,
            x2: px,
            y1: top,
            y2: tall ? bottom : top + 7,
            class: `markline c${run.colour}`,
          },
          layer,
        );
        // A stop and its resume stand at one step: side by side.
        let at = px;
        for (let i = 0; i < 4 && glyphs.some((other) => Math.abs(other - at) < 9); i++) at += 10;
        glyphs.push(at);
        make(
          "text",
          { x: at, y: top - 5, class: "glyph", style: `fill:var(--c${run.colour})` },
          this.svg,
        ).textContent = GLYPHS[mark.kind] || "\u2022";
      }
    }
  }
}
