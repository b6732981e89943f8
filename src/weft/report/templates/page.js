"use strict";
(() => {
  // -- the table

  // Numbers by size, texts by alphabet, empty cells last in either direction.
  const compare = (left, right, column, direction) => {
    const [a, b] = [left, right].map((group) => group.rows[0].cells[column].dataset.value);
    if (a === "" || b === "") return (a === "") - (b === "");
    const difference = Number(a) - Number(b);
    return direction * (Number.isNaN(difference) ? a.localeCompare(b, "en", { numeric: true }) : difference);
  };

  const table = document.querySelector(".sortable");
  const groups = table ? Array.from(table.tBodies) : [];
  const headings = table ? Array.from(table.tHead.rows[0].cells) : [];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const direction = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
      table.append(...[...groups].sort((a, b) => compare(a, b, column, direction)));
    });
  });

  const filter = document.querySelector(".filter");
  const family = document.querySelector(".family");
  const shown = document.querySelector(".shown");
  const choose = () => {
    const wanted = filter.value.trim().toLowerCase();
    groups.forEach((group) => {
      const row = group.rows[0];
      const fits = !family || !family.value || row.cells[1].dataset.value === family.value;
      group.hidden = !fits || !row.textContent.toLowerCase().includes(wanted);
    });
    shown.textContent = `${groups.filter((group) => !group.hidden).length} of ${groups.length}`;
  };
  if (filter) filter.addEventListener("input", choose);
  if (family) family.addEventListener("change", choose);

  const open = (group, opened) => {
    const [row, detail] = group.rows;
    detail.hidden = !opened;
    row.querySelector("button").setAttribute("aria-expanded", String(opened));
    if (opened) draw(detail);
  };
  groups.filter((group) => group.rows.length > 1).forEach((group) => {
    group.rows[0].addEventListener("click", () => {
      if (window.getSelection().toString()) return; // the reader is copying something
      open(group, group.rows[1].hidden);
    });
  });

  // -- the charts

  const specifications = document.getElementById("charts");
  if (!specifications) return;
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const touched = window.matchMedia("(pointer: coarse)");

  // The chart as Plotly wants it, its colours those of the scheme that is seen now.
  const charts = (() => {
    const texts = Object.entries(JSON.parse(specifications.textContent)).map(([key, chart]) => [key, JSON.stringify(chart)]);
    const kept = new Map(texts);
    return (key) => {
      const style = window.getComputedStyle(document.documentElement);
      return JSON.parse(kept.get(key), (name, value) => {
        const variable = typeof value === "string" && name.endsWith("color") && /^var\((--[\w-]+)\)$/.exec(value);
        return variable ? style.getPropertyValue(variable[1]).trim() : value;
      });
    };
  })();

  const drawn = new Set();
  const drawOne = (place) => {
    const chart = charts(place.dataset.chart);
    const cost = document.querySelector(".cost");
    if (cost && chart.layout.meta) {
      chart.data.forEach((trace, index) => { trace.x = chart.layout.meta.costs[cost.value][index]; });
    }
    chart.layout.dragmode = touched.matches ? false : "zoom"; // a finger scrolls the page
    window.Plotly.react(place, chart.data, chart.layout, { responsive: true, displayModeBar: false });
    if (drawn.has(place)) return;
    drawn.add(place);
    if (place.dataset.chart === "costs") {
      place.on("plotly_click", (event) => {
        const group = groups[event.points[0].customdata];
        open(group, true);
        group.scrollIntoView({ block: "center" });
      });
    }
  };
  let ready = false;
  const draw = (inside) => {
    if (!ready) return;
    inside.querySelectorAll(".plot").forEach((place) => {
      if (!place.offsetParent) return;
      if (drawn.has(place)) window.Plotly.Plots.resize(place); // the window may have changed while it was hidden
      else drawOne(place);
    });
  };

  const unpack = async () => {
    const packed = window.atob(document.getElementById("library").textContent);
    const bytes = Uint8Array.from(packed, (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
    ready = true;
    draw(document);
    const cost = document.querySelector(".cost");
    if (cost) cost.addEventListener("change", () => drawn.forEach(drawOne));
    dark.addEventListener("change", () => {
      drawn.forEach((place) => {
        if (place.offsetParent) drawOne(place);
        else drawn.delete(place); // drawn again when it is seen again
      });
    });
    document.documentElement.dataset.charts = "drawn";
  };
  unpack().catch((problem) => {
    document.querySelectorAll(".plot").forEach((place) => {
      place.style.height = "auto";
      place.textContent = "This browser is too old to draw the charts.";
    });
    throw problem;
  });
})();
