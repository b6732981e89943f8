"use strict";
(() => {
  const table = document.getElementById("layer-table");
  if (!table) return;
  const groups = Array.from(table.tBodies);
  const headings = Array.from(table.tHead.rows[0].cells);

  // Numbers by size, texts by alphabet, empty cells last in either direction.
  const compare = (left, right, column, direction) => {
    const [a, b] = [left, right].map((group) => group.rows[0].cells[column].dataset.value);
    if (a === "" || b === "") return (a === "") - (b === "");
    const difference = Number(a) - Number(b);
    return direction * (Number.isNaN(difference) ? a.localeCompare(b, "en", { numeric: true }) : difference);
  };

  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const direction = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
      table.append(...[...groups].sort((a, b) => compare(a, b, column, direction)));
    });
  });

  groups.forEach((group) => {
    const [row, detail] = group.rows;
    const button = row.querySelector("button");
    row.addEventListener("click", () => {
      if (window.getSelection().toString()) return; // the reader is copying something
      detail.hidden = !detail.hidden;
      button.setAttribute("aria-expanded", String(!detail.hidden));
    });
  });

  const filter = document.getElementById("filter");
  const shown = document.getElementById("shown");
  filter.addEventListener("input", () => {
    const wanted = filter.value.trim().toLowerCase();
    groups.forEach((group) => {
      const [name, structure] = group.rows[0].cells;
      group.hidden = !`${name.textContent} ${structure.textContent}`.toLowerCase().includes(wanted);
    });
    shown.textContent = `${groups.filter((group) => !group.hidden).length} of ${groups.length}`;
  });
})();
