"use strict";
// Sorts a table by the column whose heading was pressed: up, then down. Cells without a number stay at the end.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      const keys = new Map([...body.rows].map((row) => [row, row.cells[column].dataset.sort]));
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
