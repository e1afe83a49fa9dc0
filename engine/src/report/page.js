"use strict";
(() => {
  const tip = document.getElementById("tip-box");
  const show = (v) => {
    const a = Math.abs(v);
    if (a !== 0 && (a < 1e-3 || a >= 1e6)) return v.toExponential(2);
    return Number.isInteger(v) ? v.toLocaleString("en") : String(+v.toPrecision(4));
  };
  const place = (event) => {
    const w = tip.offsetWidth, h = tip.offsetHeight;
    let x = event.clientX + 14, y = event.clientY + 14;
    if (x + w > innerWidth - 8) x = event.clientX - w - 14;
    if (y + h > innerHeight - 8) y = event.clientY - h - 14;
    tip.style.left = Math.max(4, x) + "px";
    tip.style.top = Math.max(4, y) + "px";
  };
  const nearest = (points, x) => {
    let low = 0, high = points.length - 1;
    while (high - low > 1) {
      const mid = (low + high) >> 1;
      if (points[mid][0] < x) low = mid; else high = mid;
    }
    return Math.abs(points[low][0] - x) <= Math.abs(points[high][0] - x) ? points[low] : points[high];
  };
  for (const figure of document.querySelectorAll("figure.chart")) {
    const button = figure.querySelector("button.scale");
    if (button) {
      const tell = () => button.setAttribute("aria-label",
        "vertical axis: " + (figure.classList.contains("islog") ? "logarithmic" : "linear"));
      tell();
      button.addEventListener("click", () => { figure.classList.toggle("islog"); tell(); });
    }
    const source = figure.querySelector("script[type='application/json']");
    if (!source) continue;
    const d = JSON.parse(source.textContent);
    const svg = figure.querySelector("svg"), cross = svg.querySelector(".cross");
    const [left, right, top, bottom] = d.box, [x0, x1] = d.xs;
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), zoom = svg.viewBox.baseVal.width / box.width;
      const px = (event.clientX - box.left) * zoom, py = (event.clientY - box.top) * zoom;
      const x = x0 + (Math.min(Math.max(px, left), right) - left) / (right - left) * (x1 - x0);
      const log = figure.classList.contains("islog") && d.log;
      const [y0, y1] = (log || d.lin).map((v) => log ? Math.log(v) : v);
      const height = (v) => bottom - ((log ? Math.log(v) : v) - y0) / (y1 - y0) * (bottom - top);
      let rows = d.s.filter((s) => s.p.length).map((s) => {
        const p = nearest(s.p, x);
        return { s, p, off: Math.abs(height(p[1]) - py) };
      });
      if (!rows.length) return;
      const at = rows.reduce((a, b) => Math.abs(b.p[0] - x) < Math.abs(a.p[0] - x) ? b : a).p[0];
      const closest = rows.reduce((a, b) => b.off < a.off ? b : a);
      if (rows.length > 10) rows = rows.sort((a, b) => a.off - b.off).slice(0, 10);
      rows.sort((a, b) => b.p[1] - a.p[1]);
      tip.replaceChildren();
      const title = document.createElement("div");
      title.className = "at";
      title.textContent = d.places.length ? (d.places[at] ?? "") + " " + d.x : d.x + " " + show(at);
      tip.append(title);
      for (const { s, p } of rows) {
        const row = document.createElement("div"), mark = document.createElement("i"),
          name = document.createElement("span"), value = document.createElement("b");
        row.setAttribute("style", s.i);
        if (s === closest.s && d.s.length > 1) row.className = "near";
        name.textContent = s.n;
        value.textContent = show(p[1]);
        row.append(mark, name, value);
        tip.append(row);
      }
      const cx = left + (at - x0) / (x1 - x0) * (right - left);
      cross.setAttribute("x1", cx);
      cross.setAttribute("x2", cx);
      tip.style.display = "block";
      place(event);
    });
    svg.addEventListener("pointerleave", () => {
      tip.style.display = "none";
      cross.setAttribute("x1", -9);
      cross.setAttribute("x2", -9);
    });
  }
  const reveal = () => {
    const row = /^#g\d+$/.test(location.hash) && document.getElementById(location.hash.slice(1));
    if (row) row.querySelector("details").open = true;
  };
  addEventListener("hashchange", reveal);
  reveal();
})();
