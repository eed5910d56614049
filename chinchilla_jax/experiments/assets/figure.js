// One figure that is read and zoomed by pointer and by keyboard.

class Figure extends Drawing {
  constructor(spec, page, parent) {
    super(spec, page, parent);
    this.listen();
  }

  // What is to be read at x: one row for each curve.
  rows(x) {
    const px = this.placeX(x);
    return this.curves
      .map(({ run, series, curve, xs }) => {
        const i = nearest(xs, curve.mean, x, this.placeX);
        if (i < 0) return null;
        const row = {
          run,
          series,
          x: xs[i],
          step:
            curve.thin && curve.to[i] > curve.from[i]
              ? `${whole(curve.from[i])}\u2013${whole(curve.to[i])}`
              : whole(curve.from[i]),
          tokens: curve.tokens[i],
          value: curve.mean[i],
          far: px < this.placeX(xs[0]) - 4 || px > this.placeX(xs[xs.length - 1]) + 4,
          text: exact(curve.mean[i]),
        };
        if (curve.thin)
          row.text = `${exact(curve.mean[i])} [${exact(curve.min[i])} to ${exact(curve.max[i])}]`;
        if (this.page.smooth && !series.dots && !this.spec.plain)
          row.smooth = exact(smoothed(curve, this.page.smooth)[i]);
        return row;
      })
      .filter((row) => row);
  }

  cross() {
    if (!this.over) return;
    this.over.replaceChildren();
    const { page } = this,
      { left, right, top, bottom } = this.frame;
    const x = page.at;
    const px = x === null ? NaN : this.placeX(x);
    if (!(px >= left - 0.5 && px <= right + 0.5)) {
      this.tip.hidden = true;
      return;
    }
    make("line", { class: "cross", x1: px, x2: px, y1: top, y2: bottom }, this.over);
    if (page.reading !== this) {
      this.tip.hidden = true;
      return;
    }
    const rows = this.rows(x);
    for (const row of rows) {
      const y = this.placeY(row.value);
      if (y >= top - 1 && y <= bottom + 1 && Math.abs(this.placeX(row.x) - px) < right - left) {
        make(
          "circle",
          { cx: this.placeX(row.x), cy: y, r: 4, class: `dot f${row.run.colour}` },
          this.over,
        );
      }
    }
    this.showTip(px, rows);
  }

  showTip(px, rows) {
    const { tip, page, spec } = this;
    tip.replaceChildren();
    const table = element("table", {}, null, tip),
      head = element("tr", {}, null, table);
    const heads = ["", "step", "tokens", spec.heading || "value"];
    if (page.smooth && rows.some((row) => row.smooth)) heads.push("smoothed");
    for (const text of heads) element("th", {}, text, head);
    const several = new Set(rows.map((row) => row.series.name)).size > 1;
    for (const row of rows) {
      // Where a curve has ended, or not begun, its nearest value is dimmed.
      const line = element("tr", row.far ? { class: "far" } : {}, null, table),
        cell = element("td", {}, null, line);
      cell.appendChild(swatch(row.run));
      cell.append(row.run.name + (several ? ", " + row.series.label : ""));
      element("td", {}, row.step, line);
      element("td", {}, short(row.tokens, 5), line);
      element("td", {}, row.text, line);
      if (heads.length > 4) element("td", {}, row.smooth || "", line);
    }
    const close = this.markPlaces.filter((mark) => Math.abs(mark.px - px) <= 6);
    for (const { run, mark } of close.slice(0, 4)) {
      element(
        "p",
        {},
        `${GLYPHS[mark.kind] || "\u2022"} ${run.name}, step ${whole(mark.step)}: ${mark.kind}` +
          (mark.text ? `: ${mark.text}` : "") +
          (mark.time ? ` (${mark.time})` : ""),
        tip,
      );
    }
    if (close.length > 4) element("p", {}, `and ${close.length - 4} more marks here`, tip);
    tip.hidden = false;
    // Beside the crosshair; under the figure where neither side has room. The viewBox may be
    // scaled.
    const box = this.svg.getBoundingClientRect(),
      k = box.width / this.frame.width || 1;
    const room = this.box.clientWidth,
      own = tip.offsetWidth,
      at = px * k;
    const left = at + 16 + own < room ? at + 16 : at - 16 - own > 0 ? at - 16 - own : null;
    const top = box.top - this.box.getBoundingClientRect().top;
    tip.style.left = `${left === null ? Math.max(0, (room - own) / 2) : left}px`;
    const down = left === null ? this.frame.height * k + 2 : (this.frame.top + 8) * k;
    tip.style.top = `${top + down}px`;
  }

