"use strict";
// Sorts a table by the column whose heading was pressed: up, then down. Cells without a number stay at the end.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      const words = (cell) => (cell.classList.contains("number") ? undefined : cell.querySelector(".value")?.textContent);
      const key = (cell) => cell.dataset.sort ?? words(cell);
      const keys = new Map([...body.rows].map((row) => [row, key(row.cells[column])]));
      const given = [...keys.values()].filter((key) => key !== undefined);
      const numeric = given.every((key) => key !== "" && !Number.isNaN(Number(key)));
      const compare = (a, b) => (numeric ? Number(a) - Number(b) : a.localeCompare(b, "en", { numeric: true }));
      const rows = [...body.rows].sort((left, right) => {
        const a = keys.get(left);
        const b = keys.get(right);
        if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
        return up ? compare(a, b) : compare(b, a);
      });
      body.append(...rows);
      table.classList.add("sorted");
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
    });
  });
}
// A reason in a cell leads to the list of reasons; a printed page shows every cell's provenance.
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
// The decision panel: what archbench choose says, for any need, from the points that stand in the page.
const panel = document.querySelector("form.panel");
if (panel) {
  const data = JSON.parse(document.getElementById("decision-data").textContent);
  const told = panel.querySelector("output");
  // Straight in logarithms between measured points; nothing is known outside them.
  const at = (points, x) => {
    const left = points.filter((point) => point[0] <= x).pop();
    const right = points.find((point) => point[0] >= x);
    if (!left || !right) return null;
    if (left[0] === right[0] || Math.min(left[1], right[1]) <= 0) return left[1];
    const t = Math.log(x / left[0]) / Math.log(right[0] / left[0]);
    return Math.exp((1 - t) * Math.log(left[1]) + t * Math.log(right[1]));
  };
  const limit = (name) => (panel.elements[name].value === "" ? Infinity : Number(panel.elements[name].value));
  const decide = () => {
    const context = Number(panel.elements.context.value);
    if (!(context > 0)) return;
    const met = [];
    const left = data.unranked.map((row) => `${row.name} has no bits per byte`);
    for (const row of data.rows) {
      const state = at(row.state, context);
      const offers = {
        memory: state === null || row.parameters === null ? null : (4 * row.parameters + state) / 1e6,
        time: at(row.time, context) === null ? null : at(row.time, context) * 1e3,
        trained: row.trained === null ? null : row.trained / 1e6,
      };
      const names = { memory: ["memory", "MB"], time: ["time", "ms per token"], trained: ["training text", "MB"] };
      const failed = Object.keys(offers).find(
        (name) => limit(name) !== Infinity && (offers[name] === null || offers[name] > limit(name) * (1 + 1e-9)),
      );
      if (!failed) met.push(row);
      else {
        const value = offers[failed];
        const [what, unit] = names[failed];
        const why = value === null ? `no ${what} known there` : `${what} ${value.toPrecision(3)} ${unit}`;
        left.push(`${row.name}: ${why}`);
      }
    }
    met.sort((a, b) => a.bits - b.bits);
    const best = met[0];
    const tied = met.slice(1).filter((row) => !best.apart.includes(row.name)).map((row) => row.name);
    const interval = best && best.low !== null ? ` [${best.low.toFixed(2)}, ${best.high.toFixed(2)}]` : "";
    const lines = [
      best ? `Choose ${best.name}: ${best.bits.toFixed(2)}${interval} bits per byte.` : "No architecture meets that.",
      tied.length ? `Not told from it by quality: ${tied.join(", ")}.` : "",
      left.length ? `Left out: ${left.join("; ")}.` : "",
    ];
    told.textContent = lines.filter(Boolean).join(" ");
  };
  panel.elements.context.value = data.contexts[data.contexts.length - 1];
  panel.addEventListener("input", decide);
  panel.addEventListener("submit", (event) => event.preventDefault());
  decide();
}
