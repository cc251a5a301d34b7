// Sorts the rows of a table by the column whose heading is pressed; a second press turns the order around.
"use strict";

const collator = new Intl.Collator("en", { numeric: true });

function valueOf(row, column) {
  const cell = row.cells[column];
  const text = cell.textContent.trim();
  if (text === "" || text === "-") return null;
  return cell.classList.contains("n") ? parseFloat(text.replace(/[,+%]/g, "")) : text;
}

function compare(a, b) {
  return typeof a === "number" && typeof b === "number" ? a - b : collator.compare(a, b);
}

function sortBy(table, heading) {
  const column = heading.cellIndex;
  const down = heading.getAttribute("aria-sort") === "ascending";
  const rows = Array.from(table.tBodies[0].rows, (row) => ({ row, value: valueOf(row, column) }));
  rows.sort((a, b) => {
    if (a.value === null || b.value === null) return (a.value === null) - (b.value === null); // without a value: last
    return down ? compare(b.value, a.value) : compare(a.value, b.value);
  });
  for (const other of heading.parentNode.cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  table.tBodies[0].append(...rows.map((each) => each.row));
}

for (const table of document.querySelectorAll("table.sortable")) {
  const headings = table.tHead.rows[table.tHead.rows.length - 1].cells;
  for (const heading of headings) {
    const button = document.createElement("button"); // a button answers to the keyboard by itself
    button.type = "button";
    button.append(...heading.childNodes);
    button.addEventListener("click", () => sortBy(table, heading));
    heading.append(button);
  }
}

const contents = document.querySelector("nav details");
if (window.matchMedia("(max-width: 70rem)").matches) contents.open = false;
