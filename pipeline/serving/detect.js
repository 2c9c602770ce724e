"use strict";
// One image at a time is sent to v1/predict. The answer holds all detections from the slider's least value on, so
// that moving the slider sends nothing. Text of the answer enters the page as text, never as HTML.
const get = (id) => document.getElementById(id);
const [login, token, file, status, fault, result, threshold, value, image, boxes, rows] =
  ["login", "token", "file", "status", "fault", "result", "threshold", "value", "image", "boxes", "rows"].map(get);
const zone = document.querySelector(".drop");
const TEXT_PIXELS = 14; // of the screen
let found = null;
let last = null;
let marked = null;
let request = null;

async function send(chosen) {
  if (!chosen) return;
  last = chosen;
  request?.abort();
  const own = request = new AbortController();
  fault.textContent = "";
  status.textContent = `Looking for objects in ${chosen.name}`;
  const form = new FormData();
  form.append("threshold", threshold.min);
  form.append("image", chosen);
  const headers = token.value ? { Authorization: `Bearer ${token.value}` } : {};
  try {
    const answer = await fetch("v1/predict", { method: "POST", body: form, headers, signal: own.signal });
    const content = await answer.json();
    if (answer.ok) show(chosen, content);
    else refuse(answer.status, content.message);
  } catch (error) {
    if (own === request) refuse(0, own.signal.aborted ? "" : "The server does not answer.");
  }
}

function refuse(code, message) {
  status.textContent = "";
  fault.textContent = message ? message[0].toUpperCase() + message.slice(1) : "";
  if (code === 401) {
    login.hidden = false;
    token.focus();
  }
}

function show(chosen, content) {
  found = content.scores.map((score, i) => ({
    score, name: content.labels[i], category: content.category_ids[i], box: content.boxes[i],
  }));
  marked = null;
  URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(chosen);
  image.width = content.width;
  image.height = content.height;
  boxes.setAttribute("viewBox", `0 0 ${content.width} ${content.height}`);
  boxes.setAttribute("preserveAspectRatio", "none");
  result.hidden = false;
  draw();
  announce();
}

const shown = () => found.filter((each) => each.score >= Number(threshold.value));
const announce = () => {
  const count = shown().length;
  status.textContent = `${count} ${count === 1 ? "object" : "objects"} with a score of at least ${value.textContent}`;
};
const colour = (category) => `hsl(${Math.round(((category * 0.61803398875) % 1) * 360)} 85% 60%)`;

function shape(name, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, each] of Object.entries(attributes)) element.setAttribute(key, each);
  return element;
}

function boxOf(each) {
  const [x, y, width, height] = each.box;
  const side = (TEXT_PIXELS * boxes.viewBox.baseVal.width) / (image.clientWidth || 1); // in pixels of the image
  const group = shape("g", { class: marked === null ? "" : marked === each ? "marked" : "other" });
  const sides = { x, y, width: Math.max(width, 0), height: Math.max(height, 0) };
  const label = shape("text", { x: Math.max(x, 0) + side / 5, y: Math.max(y, 0) + side / 6, "font-size": side });
  label.textContent = `${each.name} ${each.score.toFixed(2)}`;
  const plate = { class: "plate", x: Math.max(x, 0), y: Math.max(y, 0), width: label.textContent.length * side * 0.6, height: side * 1.25 };
  const fill = shape("rect", plate);
  fill.style.fill = colour(each.category);
  group.append(shape("rect", { class: "edge", ...sides }), shape("rect", { stroke: colour(each.category), ...sides }), fill, label);
  return group;
}

function rowOf(each) {
  const row = document.createElement("tr");
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = each.name;
  button.setAttribute("aria-pressed", String(marked === each));
  button.addEventListener("click", () => {
    marked = marked === each ? null : each;
    const place = [...rows.rows].indexOf(row);
    draw();
    rows.rows[place].querySelector("button").focus();
  });
  row.insertCell().append(button);
  for (const cell of [each.score.toFixed(2), ...each.box.map((side) => Math.round(side))]) {
    const made = row.insertCell();
    made.className = "number";
    made.textContent = cell;
  }
  return row;
}

function draw() {
  value.textContent = Number(threshold.value).toFixed(2);
  if (found === null) return;
  const now = shown();
  if (!now.includes(marked)) marked = null;
  boxes.replaceChildren(...now.toReversed().map(boxOf)); // the best on top
  rows.replaceChildren(...now.map(rowOf));
}

new ResizeObserver(() => found && draw()).observe(image); // labels keep their size on the screen
threshold.addEventListener("input", draw);
threshold.addEventListener("change", () => found && announce());
file.addEventListener("change", () => send(file.files[0]));
login.addEventListener("submit", (event) => {
  event.preventDefault();
  login.hidden = true;
  file.focus();
  send(last);
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    zone.classList.toggle("over", kind === "dragover");
    if (kind === "drop") send(event.dataTransfer.files[0]);
  });
}
document.addEventListener("paste", (event) => send(event.clipboardData.files[0]));
draw();
