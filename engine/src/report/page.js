(() => {
  const { show, node, place } = charts;
  const tip = document.getElementById("tip-box");
  const put = (event) => {
    tip.style.display = "block";
    const w = tip.offsetWidth, h = tip.offsetHeight;
    let x = event.clientX + 14, y = event.clientY + 14;
    if (x + w > innerWidth - 8) x = event.clientX - w - 14;
    if (y + h > innerHeight - 8) y = event.clientY - h - 14;
    tip.style.left = Math.max(4, x) + "px";
    tip.style.top = Math.max(4, y) + "px";
  };
  const hide = () => tip.style.display = "none";
  const say = (title, rows) => {
    tip.replaceChildren();
    node(tip, "div", { class: "at" }, title);
    for (const { style, name, value, near } of rows) {
      const row = node(tip, "div", { style: style ?? "", class: near ? "near" : "" });
      node(row, "i", {});
      node(row, "span", {}, name);
      node(row, "b", {}, value);
    }
  };
  const nearest = (points, x) => {
    let low = 0, high = points.length - 1;
    while (high - low > 1) {
      const mid = (low + high) >> 1;
      if (points[mid][0] < x) low = mid; else high = mid;
    }
    return Math.abs(points[low][0] - x) <= Math.abs(points[high][0] - x) ? points[low] : points[high];
  };
  for (const chart of charts.all) {
    const { figure, d, svg, cross } = chart, [left, right] = chart.box;
    const button = figure.querySelector("button.scale"), sel = svg.querySelector(".sel");
    if (button) {
      const tell = () => button.setAttribute("aria-label", "vertical axis: " + (chart.log ? "logarithmic" : "linear"));
      tell();
      button.addEventListener("click", () => {
        chart.log = !chart.log;
        chart.draw();
        tell();
      });
    }
    const whole = () => {
      chart.range = null;
      chart.draw();
    };
    chart.reset.addEventListener("click", whole);
    svg.addEventListener("dblclick", whole);
    const across = (event) => {
      const box = svg.getBoundingClientRect();
      return Math.min(Math.max((event.clientX - box.left) * svg.viewBox.baseVal.width / box.width, left), right);
    };
    const value = (at) => {
      const { low, high } = chart.axes.x;
      return low + (at - left) / (right - left) * (high - low);
    };
    let from = null;
    svg.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || d.places.length) return;
      from = across(event);
      svg.setPointerCapture(event.pointerId);
    });
    const end = () => {
      from = null;
      sel.setAttribute("width", 0);
    };
    svg.addEventListener("pointerup", (event) => {
      if (from !== null && Math.abs(across(event) - from) > 8) {
        chart.range = [value(Math.min(from, across(event))), value(Math.max(from, across(event)))];
        chart.draw();
      }
      end();
    });
    svg.addEventListener("pointercancel", end);
    const point = (event) => {
      const to = across(event), x = value(to);
      if (from !== null) {
        sel.setAttribute("x", Math.min(from, to));
        sel.setAttribute("width", Math.abs(to - from));
      }
      const box = svg.getBoundingClientRect();
      const py = (event.clientY - box.top) * svg.viewBox.baseVal.height / box.height;
      const { x: ax, y: ay } = chart.axes;
      const seen = (p) => p[0] >= ax.low && p[0] <= ax.high && (!ay.log || p[1] > 0);
      let rows = d.s.map((s) => ({ s, p: s.p.filter(seen) })).filter((row) => row.p.length)
        .map(({ s, p }) => ({ s, p: nearest(p, x) }));
      if (!rows.length) return;
      for (const row of rows) row.off = Math.abs(place(ay, row.p[1]) - py);
      const at = rows.reduce((a, b) => Math.abs(b.p[0] - x) < Math.abs(a.p[0] - x) ? b : a).p[0];
      const closest = rows.reduce((a, b) => b.off < a.off ? b : a);
      if (rows.length > 10) rows = rows.sort((a, b) => a.off - b.off).slice(0, 10);
      rows.sort((a, b) => b.p[1] - a.p[1]);
      say(d.places.length ? (d.places[at] ?? "") + " " + d.x : d.x + " " + show(at), rows.map(({ s, p }) =>
        ({ style: s.i, name: s.n, value: show(p[1]), near: s === closest.s && d.s.length > 1 })));
      cross.setAttribute("x1", place(ax, at));
      cross.setAttribute("x2", place(ax, at));
      put(event);
    };
    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerleave", () => {
      hide();
      cross.setAttribute("x1", -9);
      cross.setAttribute("x2", -9);
    });
  }
  for (const figure of document.querySelectorAll("figure.pictures")) {
    let rows = null;
    const read = () => {
      const d = JSON.parse(figure.querySelector("script").textContent);
      return rows = [d.t, d.s].map((side) => side.map((row) => row.split(" ")));
    };
    for (const svg of figure.querySelectorAll("svg.mx")) {
      svg.addEventListener("pointermove", (event) => {
        const [t, s] = rows ?? read(), box = svg.getBoundingClientRect(), n = t.length;
        const cell = (at, size) => Math.min(n - 1, Math.max(0, Math.floor(at / size * n)));
        const l = cell(event.clientY - box.top, box.height), k = cell(event.clientX - box.left, box.width);
        if (k > l) return hide();
        say(`token ${l} looks at token ${k}`, [
          { style: "--ink:var(--c1)", name: "teacher", value: show(t[l][k] / 1000) },
          { style: "--ink:var(--c0)", name: "student", value: show(s[l][k] / 1000) }]);
        put(event);
      });
      svg.addEventListener("pointerleave", hide);
    }
  }
  const reveal = () => {
    const row = /^#g\d+$/.test(location.hash) && document.getElementById(location.hash.slice(1));
    if (row) row.querySelector("details").open = true;
  };
  addEventListener("hashchange", reveal);
  reveal();
  // A run that goes on: load anew, and stay where the reader is.
  const every = Number(document.body.dataset.refresh);
  const folds = () => [...document.querySelectorAll("details")];
  const nameOf = (element) => {
    const mark = element.querySelector("summary, figcaption");
    return (element.closest("section")?.id ?? "") + "/" + (mark?.textContent ?? "");
  };
  const key = "pipe-report";
  try {
    const kept = every && JSON.parse(sessionStorage.getItem(key));
    if (kept) {
      for (const fold of folds()) if (nameOf(fold) in kept.folds) fold.open = kept.folds[nameOf(fold)];
      for (const chart of charts.all) {
        const was = kept.charts[nameOf(chart.figure)];
        if (!was) continue;
        if (chart.d.log) chart.log = was.log;
        chart.range = was.range;
        chart.draw();
      }
      scrollTo(0, kept.y);
    }
  } catch { /* without storage the page begins anew */ }
  if (every > 0) {
    history.scrollRestoration = "manual";
    setInterval(() => {
      if (document.hidden || tip.style.display === "block" || String(getSelection())) return;
      try {
        sessionStorage.setItem(key, JSON.stringify({ y: scrollY,
          folds: Object.fromEntries(folds().map((fold) => [nameOf(fold), fold.open])),
          charts: Object.fromEntries(charts.all.filter((c) => c.range || c.log !== undefined)
            .map((c) => [nameOf(c.figure), { log: c.log, range: c.range }])) }));
      } catch { /* as above */ }
      location.reload();
    }, every * 1000);
  }
})();
