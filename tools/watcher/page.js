"use strict";
const find = id => document.getElementById(id), SVG = "http://www.w3.org/2000/svg", COLOURS = 8;
const live = document.body.dataset.live === "yes";
let data = JSON.parse(find("values").textContent), charts = [], seen = Date.now();
const hidden = new Set();  // curves that a click in a legend has taken out

function make(tag, options = {}, ...inside) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) name === "text" ? node.textContent = value : node.setAttribute(name, value);
  node.append(...inside.filter(one => one != null));
  return node;
}
function draw(tag, options, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(options)) node.setAttribute(name, value);
  if (text != null) node.textContent = text;
  return node;
}
const trim = text => text.includes("e") || !text.includes(".") ? text : text.replace(/\.?0+$/, "");
function short(x) {
  const size = Math.abs(x);
  if (x === 0) return "0";
  if (size >= 1e6 || size < 1e-3) return x.toExponential(2).replace(/\.?0+e/, "e");
  return size >= 1000 ? Math.round(x).toLocaleString("en") : trim(x.toPrecision(4));
}
function duration(seconds) {
  const s = Math.round(seconds), parts = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  const at = parts.findIndex(([size]) => s >= size);
  if (at < 0) return "0 s";
  const [size, word] = parts[at], rest = parts[at + 1];
  const second = rest && at > 0 || rest ? Math.floor(s % size / rest[0]) : 0;
  return Math.floor(s / size) + " " + word + (second ? " " + second + " " + rest[1] : "");
}

// Curves and the charts that they belong to: the first that fits takes a key.
const KINDS = [
  ["Loss", "mean over the tokens that are learned; validation dashed", /^(train|val)\/loss$/, m => m[1] === "train" ? "training" : "validation"],
  ["Loss per source", "validation dashed", /^(train|val)\/([^/]+)\/loss$/, m => m[2] + (m[1] === "val" ? ", validation" : "")],
  ["Validation", "", /^val\/(.+)$/, m => m[1]],
  ["Learning rate", "", /^train\/lr\/(.+)$/, m => m[1]],
  ["Gradient norm", "before clipping: of all, and of each part", /^train\/grad_norm(?:\/(.+))?$/, m => m[1] || "all"],
  ["Tokens per second", "over all ranks", /^perf\/tokens_per_second$/, () => "tokens/s"],
  ["Waiting for data", "share of the time", /^perf\/data_wait$/, () => "data wait"],
  ["Memory", "GiB at its peak, on rank 0", /^mem\/peak_gib$/, () => "GiB"],
  ["Skipped updates", "since the line before", /^train\/skipped_steps$/, () => "skipped"],
  ["Tokens per line of the log", "learned ones dashed", /^train\/(?:([^/]+)\/)?(supervised_)?tokens$/,
    m => (m[1] || "all") + (m[2] ? ", learned" : "")],
];
function plan() {
  const found = KINDS.map(([title, note]) => ({ title, note, lines: [] })), more = new Map();
  data.runs.forEach((run, number) => {
    for (const [key, curve] of Object.entries(run.curves)) {
      let at = -1, match = null;
      for (let i = 0; i < KINDS.length && !match; i++) { match = key.match(KINDS[i][2]); at = i; }
      if (!match && !more.has(key)) more.set(key, { title: key, note: "", lines: [] });
      const chart = match ? found[at] : more.get(key), label = match ? KINDS[at][3](match) : key;
      const dash = key.startsWith("val/") && at < 2 || key.includes("supervised_tokens");
      chart.lines.push({ run: number, key, label, curve, dash });
    }
  });
  const drawn = [...found, ...more.values()].filter(chart => chart.lines.length);
  // A single source has the loss of all.
  const sources = (chart, kind, run) => chart.lines.filter(line => line.run === run && line.key.startsWith(kind)).length;
  return drawn.filter(chart => chart.title !== "Loss per source"
    || data.runs.some((_, run) => sources(chart, "train/", run) > 1 || sources(chart, "val/", run) > 1));
}
function colour(chart) {
  const label = line => line.label.replace(/, (validation|learned)$/, ""), labels = [...new Set(chart.lines.map(label))];
  const pairs = [...new Set(chart.lines.map(line => line.run + label(line)))];  // what is dashed has the colour of what is not
  const alone = chart.title === "Loss" || labels.length === 1;
  for (const line of chart.lines) {
    const place = alone ? (several() ? line.run : line.dash ? 1 : 0) : pairs.indexOf(line.run + label(line));
    line.colour = place % COLOURS;
    line.name = (data.runs.length > 1 ? data.runs[line.run].name + (alone && labels.length === 1 ? "" : ": ") : "")
      + (data.runs.length > 1 && alone && labels.length === 1 ? "" : line.label);
    line.id = chart.title + "|" + line.run + "|" + line.key;
  }
}
// Mean with exponentially falling weights, without the pull to 0 at the start.
function smoothed(values, weight) {
  let sum = 0, total = 0;
  return values.map(value => { sum = weight * sum + (1 - weight) * value; total = weight * total + 1 - weight; return sum / total; });
}

