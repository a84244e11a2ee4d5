"use strict";
const find = id => document.getElementById(id);
const list = find("list"), cards = [...list.children], status = find("status"), big = find("big");
const chosen = ["source", "kind", "state", "order", "words"].map(find);

let ordered = "file";
function arrange(order) {
  const sign = order === "longest" ? -1 : 1, key = order === "file" ? "place" : "tokens";
  list.append(...[...cards].sort((a, b) => sign * (a.dataset[key] - b.dataset[key]) || a.dataset.place - b.dataset.place));
  ordered = order;
}
function show() {
  const [source, kind, state, order, words] = chosen.map(field => field.value);
  const wanted = words.trim().toLowerCase();
  let count = 0;
  for (const card of cards) {
    const data = card.dataset;
    const states = state === "out" ? data.status !== "trained" && data.status !== "shortened" : !state || data.status === state;
    const fits = (!source || data.source === source) && (!kind || data.kinds.split(" ").includes(kind)) && states
      && (!wanted || card.textContent.toLowerCase().includes(wanted));
    card.hidden = !fits;
    count += fits;
  }
  if (order !== ordered) arrange(order);
  find("count").textContent = count + " of " + cards.length + " shown";
  find("none").hidden = count > 0;
}
for (const field of chosen) field.addEventListener("input", show);

const isToken = node => node instanceof Element && node.matches(".text > [title]");
const fate = token => token.matches("mark") ? "learned" : token.matches(".u") ? "of an answer that is not learned" : "only read";
function tell(token) {
  document.querySelector(".here")?.classList.remove("here");
  status.textContent = token ? token.title + ", " + fate(token) : "";
}
list.addEventListener("mouseover", event => {
  const token = event.target.closest(".text > [title]");
  tell(token);
});
list.addEventListener("mouseleave", () => tell(null));

function walk(text, step) {
  const tokens = [...text.children].filter(isToken);
  const at = tokens.findIndex(token => token.classList.contains("here"));
  const next = tokens[at < 0 ? (step > 0 ? 0 : tokens.length - 1) : Math.min(Math.max(at + step, 0), tokens.length - 1)];
  tell(next);
  next?.classList.add("here");
  next?.scrollIntoView({ block: "nearest" });
}
function turn(step) {
  const seen = [...list.children].filter(card => !card.hidden);
  const at = seen.indexOf(document.activeElement?.closest("article"));
  const next = seen[at < 0 ? 0 : at + step];
  next?.focus();
  next?.scrollIntoView({ block: "start" });
}
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || big.open) return;
  const active = document.activeElement;
  if (active?.matches("input, select")) {
    if (event.key === "Escape") active.blur();
    return;
  }
  const text = active?.closest(".text");
  if (text && (event.key === "ArrowRight" || event.key === "ArrowLeft")) walk(text, event.key === "ArrowRight" ? 1 : -1);
  else if (event.key === "j") turn(1);
  else if (event.key === "k") turn(-1);
  else if (event.key === "/") find("words").focus();
  else return;
  event.preventDefault();
});
list.addEventListener("click", event => {
  const button = event.target.closest("figure button");
  if (!button) return;
  const figure = button.closest("figure");
  find("large").replaceChildren(...[...button.children, figure.querySelector("figcaption")].map(node => node.cloneNode(true)));
  big.showModal();
});
big.addEventListener("click", event => { if (event.target === big) big.close(); });
show();