  point(event) {
    const box = this.svg.getBoundingClientRect(),
      k = this.frame.width / box.width;
    return [(event.clientX - box.left) * k, (event.clientY - box.top) * k];
  }

  listen() {
    const { svg, page } = this;
    const inside = (px) => Math.min(this.frame.right, Math.max(this.frame.left, px));
    let from = null,
      rect = null;
    svg.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || event.pointerType === "touch") return;
      from = this.point(event);
      svg.setPointerCapture(event.pointerId);
    });
    svg.addEventListener("pointermove", (event) => {
      const [px, py] = this.point(event);
      page.read(this, this.placeX.back(inside(px)));
      if (!from || Math.abs(px - from[0]) < 4) return;
      const tall = Math.abs(py - from[1]) > 24,
        { top, bottom } = this.frame;
      rect = rect && rect.isConnected ? rect : make("rect", { class: "drag" }, this.over);
      const [a, b] = [inside(from[0]), inside(px)].sort((p, q) => p - q);
      const [c, d] = tall ? [from[1], py].sort((p, q) => p - q) : [top, bottom];
      for (const [key, value] of [
        ["x", a],
        ["y", Math.max(top, c)],
        ["width", b - a],
        ["height", Math.max(0, Math.min(bottom, d) - Math.max(top, c))],
      ])
        rect.setAttribute(key, value);
    });
    svg.addEventListener("pointerup", (event) => {
      const start = from;
      from = null;
      if (rect) rect.remove();
      rect = null;
      if (!start) {
        if (event.pointerType === "touch")
          page.read(this, this.placeX.back(inside(this.point(event)[0])));
        return;
      }
      const [px, py] = this.point(event),
        [a, b] = [inside(start[0]), inside(px)].sort((p, q) => p - q);
      if (b - a < 6) return;
      if (Math.abs(py - start[1]) > 24) {
        const { top, bottom } = this.frame,
          clamp = (v) => Math.min(bottom, Math.max(top, v));
        this.viewY = [
          this.placeY.back(clamp(Math.max(start[1], py))),
          this.placeY.back(clamp(Math.min(start[1], py))),
        ];
      }
      page.zoom(this.placeX.back(a), this.placeX.back(b));
    });
    svg.addEventListener("pointercancel", () => {
      from = null;
      if (rect) rect.remove();
      rect = null;
    });
    svg.addEventListener("pointerleave", () => {
      if (!from) page.read(null, null);
    });
    svg.addEventListener("dblclick", () => page.reset());
    svg.addEventListener("blur", () => page.read(null, null));
    svg.addEventListener("keydown", (event) => this.key(event));
  }

  key(event) {
    const { page } = this,
      view = page.view(),
      { left, right } = this.frame;
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const middle = this.placeX.back((left + right) / 2),
      at = page.reading === this && page.at !== null ? page.at : null;
    const around = (factor) => {
      const px = this.placeX(at === null ? middle : at);
      page.zoom(
        this.placeX.back(px + (left - px) * factor),
        this.placeX.back(px + (right - px) * factor),
      );
    };
    switch (event.key) {
      case "ArrowLeft":
      case "ArrowRight": {
        // From point to point of the curve that has most of them, or pixel by pixel where they
        // are closer.
        const px = at === null ? (left + right) / 2 : this.placeX(at);
        const sign = event.key === "ArrowLeft" ? -1 : 1,
          by = sign * (event.shiftKey ? 10 : 1);
        const xs = this.curves.reduce(
          (best, one) => (one.xs.length > best.length ? one.xs : best),
          [],
        );
        const i =
          at === null || !xs.length
            ? -1
            : Math.min(xs.length - 1, Math.max(0, indexAt(xs, at * (1 - 1e-12)) + by));
        const pixel = this.placeX.back(Math.min(right, Math.max(left, px + by)));
        const next = i < 0 || Math.abs(this.placeX(xs[i]) - px) < Math.abs(by) ? pixel : xs[i];
        page.read(this, Math.min(view[1], Math.max(view[0], next)), true);
        break;
      }
      case "Home":
        page.read(this, view[0], true);
        break;
      case "End":
        page.read(this, view[1], true);
        break;
      case "+":
      case "=":
        around(0.5);
        break;
      case "-":
        around(2);
        break;
      case "0":
      case "Escape":
        page.reset();
        break;
      default:
        return;
    }
    event.preventDefault();
  }
}