const WIDE = 400, HIGH = 210, LEFT = 52, RIGHT = 10, TOP = 8, BOTTOM = 22;
function ticks(low, high, count) {
  const raw = (high - low) / count, size = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(f => f * size).find(s => s >= raw), found = [];
  for (let x = Math.ceil(low / step) * step; x <= high + step * 1e-9; x += step) found.push(Math.abs(x) < step * 1e-9 ? 0 : x);
  return found;
}
class Chart {
  constructor(spec) {
    this.spec = spec;
    this.svg = draw("svg", { role: "img", tabindex: 0, "aria-label": spec.title + " over steps" });
    this.legend = make("div", { class: "legend" });
    this.node = make("section", { class: "sheet chart" }, make("h2", { text: spec.title }),
      spec.note ? make("p", { class: "soft", text: spec.note }) : null, this.svg, this.legend);
    this.svg.addEventListener("pointermove", event => {
      const box = this.svg.getBoundingClientRect();
      this.point(this.toStep((event.clientX - box.left) / box.width * this.wide));
    });
    this.svg.addEventListener("pointerleave", () => this.point(null));
    this.svg.addEventListener("blur", () => this.point(null));
    this.svg.addEventListener("keydown", event => {
      const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!way) return;
      const at = this.at ?? (way > 0 ? this.first : this.last);
      this.point(Math.min(this.last, Math.max(this.first, at + way * Math.max(1, (this.last - this.first) / 100))));
      event.preventDefault();
    });
  }
  toStep(x) { return this.first + (x - LEFT) / (this.wide - LEFT - RIGHT) * (this.last - this.first); }
  update(spec) { this.spec = spec; this.render(); }
  render() {
    const weight = Number(find("smooth").value), from = Number(find("from").value) || 0, log = find("log").checked;
    this.wide = Math.max(260, this.svg.clientWidth || WIDE);
    const shown = this.spec.lines.filter(line => !hidden.has(line.id));
    for (const line of this.spec.lines) {
      const start = Math.max(0, line.curve.s.findIndex(step => step >= from)), none = line.curve.s.at(-1) < from;
      const cut = part => part && !none ? part.slice(start) : part && [];
      const smooth = line.curve.m.length > 4 && !line.dash && this.spec.title !== "Learning rate" ? weight : 0;
      line.shown = { s: cut(line.curve.s), raw: cut(line.curve.m), lo: cut(line.curve.lo), hi: cut(line.curve.hi),
        m: cut(smoothed(line.curve.m, smooth)), smooth };
    }
    const usable = x => !log || x > 0, steps = shown.flatMap(line => [line.shown.s[0], line.shown.s.at(-1)]).filter(x => x != null);
    this.first = Math.min(...steps, Infinity), this.last = Math.max(...steps, -Infinity);
    if (!(this.first <= this.last)) { this.first = from; this.last = from + 1; }
    if (this.first === this.last) { this.first -= 1; this.last += 1; }
    let low = Infinity, high = -Infinity;
    for (const line of shown) for (const part of [line.shown.m, line.shown.raw, line.shown.lo, line.shown.hi])
      for (const x of part || []) if (usable(x)) { if (x < low) low = x; if (x > high) high = x; }
    if (!(low <= high)) { low = log ? 1 : 0; high = log ? 10 : 1; }
    if (!log && low > 0 && low < 0.6 * high) low = 0;
    if (high - low <= 1e-4 * Math.abs(high)) { const room = Math.abs(low) * 0.1 || 1; high += room; low = log ? low / 1.1 : low === 0 ? 0 : Math.max(0, low - room); }
    const scale = log ? Math.log10 : x => x, bottom = scale(low), top = scale(high) + (scale(high) - scale(low)) * 0.04;
    const X = step => LEFT + (step - this.first) / (this.last - this.first) * (this.wide - LEFT - RIGHT);
    const Y = value => HIGH - BOTTOM - (scale(value) - bottom) / (top - bottom) * (HIGH - TOP - BOTTOM);
    const inside = [];
    const marks = log ? logTicks(bottom, top) : ticks(low, high, 4);
    for (const mark of marks) {
      const y = Y(mark).toFixed(1);
      inside.push(draw("path", { class: "grid", d: `M${LEFT} ${y}H${this.wide - RIGHT}` }),
        draw("text", { x: LEFT - 6, y: Number(y) + 4, "text-anchor": "end" }, short(mark)));
    }
    for (const mark of ticks(this.first, this.last, this.wide / 90).filter(x => Number.isInteger(x)))
      inside.push(draw("text", { x: X(mark).toFixed(1), y: HIGH - 6, "text-anchor": X(mark) > this.wide - 30 ? "end" : "middle" },
        mark.toLocaleString("en")));
    inside.push(draw("path", { class: "axis", d: `M${LEFT} ${HIGH - BOTTOM + .5}H${this.wide - RIGHT}` }));
    for (const [step] of (data.runs[0].stages || []).slice(1))
      if (step > this.first && step < this.last) inside.push(draw("path", { class: "stage", d: `M${X(step).toFixed(1)} ${TOP}V${HIGH - BOTTOM}` }));
    const path = (s, values) => {
      let text = "", pen = "M";
      for (let i = 0; i < s.length; i++) {
        if (!usable(values[i])) { pen = "M"; continue; }
        text += pen + X(s[i]).toFixed(1) + " " + Y(values[i]).toFixed(1);
        pen = "L";
      }
      return text;
    };
    for (const line of shown) {
      const { s, raw, m, lo, hi, smooth } = line.shown, kind = "k" + line.colour;
      if (lo && !log) {
        const there = path(s, hi), back = path([...s].reverse(), [...lo].reverse());
        inside.push(draw("path", { class: "band f" + line.colour, d: there + back.replace("M", "L") + "Z" }));
      } else if (smooth) inside.push(draw("path", { class: "curve raw " + kind, d: path(s, raw) }));
      inside.push(draw("path", { class: "curve " + kind + (line.dash ? " dash" : ""), d: path(s, m) }));
      if (s.length === 1 && usable(m[0]) || line.dash && s.length <= 30) s.forEach((step, i) => usable(m[i]) &&
        inside.push(draw("circle", { class: "f" + line.colour, cx: X(step).toFixed(1), cy: Y(m[i]).toFixed(1), r: 3 })));
    }
    this.cursor = draw("path", { class: "cursor", d: "" });
    this.X = X;
    this.svg.setAttribute("viewBox", `0 0 ${this.wide} ${HIGH}`);
    this.svg.setAttribute("preserveAspectRatio", "none");
    this.svg.replaceChildren(...inside, this.cursor);
    this.fill();
  }
  fill() {
    this.values = [];
    this.legend.replaceChildren(...this.spec.lines.map(line => {
      const key = draw("svg", { viewBox: "0 0 18 8", "aria-hidden": "true" });
      key.append(draw("path", { class: "curve k" + line.colour + (line.dash ? " dash" : ""), d: "M0 4H18" }));
      const value = make("span"), button = make("button", { type: "button", "aria-pressed": !hidden.has(line.id) }, key, make("span", { text: line.name }), value);
      button.addEventListener("click", () => { hidden.has(line.id) ? hidden.delete(line.id) : hidden.add(line.id); this.render(); });
      this.values.push(value);
      return button;
    }));
    this.point(null);
  }
  point(step) {
    this.at = step;
    this.cursor?.setAttribute("d", step == null ? "" : `M${this.X(step).toFixed(1)} ${TOP}V${HIGH - BOTTOM}`);
    this.spec.lines.forEach((line, i) => {
      const { s, raw } = line.shown;
      if (!s.length) { this.values[i].textContent = ""; return; }
      let at = s.length - 1;
      if (step != null) for (at = 0; at < s.length - 1 && s[at + 1] - step <= step - s[at]; at++);
      this.values[i].textContent = short(raw[at]) + (step == null ? "" : " at " + s[at].toLocaleString("en"));
    });
  }
}
function logTicks(bottom, top) {
  const found = [];
  for (let power = Math.floor(bottom); power <= Math.ceil(top); power++)
    for (const f of top - bottom > 2.5 ? [1] : [1, 2, 5]) {
      const x = Math.log10(f) + power;
      if (x >= bottom && x <= top) found.push(f * 10 ** power);
    }
  return found;
}

