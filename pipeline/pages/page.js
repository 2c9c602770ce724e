"use strict";
// Tables: a click on a header sorts by it, a second one the other way round. Rows without a value stay last.
const announce = (text) => { document.getElementById("status").textContent = text; };
const compare = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true }));

function sortBy(header) {
  const table = header.closest("table");
  const body = table.tBodies[0];
  const down = header.getAttribute("aria-sort") === "ascending";
  const numeric = header.classList.contains("number");
  const keyed = [...body.rows].map((row) => {
    const value = row.cells[header.cellIndex].dataset.value;
    return { row, value: value === undefined ? undefined : numeric ? Number(value) : value };
  });
  const known = keyed.filter((each) => each.value !== undefined).sort((a, b) => compare(a.value, b.value));
  if (down) known.reverse();
  const unknown = keyed.filter((each) => each.value === undefined);
  body.append(...[...known, ...unknown].map((each) => each.row));
  for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", down ? "descending" : "ascending");
  announce(`Sorted by ${header.innerText}, ${down ? "descending" : "ascending"}`);
}

for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => sortBy(button.closest("th")));
}

// Images: a click shows one in full size; Escape and the button close it.
const dialog = document.querySelector("dialog");
for (const button of document.querySelectorAll(".enlarge")) {
  button.addEventListener("click", () => {
    const image = button.querySelector("img");
    const large = dialog.querySelector("img");
    large.src = image.src;
    large.alt = image.alt;
    dialog.showModal();
  });
}
