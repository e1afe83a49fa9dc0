"use strict";
// Draws a figure of curves again: other kind of axis, or a part of it. The first drawing came along.
const charts = (() => {
  const show = (v) => {
    const a = Math.abs(v);
    if (a !== 0 && (a < 1e-3 || a >= 1e6)) return v.toExponential(2).replace(".00e", "e");
    return Number.isInteger(v) ? v.toLocaleString("en") : String(+v.toPrecision(4));
  };
  const node = (parent, name, attributes, text) => {
    const made = parent.ownerSVGElement ? document.createElementNS(parent.namespaceURI, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
  };
  const step = (low, high, n) => {
    const rough = Math.max((high - low) / n, Number.MIN_VALUE), power = 10 ** Math.floor(Math.log10(rough));
    return (rough / power <= 1 ? 1 : rough / power <= 2 ? 2 : rough / power <= 5 ? 5 : 10) * power;
  };
  const round = (low, high, n) => {
    const by = step(low, high, n), all = [];
    for (let i = Math.ceil(low / by - 1e-9); i * by <= high + by * 1e-9 && all.length < 20; i++) all.push(+(i * by).toPrecision(9));
    return all;
  };
  const ticks = (axis, n) => {
    if (!axis.log) return round(axis.low, axis.high, n);
    const from = Math.log10(axis.low), to = Math.log10(axis.high), span = to - from;
    if (span < 0.7) return round(axis.low, axis.high, n);
    const every = Math.max(1, Math.ceil(span / 8)), all = [];
    for (let d = Math.floor(from); d <= Math.ceil(to); d++) {
      if (d % every) continue;
      for (const f of span < 2.5 ? [1, 2, 5] : [1]) all.push(f * 10 ** d);
    }
    return all.filter((v) => v >= axis.low && v <= axis.high);
  };
  const place = (axis, value) => {
    const f = axis.log ? Math.log : (v) => v;
    return axis.from + (f(value) - f(axis.low)) / (f(axis.high) - f(axis.low)) * (axis.to - axis.from);
  };
  // Where a curve crosses x, if it does.
  const crossing = (points, x) => {
    const i = points.findIndex((p) => p[0] >= x);
    if (i < 1) return [];
    const [a, b] = [points[i - 1], points[i]];
    return [a[1] + (b[1] - a[1]) * (x - a[0]) / (b[0] - a[0])];
  };
  // Axes of what is seen now.
  const axes = (chart) => {
    const { d, box: [left, right, top, bottom] } = chart, [x0, x1] = chart.range ?? d.xs;
    const log = chart.log && !!d.log;
    let [low, high] = log ? d.log : d.lin;
    if (chart.range && !d.fixed) {
      const seen = d.s.flatMap((s) => [...crossing(s.p, x0), ...crossing(s.p, x1),
        ...s.p.filter((p) => p[0] >= x0 && p[0] <= x1).map((p) => p[1])]);
      if (seen.length) {
        low = Math.min(...seen);
        high = Math.max(...seen);
        if (log) {
          const pad = Math.max(1.02, (high / low) ** 0.06);
          low /= pad;
          high *= pad;
        } else {
          const pad = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
          low -= pad;
          high += pad;
        }
      }
    }
    return { x: { low: x0, high: x1, from: left, to: right }, y: { low, high, from: bottom, to: top, log } };
  };
  const draw = (chart) => {
    const { d, plot, box: [left, right, top, bottom] } = chart, { x, y } = chart.axes = axes(chart);
    plot.replaceChildren();
    for (const tick of ticks(y, 5)) {
      const at = place(y, tick).toFixed(1);
      node(plot, "path", { class: "grid", d: `M${left} ${at}H${right}` });
      node(plot, "text", { class: "y", x: left - 6, y: +at + 3.5 }, show(tick));
    }
    node(plot, "path", { class: "axis", d: `M${left} ${bottom}H${right}` });
    if (d.places.length) {
      const every = Math.ceil(d.places.length / 9);
      d.places.forEach((name, i) => {
        if (i % every === 0 && i >= x.low && i <= x.high)
          node(plot, "text", { class: "x", x: place(x, i), y: bottom + 16 }, [...name].slice(0, 14).join(""));
      });
    } else {
      for (const tick of ticks(x, 6)) {
        const at = place(x, tick).toFixed(1);
        node(plot, "path", { class: "axis", d: `M${at} ${bottom}v4` });
        node(plot, "text", { class: "x", x: at, y: bottom + 16 }, show(tick));
      }
    }
    // What is left of a curve beside the part that is shown is cut off.
    const size = { x: left, y: top, width: right - left, height: bottom - top };
    const inner = node(plot, "svg", { ...size, viewBox: Object.values(size).join(" "), overflow: chart.range ? "hidden" : "visible" });
    for (const s of d.s) {
      const first = Math.max(0, s.p.findIndex((p) => p[0] >= x.low) - 1);
      let last = s.p.findIndex((p) => p[0] > x.high);
      last = last < 0 ? s.p.length : last + 1;
      const points = s.p.slice(first, last).filter((p) => !y.log || p[1] > 0);
      if (points.length > 1)
        node(inner, "path", { class: "curve", style: s.i,
          d: points.map((p, i) => (i ? "L" : "M") + place(x, p[0]).toFixed(1) + " " + place(y, p[1]).toFixed(1)).join("") });
      const inside = points.filter((p) => p[0] >= x.low && p[0] <= x.high);
      if (inside.length <= 12)
        for (const p of inside) node(inner, "circle", { cx: place(x, p[0]).toFixed(1), cy: place(y, p[1]).toFixed(1), r: 3, style: s.i });
    }
    chart.reset.hidden = !chart.range;
  };
  const all = [];
  for (const figure of document.querySelectorAll("figure.chart")) {
    const source = figure.querySelector("script[type='application/json']");
    if (!source) continue;
    const d = JSON.parse(source.textContent), svg = figure.querySelector("svg");
    const chart = { figure, d, svg, box: d.box, log: figure.classList.contains("islog"), range: null,
      plot: svg.querySelector(".plot"), cross: svg.querySelector(".cross"), reset: figure.querySelector(".reset") };
    chart.axes = axes(chart);
    chart.draw = () => {
      figure.classList.toggle("islog", chart.log);
      draw(chart);
    };
    all.push(chart);
  }
  return { all, show, node, place };
})();