function table(columns, rows) {
  const head = make("tr", {}, ...columns.map(([text, , number]) => make("th", { text, class: number ? "n" : "" })));
  const body = rows.map(row => make("tr", row.other ? { class: "other" } : {}, ...columns.map(([, value, number]) => {
    const cell = value(row);
    return make("td", { class: number ? "n" : "", text: typeof cell === "number" ? cell.toLocaleString("en", { maximumSignificantDigits: 6 }) : cell ?? "" });
  })));
  return make("div", { class: "wide" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...body)));
}
const sheet = (title, ...inside) => make("section", { class: "sheet" }, make("h2", { text: title }), ...inside);
const folded = (title, ...inside) => make("section", { class: "sheet" }, make("details", {}, make("summary", { text: title }), ...inside));
const several = () => data.runs.length > 1, of = run => several() ? run.name + ": " : "";

function heads() {
  return data.runs.map((run, number) => {
    const p = run.progress, ended = run.exit.code != null, age = p.written ? Date.now() / 1000 - p.written : 0;
    const word = !ended ? (p.done ? "step " + p.done.toLocaleString("en") : "starting") : run.exit.code === 0 ? "done" : run.exit.code === 75 ? "stopped on request" : "ended with code " + run.exit.code;
    const kind = !ended ? "" : run.exit.code === 0 ? "good" : run.exit.code === 75 ? "warn" : "bad";
    const last = key => run.curves[key] && short(run.curves[key].m.at(-1)), pairs = [
      ["step", p.done.toLocaleString("en") + (p.last ? " of " + p.last.toLocaleString("en") : "")],
      p.left != null ? ["left", duration(Math.max(0, p.left - (Date.now() - seen) / 1000))] : null,
      p.rate ? ["steps/s", short(p.rate)] : null,
      last("train/loss") ? ["loss", last("train/loss")] : null,
      last("val/loss") ? ["validation", last("val/loss")] : null,
      run.faults.count ? ["faults", run.faults.count.toLocaleString("en")] : null,
      run.quarantine.count ? ["left out", run.quarantine.count.toLocaleString("en") + " records"] : null,
      !ended && p.written ? ["last line", duration(Math.max(0, age)) + " ago"] : null,
    ];
    const bar = make("progress", { max: p.last || 1, value: Math.min(p.done, p.last || 1), "aria-label": "progress" });
    const stages = run.stages.length ? make("p", { class: "soft", text: "stages: " + run.stages.map(([step, name]) => name + " from step " + step.toLocaleString("en")).join(", ") }) : null;
    const reason = ended && run.exit.code !== 0 ? make("p", { class: "soft", text: run.exit.reason }) : null;
    const swatch = draw("svg", { viewBox: "0 0 14 14", width: 14, height: 14, "aria-hidden": "true" });
    swatch.append(draw("circle", { cx: 7, cy: 7, r: 6, class: "f" + number % COLOURS }));
    return make("section", { class: "run" }, make("h2", {}, several() ? swatch : null, make("span", { text: run.name }), make("span", { class: "tag " + kind, text: word })),
      bar, make("div", { class: "numbers" }, ...pairs.filter(Boolean).map(([name, value]) => make("span", {}, make("span", { class: "soft", text: name + " " }), make("b", { text: value })))), stages, reason);
  });
}
const chosen = new Map();  // the step that was asked for, by run: it stays when the page is drawn anew
function samples(run, number) {
  const box = make("div", { class: "ids" }), field = make("input", { type: "number", min: 1, max: run.progress.done, value: chosen.get(number) ?? (run.progress.done || 1), "aria-label": "completed step" });
  const told = make("p", { class: "soft" });
  const show = async () => {
    const step = Number(field.value);
    let rows = (run.samples || {})[step] || [];
    if (live) rows = await fetch(`/step?run=${number}&step=${step}`).then(answer => answer.json()).catch(() => []);
    if (Number(field.value) !== step) return;  // another was asked for meanwhile
    box.replaceChildren(...rows.map(row => make("span", { text: row.source ? `${row.source} ${row.row}` : row.id, title: "sample " + row.id })));
    told.textContent = rows.length ? `${rows.length} samples brought the run to step ${step}, each by source and place in it from 0. As the model sees them: `
      : live ? "This step is not on record." : "This page holds the last steps and those with a fault; ask the run folder: ";
    if (rows.length && live) told.append(make("a", { href: `/inspect?run=${number}&step=${step}`, target: "_blank", text: "tokens and media" }), "; with the loss of each token: ",
      make("code", { text: `python -m tools.replay RUN --step ${step}` }));
    else if (!live) told.append(make("code", { text: `python -m tools.inspect_data --run RUN --step ${Math.max(0, step - 1)} --html step.html` }));
  };
  field.addEventListener("change", () => { chosen.set(number, Number(field.value)); show(); });
  if (run.progress.done) show();
  return sheet(of(run) + "Samples of a step", make("label", { class: "soft" }, "Step ", field), told, box);
}
function facts() {
  const found = [];
  data.runs.forEach((run, number) => {
    if (run.faults.count) found.push(sheet(`${of(run)}Faults: ${run.faults.count.toLocaleString("en")}`, table([["step", r => r.step, 1], ["kind", r => r.kind],
      ["loss", r => typeof r.loss === "number" ? short(r.loss) : r.loss, 1], ["usually", r => r.usual == null ? "" : short(r.usual), 1], ["gradient norm", r => typeof r.grad_norm === "number" ? short(r.grad_norm) : r.grad_norm, 1],
      ["parameter", r => r.parameter], ["records", r => r.records.join("; ")]], [...run.faults.rows].reverse())));
    if (run.quarantine.count) found.push(sheet(`${of(run)}Records left out: ${run.quarantine.count.toLocaleString("en")}`, table([["records", r => r.count, 1], ["split", r => r.split],
      ["source", r => r.source], ["reason", r => r.reason], ["for example", r => r.where]], run.quarantine.rows)));
    if (run.ledger.length) {
      const keys = [...new Set(run.ledger.flatMap(row => Object.keys(row)))].filter(key => key !== "source" && key !== "stage" && (["size", "samples", "trained"].includes(key) || run.ledger.some(row => row[key])));
      const order = ["size", "samples", "trained"], sorted = [...order.filter(k => keys.includes(k)), ...keys.filter(k => !order.includes(k))];
      found.push(sheet(of(run) + "What became of all records", table([...(run.ledger.some(r => r.stage) ? [["stage", r => r.stage]] : []), ["source", r => r.source],
        ...sorted.map(key => [key.replaceAll("_", " "), r => r[key], 1])], run.ledger)));
    }
    if (run.start.parts) found.push(sheet(of(run) + "What learns", table([["part", r => r.part], ["tune", r => r.tune], ["parameters", r => r.num_parameters, 1],
      ["trained", r => r.num_trainable, 1], ["peak rate", r => r.lr == null ? "" : short(r.lr), 1]], run.start.parts)));
    if (run.generations.rows.length) found.push(generations(run));
    if (run.progress.done) found.push(samples(run, number));
    if (run.start.machine) found.push(sheet(of(run) + "Machine", make("p", { text: Object.entries(run.start.machine).map(([key, value]) => key === "device" ? value : `${key.replace("_gib", " GiB")} ${value}`).join(", ") })));
    if (run.exit.code != null) found.push(sheet(of(run) + "Exit", make("p", { text: `code ${run.exit.code}, after step ${run.exit.step ?? "none"}, rank ${run.exit.rank}: ${run.exit.reason}` })));
    if (run.start.plan) found.push(folded(of(run) + "Plan as it was printed", make("pre", { text: run.start.plan.trim() })));
  });
  found.push(settings());
  return found;
}
function generations(run) {
  const { steps, rows } = run.generations, each = steps.map((step, i) => ["step " + step.toLocaleString("en"), row => row.answers[i] ?? ""]);
  return sheet(of(run) + "Answers of validations", table([["record", row => `${row.source} ${row.id}`], ["question", row => row.prompt], ["expected", row => row.expected], ...each], rows));
}
function settings() {
  const keys = [...new Set(data.runs.flatMap(run => Object.keys(run.settings)))].sort();
  const rows = keys.map(key => ({ key, values: data.runs.map(run => run.settings[key]) })).map(row => ({ ...row, other: row.values.some(v => v !== row.values[0]) }));
  const columns = [["setting", r => r.key], ...data.runs.map((run, i) => [several() ? run.name : "value", r => r.values[i]])];
  const differ = rows.filter(row => row.other).map(row => ({ ...row, other: false }));
  return make("section", { class: "sheet" }, several() ? make("h2", { text: `Settings that differ: ${differ.length}` }) : null, several() ? (differ.length ? table(columns, differ) : make("p", { class: "none", text: "none" })) : null,
    make("details", {}, make("summary", { text: `All ${rows.length} settings` }), table(columns, rows)));
}

