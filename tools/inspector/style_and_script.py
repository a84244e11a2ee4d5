"""Style and script of the inspector's page. Neither contains anything from the data, and the page's policy lets nothing else run.

Colours have a contrast of 4.5 or more on their grounds, light and dark. Learned text is underlined too, for readers who do not see
green, and so are answers that are not learned, in grey.
"""

STYLE = """
:root { color-scheme: light dark;
  --ground: #f5f5f2; --sheet: #fff; --ink: #1c1f23; --soft: #5a626c; --line: #d9dad4; --faint: #ecece7;
  --learn: #d5f3da; --learn-ink: #0c4320; --learn-line: #2f9e55; --box: #e6ecfa; --box-ink: #24407f; --box-line: #a9bce8;
  --bad: #fbe3e0; --bad-ink: #8c1d12; --warn: #fbf0d0; --warn-ink: #6b4a00; --mark: #8a5a00; --focus: #1a62d6; }
@media (prefers-color-scheme: dark) { :root {
  --ground: #14161a; --sheet: #1d2025; --ink: #e4e6e9; --soft: #a3abb6; --line: #353a42; --faint: #282c33;
  --learn: #143a22; --learn-ink: #b4f0c4; --learn-line: #3fae68; --box: #202c4a; --box-ink: #bccdf6; --box-line: #43588f;
  --bad: #4a1c18; --bad-ink: #ffc5bd; --warn: #3d320f; --warn-ink: #f3d98b; --mark: #e3b75c; --focus: #7db0ff; } }
* { box-sizing: border-box; }
html { scroll-padding-top: 5.5rem; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
header, main, .tools > div, footer { max-width: 76rem; margin: 0 auto; padding: 0 1.5rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 2rem 0 .4rem; }
h2 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
p { margin: .4rem 0; max-width: 62rem; }
.soft, dt, figcaption, .sub { color: var(--soft); }
code, pre, .text { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: .86rem; }
:focus-visible { outline: 2px solid var(--focus); outline-offset: 2px; }
.sources { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 23rem), 1fr)); gap: 1rem; margin: 1.2rem 0; }
.source, article { background: var(--sheet); border: 1px solid var(--line); border-radius: .6rem; }
.source { padding: .9rem 1rem; }
.source p { font-size: .86rem; overflow-wrap: anywhere; }
.source svg { display: block; width: 100%; height: 84px; margin-top: .5rem; }
.bar { fill: var(--box-line); } .bar:hover { fill: var(--focus); } .axis { stroke: var(--line); }
.source svg text { fill: var(--soft); font-size: 11px; }
.tools { position: sticky; top: 0; z-index: 2; background: var(--ground); border-bottom: 1px solid var(--line); }
.tools > div { display: flex; flex-wrap: wrap; gap: .5rem .8rem; align-items: center; padding-top: .6rem; padding-bottom: .6rem; }
.tools label { font-size: .86rem; color: var(--soft); }
input, select { font: inherit; font-size: .9rem; color: inherit; background: var(--sheet); border: 1px solid var(--line);
  border-radius: .4rem; padding: .25rem .45rem; max-width: 14rem; }
input { flex: 1 1 9rem; max-width: 20rem; }
#count { margin-left: auto; font-variant-numeric: tabular-nums; min-width: 9.5rem; text-align: right; }
main { padding-top: 1rem; padding-bottom: 5rem; }
article { margin: 0 0 1rem; overflow: hidden; }
article > header { max-width: none; padding: .7rem 1rem .6rem; margin: 0; border-bottom: 1px solid var(--faint); }
.top { display: flex; flex-wrap: wrap; gap: .2rem .8rem; align-items: baseline; }
.sub { font-size: .86rem; overflow-wrap: anywhere; }
.top .nums { margin-left: auto; font-size: .9rem; font-variant-numeric: tabular-nums; }
.share { display: block; width: 100%; height: 6px; margin-top: .5rem; }
.share .all { fill: var(--faint); } .share .read { fill: var(--line); } .share .media { fill: var(--box-line); }
.share .learned { fill: var(--learn-line); }
.note { max-width: none; margin: .5rem 0 0; padding: .3rem .6rem; border-radius: .4rem; background: var(--warn);
  color: var(--warn-ink); font-size: .9rem; overflow-wrap: anywhere; }
.note.bad { background: var(--bad); color: var(--bad-ink); }
.body { display: flex; flex-wrap: wrap; gap: 1rem; padding: .9rem 1rem 1rem; align-items: flex-start; }
.media { flex: 0 1 auto; max-width: min(21rem, 100%); min-width: 0; display: flex; flex-wrap: wrap; gap: .8rem; }
.text { flex: 1 1 24rem; min-width: 0; margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.75; }
figure { margin: 0; max-width: 100%; }
figure.wide { width: 100%; }
figcaption { contain: inline-size; font-size: .8rem; line-height: 1.35; margin-top: .25rem; overflow-wrap: anywhere; }
figure button { display: block; padding: 0; border: 0; background: none; cursor: zoom-in; max-width: 100%; text-align: left; }
figure.wide button { width: 100%; }
.row { display: flex; gap: 2px; margin-bottom: 2px; }
.row img { min-width: 0; flex: 0 1 auto; }
.row.tiles img { max-width: 9rem; }
.row.thumb { margin-top: 6px; } .row.thumb img { width: 5rem; }
.strip { flex-wrap: wrap; }
.strip img { width: 5rem; }
img { display: block; max-width: 100%; height: auto; background: var(--faint); outline: 1px solid var(--line);
  outline-offset: -1px; }
img.tiny { image-rendering: pixelated; }
.sound { margin-bottom: 2px; } .sound img { width: 100%; height: 84px; }
.gone { font-size: .8rem; padding: .4rem .6rem; border: 1px dashed var(--line); border-radius: .4rem; color: var(--soft); }
mark { background: var(--learn); color: var(--learn-ink); box-shadow: inset 0 -2px 0 var(--learn-line); padding: .12em 0; }
.u { background: var(--faint); color: var(--soft); box-shadow: inset 0 -2px 0 var(--soft); padding: .12em 0; }
.text .s { color: var(--mark); } .text .u.s { color: var(--soft); font-weight: 600; }
.text mark.s { color: var(--learn-ink); font-weight: 600; }
.text span:hover, .text mark:hover, .text .here { outline: 1.5px solid var(--focus); }
.box { display: inline-block; background: var(--box); color: var(--box-ink); border: 1px solid var(--box-line);
  border-radius: .35rem; padding: 0 .45rem; line-height: 1.5; max-width: 100%; }
.n::before { content: "\\21B5"; color: var(--soft); }
.x { color: var(--bad-ink); background: var(--bad); border-radius: .2rem; font-style: normal; }
pre.raw { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; flex: 1 1 100%; }
#status { position: fixed; right: 1rem; bottom: 1rem; max-width: calc(100vw - 2rem); background: var(--ink); color: var(--sheet);
  border-radius: .4rem; padding: .3rem .7rem; font-size: .86rem; overflow-wrap: anywhere; z-index: 3; }
#status:empty { visibility: hidden; }
#none { padding: 3rem 0; text-align: center; }
kbd { white-space: nowrap; border: 1px solid var(--line); border-bottom-width: 2px; border-radius: .25rem; padding: 0 .3rem;
  font: inherit; font-size: .8rem; }
dialog { border: 1px solid var(--line); border-radius: .6rem; background: var(--sheet); color: var(--ink); padding: 1rem;
  max-width: 96vw; max-height: 94vh; }
dialog::backdrop { background: rgb(0 0 0 / .6); }
dialog .row img { flex: none; max-width: none; } dialog .strip { flex-wrap: wrap; }
dialog .row.strip img, dialog .row.thumb img { width: auto; } dialog .row.tiles img { max-width: none; }
dialog .sound img { width: auto; height: auto; max-width: none; }
dialog button { font: inherit; padding: .2rem .8rem; }
@media (max-width: 44rem) { .tools { position: static; } html { scroll-padding-top: 1rem; } }
[hidden] { display: none !important; }
"""

SCRIPT = """
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
"""
