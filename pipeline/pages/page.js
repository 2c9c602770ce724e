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

// Images: a click shows one in full size; the arrow keys show the next one, Escape and the button close it.
const dialog = document.querySelector("dialog");
let enlarged = null;

function enlarge(button) {
  const image = button.querySelector("img");
  const large = dialog.querySelector("img");
  large.src = image.src;
  large.alt = image.alt;
  enlarged = button;
}

for (const button of document.querySelectorAll(".enlarge")) {
  button.addEventListener("click", () => {
    enlarge(button);
    dialog.showModal();
  });
}
dialog.addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  const shown = [...document.querySelectorAll(".enlarge")].filter((each) => each.offsetParent);
  const next = shown[shown.indexOf(enlarged) + step];
  if (!next) return;
  event.preventDefault();
  enlarge(next);
  announce(next.querySelector("img").alt);
});
dialog.addEventListener("close", () => enlarged?.focus());

// Galleries: each select keeps the items that have its value; j and k go to the next and the previous item.
function filterItems(gallery) {
  const chosen = [...gallery.querySelectorAll("select")].map((select) => select.value);
  const items = [...gallery.querySelectorAll("article")];
  for (const item of items) {
    item.hidden = chosen.some((value, k) => value && !item.getAttribute(`data-values-${k}`).split(" ").includes(value));
  }
  const shown = items.filter((item) => !item.hidden).length;
  gallery.querySelector("output").textContent = `${shown} of ${items.length} shown`;
}

for (const gallery of document.querySelectorAll(".gallery")) {
  gallery.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
  for (const select of gallery.querySelectorAll("select")) {
    select.addEventListener("change", () => filterItems(gallery));
  }
  filterItems(gallery);
}
document.addEventListener("keydown", (event) => {
  const step = { j: 1, k: -1 }[event.key];
  if (!step || dialog.open || event.ctrlKey || event.metaKey || event.altKey || event.target.closest("select")) return;
  const items = [...document.querySelectorAll(".gallery article:not([hidden])")];
  const here = items.indexOf(document.activeElement.closest("article"));
  const next = items[here < 0 ? (step > 0 ? 0 : items.length - 1) : here + step];
  if (!next) return;
  next.focus({ preventScroll: true });
  next.scrollIntoView({ block: "start" });
});