function show(first) {
  find("head").replaceChildren(make("h1", { text: several() ? data.runs.map(run => run.name).join(", ") : data.runs[0].name }), make("div", { class: "runs" }, ...heads()));
  const specs = plan();
  specs.forEach(colour);
  const same = charts.length === specs.length && charts.every((chart, i) => chart.spec.title === specs[i].title);
  if (!same) {
    charts = specs.map(spec => new Chart(spec));
    find("charts").replaceChildren(...charts.map(chart => chart.node));
  }
  charts.forEach((chart, i) => chart.update(specs[i]));
  if (!charts.length) find("charts").replaceChildren(make("p", { class: "none", text: "No step is logged yet." }));
  const open = [...document.querySelectorAll("#facts details")].map(node => node.open), typing = document.activeElement?.closest("#facts");
  if (first || !typing) {
    find("facts").replaceChildren(...facts());
    document.querySelectorAll("#facts details").forEach((node, i) => { node.open = Boolean(open[i]); });
  }
}
const redraw = () => charts.forEach(chart => chart.render());
for (const id of ["smooth", "log", "from"]) find(id).addEventListener("input", redraw);
let waiting = 0;
addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(redraw, 100); });

async function look() {
  try {
    const found = await fetch("/values?version=" + data.version).then(answer => answer.json());
    if (found.version) { data = found; seen = Date.now(); show(false); }
    else find("head").lastChild.replaceChildren(...heads());
    find("state").textContent = data.runs.every(run => run.exit.code != null) ? "ended" : "live";
  } catch { find("state").textContent = "the server of this page has ended"; }
  setTimeout(look, document.hidden ? 10000 : 2000);
}
show(true);
if (live) look();
