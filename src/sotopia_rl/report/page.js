"use strict";
(() => {
  const root = document.documentElement;
  const toggle = document.querySelector(".theme");
  toggle.addEventListener("click", () => {
    const dark = root.dataset.theme
      ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  // Values under the pointer, or under the arrow keys, of every chart that carries its numbers.
  const readout = document.getElementById("readout");
  const short = (value) => String(Number(value.toPrecision(4)));

  function show(svg, lines, x) {
    const nearest = (points) =>
      points.reduce((best, point) => (Math.abs(point[2] - x) < Math.abs(best[2] - x) ? point : best));
    const rows = lines.map((line) => ({ label: line.label, point: nearest(line.points) }));
    const lead = rows.reduce((a, b) => (Math.abs(b.point[2] - x) < Math.abs(a.point[2] - x) ? b : a)).point;
    const cursor = svg.querySelector(".cursor");
    cursor.setAttribute("x1", lead[2]);
    cursor.setAttribute("x2", lead[2]);
    cursor.style.visibility = "visible";
    readout.replaceChildren();
    const head = document.createElement("div");
    head.textContent = `${svg.dataset.x} ${short(lead[0])}`;
    readout.append(head);
    for (const { label, point } of rows) {
      if (Math.abs(point[2] - lead[2]) > 6) continue;
      const row = document.createElement("div");
      row.textContent = `${label}: ${short(point[1])}`;
      readout.append(row);
    }
    const box = svg.getBoundingClientRect();
    const left = box.left + (lead[2] / svg.viewBox.baseVal.width) * box.width;
    const width = readout.offsetWidth;
    readout.style.left = `${Math.max(6, Math.min(left + 12, innerWidth - width - 6))}px`;
    readout.style.top = `${Math.max(6, box.top + 4)}px`;
    readout.style.visibility = "visible";
    return lead[2];
  }

  function hide(svg) {
    svg.querySelector(".cursor").style.visibility = "hidden";
    readout.style.visibility = "hidden";
  }

  for (const svg of document.querySelectorAll("svg[data-lines]")) {
    const lines = JSON.parse(svg.dataset.lines).filter((line) => line.points.length);
    if (!lines.length) continue;
    const places = [...new Set(lines.flatMap((line) => line.points.map((point) => point[2])))].sort((a, b) => a - b);
    let at = places.length - 1;
    const toView = (event) => {
      const box = svg.getBoundingClientRect();
      return ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    };
    svg.addEventListener("pointermove", (event) => show(svg, lines, toView(event)));
    svg.addEventListener("pointerleave", () => hide(svg));
    svg.addEventListener("focus", () => show(svg, lines, places[at]));
    svg.addEventListener("blur", () => hide(svg));
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      at = Math.max(0, Math.min(places.length - 1, at + step));
      show(svg, lines, places[at]);
    });
  }

  // Escape puts a bubble's numbers away again.
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && document.activeElement instanceof HTMLElement) document.activeElement.blur();
  });
})();
