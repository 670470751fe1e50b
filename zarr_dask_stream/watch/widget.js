// The live widget of a stream: draws what the kernel says in `frame`, and sends back what is pressed.
// Plain DOM and canvas, no library, no request to anywhere.

const SVG = "http://www.w3.org/2000/svg";
const PATIENCE_MS = 1500; // after so long without an answer, the press is said to wait
const HIGHEST = 340; // pixels of the map
const LARGEST = 26; // pixels of a cell

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") node.textContent = value;
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function draw(tag, attributes = {}, text = null) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== null) node.textContent = text;
  return node;
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// JupyterLab, Notebook and VS Code say on the body which theme they show; elsewhere the system's choice counts.
function isDark() {
  const body = document.body;
  const light = body.dataset.jpThemeLight;
  if (light !== undefined) return light === "false";
  const kind = body.dataset.vscodeThemeKind ?? "";
  if (kind) return kind.includes("dark") || kind === "vscode-high-contrast";
  return matchMedia("(prefers-color-scheme: dark)").matches;
}

function bytesOf(view) {
  if (!view) return new Uint8Array(0);
  return new Uint8Array(view.buffer ?? view, view.byteOffset ?? 0, view.byteLength);
}

// -- the chunk map ------------------------------------------------------------------------------------

function mix(one, other, share) {
  const part = (colour, at) => parseInt(colour.slice(at, at + 2), 16);
  const channel = (at) => Math.round(part(one, at) * (1 - share) + part(other, at) * share);
  return `rgb(${channel(1)},${channel(3)},${channel(5)})`;
}

// Which chunks a cell stands for, as the kernel's own labels say it.
function placeOf(layout, row, column) {
  const bounds = layout.grid_shape.map((length) => [0, length]);
  const cell = layout.kind === "line" ? [row * layout.shape[1] + column] : [row, column];
  layout.axes.forEach((axis, i) => {
    const length = layout.grid_shape[axis];
    bounds[axis] = [Math.min(cell[i] * layout.merge[i], length), Math.min((cell[i] + 1) * layout.merge[i], length)];
  });
  const single = bounds.every(([a, b]) => b - a === 1);
  const texts = bounds.map(([a, b]) => (b - a === 1 ? `${a}` : `${a}..${b - 1}`));
  return `${single ? "chunk" : "chunks"} (${texts.join(", ")}${texts.length === 1 ? "," : ""})`;
}

class ChunkMap {
  constructor(ask) {
    this.ask = ask;
    this.at = null;
    this.exact = new Map();
    this.canvas = make("canvas", {
      // Screen readers hand the arrow keys to an application, and keep them to themselves on a picture.
      tabindex: "0", role: "application", "aria-roledescription": "chunk map", "aria-label": "Chunk map", class: "zds-canvas",
    });
    this.tip = make("div", { class: "zds-tip", "aria-hidden": "true", hidden: "" });
    this.said = make("p", { class: "zds-said", "aria-live": "polite" });
    this.node = make("div", { class: "zds-map" }, this.canvas, this.tip);
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => { this.tip.hidden = true; });
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.canvas.addEventListener("focus", () => this.select(this.at ?? [0, 0]));
    this.canvas.addEventListener("blur", () => this.paint());
  }

  show(frame, dark) {
    this.frame = frame;
    this.states = bytesOf(frame.cells);
    this.shares = bytesOf(frame.shares);
    this.colours = frame.colours[dark ? "dark" : "light"];
    this.ground = frame.grounds[dark ? "dark" : "light"];
    this.exact.clear();
    this.paint();
    if (this.at && document.activeElement === this.canvas) this.say();
    if (!this.tip.hidden) this.fillTip();
  }

  // Cells as large as fit: whole pixels where there is room for that, fractions where there are more than pixels.
  measure() {
    const [rows, columns] = this.frame.layout.shape;
    const width = Math.max(this.node.clientWidth, 60);
    const whole = (length) => (length >= 2 ? Math.floor(length) : length);
    const down = whole(Math.min(HIGHEST / rows, LARGEST, (2 * width) / columns));
    const across = whole(Math.min(width / columns, 2 * down));
    return { rows, columns, down, across, wide: columns * across, high: rows * down };
  }

  paint() {
    if (!this.frame) return;
    const { rows, columns, down, across, wide, high } = this.measure();
    const scale = devicePixelRatio || 1;
    const canvas = this.canvas;
    this.node.hidden = rows * columns === 0;
    if (rows * columns === 0) return;
    canvas.width = Math.max(Math.round(wide * scale), 1);
    canvas.height = Math.max(Math.round(high * scale), 1);
    canvas.style.width = `${wide}px`;
    canvas.style.height = `${high}px`;
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    context.fillStyle = this.ground;
    context.fillRect(0, 0, wide, high);
    const smaller = Math.min(down, across);
    const gap = smaller >= 5 ? 1 : 0;
    const names = this.frame.states;
    const moving = new Set(["planned", "in flight", "retried"].map((name) => names.indexOf(name)));
    const done = this.colours[names.indexOf("done")];
    const dead = names.indexOf("dead");
    const retried = names.indexOf("retried");
    for (let i = 0; i < rows * columns; i++) {
      const state = this.states[i];
      if (!(state < names.length)) continue; // no chunk of this run
      const x = (i % columns) * across;
      const y = Math.floor(i / columns) * down;
      const share = this.shares[i] / 255;
      const partly = moving.has(state) && share > 0;
      const [wider, higher] = [across - gap, down - gap];
      if (partly && smaller < 4) {
        context.fillStyle = mix(this.colours[state], done, share);
        context.fillRect(x, y, across, down);
        continue;
      }
      context.fillStyle = this.colours[state];
      context.fillRect(x, y, wider, higher);
      if (partly) {
        const filled = Math.max(higher * share, 1);
        context.fillStyle = done;
        context.fillRect(x, y + higher - filled, wider, filled);
      }
      if (smaller >= 8 && (state === dead || state === retried)) {
        const inner = Math.min(wider, higher);
        this.mark(context, x + (wider - inner) / 2, y + (higher - inner) / 2, inner, state === dead);
      }
    }
    if (this.at && document.activeElement === canvas) {
      const [row, column] = this.at;
      const [broad, tall] = [Math.max(across, 5), Math.max(down, 5)];
      const x = Math.min(column * across, wide - broad);
      const y = Math.min(row * down, high - tall);
      context.lineWidth = 1;
      context.strokeStyle = this.ground;
      context.strokeRect(x + 1.5, y + 1.5, broad - 3, tall - 3);
      context.lineWidth = 2;
      context.strokeStyle = this.ground === "#ffffff" ? "#000000" : "#ffffff";
      context.strokeRect(x + 0.5, y + 0.5, broad - 1, tall - 1);
    }
  }

  // Colour is not the only sign of trouble: a cross on what is dead, a ring on what is tried again.
  mark(context, x, y, inner, cross) {
    const pad = inner * 0.28;
    context.strokeStyle = this.ground;
    context.lineWidth = Math.max(inner / 9, 1.25);
    context.beginPath();
    if (cross) {
      context.moveTo(x + pad, y + pad);
      context.lineTo(x + inner - pad, y + inner - pad);
      context.moveTo(x + inner - pad, y + pad);
      context.lineTo(x + pad, y + inner - pad);
    } else {
      context.arc(x + inner / 2, y + inner / 2, inner / 2 - pad, 0, 2 * Math.PI);
    }
    context.stroke();
  }

  textOf([row, column]) {
    const known = this.exact.get(`${row},${column}`);
    if (known) return known;
    const { layout, states } = this.frame;
    const i = row * layout.shape[1] + column;
    const place = placeOf(layout, row, column);
    const state = this.states[i];
    if (!(state < states.length)) return `${place}: not part of this run`;
    const whole = place.startsWith("chunk ");
    return `${place}: ${states[state]}${whole ? "" : `, ${Math.floor((100 * this.shares[i]) / 255)} % ended`}`;
  }

  // The kernel's label of a cell, with exact counts; until it comes, or where no kernel is, our own has to do.
  learn(row, column, text) {
    this.exact.set(`${row},${column}`, text);
    if (this.at && this.at[0] === row && this.at[1] === column && document.activeElement === this.canvas) this.say();
    if (this.over && this.over[0] === row && this.over[1] === column && !this.tip.hidden) setText(this.tip, text);
  }

  request(cell) {
    if (!this.exact.has(`${cell[0]},${cell[1]}`)) this.ask(cell);
  }

  point(event) {
    if (!this.frame) return;
    const { rows, columns, down, across } = this.measure();
    const box = this.canvas.getBoundingClientRect();
    const row = Math.floor((event.clientY - box.top) / down);
    const column = Math.floor((event.clientX - box.left) / across);
    if (row < 0 || column < 0 || row >= rows || column >= columns) return;
    if (!this.over || this.over[0] !== row || this.over[1] !== column) {
      this.over = [row, column];
      this.request(this.over);
    }
    this.tip.hidden = false;
    this.fillTip();
    const x = event.clientX - box.left + 14;
    const room = this.node.clientWidth - this.tip.offsetWidth;
    this.tip.style.left = `${Math.max(Math.min(x, room), 0)}px`;
    this.tip.style.top = `${event.clientY - box.top + 16}px`;
  }

  fillTip() {
    const [rows, columns] = this.frame.layout.shape;
    if (this.over && this.over[0] < rows && this.over[1] < columns) setText(this.tip, this.textOf(this.over));
    else this.tip.hidden = true;
  }

  key(event) {
    if (!this.frame || !this.at) return;
    const [rows, columns] = this.frame.layout.shape;
    const [row, column] = this.at;
    const to = {
      ArrowUp: [row - 1, column], ArrowDown: [row + 1, column],
      ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1],
      Home: [row, 0], End: [row, columns - 1], PageUp: [0, column], PageDown: [rows - 1, column],
    }[event.key];
    if (!to) return;
    event.preventDefault();
    event.stopPropagation(); // the notebook has other plans with these keys
    this.select(to);
  }

  select([row, column]) {
    if (!this.frame) return;
    const [rows, columns] = this.frame.layout.shape;
    if (!rows || !columns) return;
    this.at = [Math.min(Math.max(row, 0), rows - 1), Math.min(Math.max(column, 0), columns - 1)];
    this.request(this.at);
    this.paint();
    this.say();
  }

  say() {
    const [rows, columns] = this.frame.layout.shape;
    if (this.at[0] < rows && this.at[1] < columns) setText(this.said, this.textOf(this.at));
  }
}

// -- lines and bars -----------------------------------------------------------------------------------

function sparkline(series) {
  const node = make("figure", { class: "zds-line" });
  const wide = 180, high = 36;
  node.append(make("figcaption", {}, make("span", { text: series.name }), make("strong", { text: series.now })));
  const picture = draw("svg", { viewBox: `0 0 ${wide} ${high}`, preserveAspectRatio: "none", role: "img" });
  picture.setAttribute("aria-label", `${series.name}: ${series.now}, at most ${series.most}`);
  const values = series.values;
  if (values.length > 1) {
    const top = Math.max(...values, 1e-9);
    const first = series.times[0], span = Math.max(series.times[values.length - 1] - first, 1e-9);
    const points = values.map((value, i) =>
      `${(((series.times[i] - first) / span) * wide).toFixed(1)},${(high - 2 - (value / top) * (high - 4)).toFixed(1)}`);
    picture.append(draw("polygon", { class: "zds-area", points: `0,${high} ${points.join(" ")} ${wide},${high}` }));
    picture.append(draw("polyline", { class: "zds-stroke", points: points.join(" ") }));
  }
  node.append(picture, make("small", { text: values.length > 1 ? `at most ${series.most}` : "nothing yet" }));
  return node;
}

function timeBar(parts) {
  const total = parts.reduce((sum, part) => sum + part.seconds, 0);
  const node = make("div", { class: "zds-time" });
  node.append(make("h4", { text: "Where the time goes" }));
  if (!(total > 0)) {
    node.append(make("p", { class: "zds-quiet", text: "Nothing measured yet." }));
    return node;
  }
  const bar = make("div", { class: "zds-bar", "aria-hidden": "true" });
  const list = make("ul", { class: "zds-key" });
  parts.forEach((part, i) => {
    if (part.seconds <= 0) return;
    const share = (100 * part.seconds) / total;
    const piece = make("span", { class: `zds-part zds-part${i}`, title: `${part.name}: ${part.text}` });
    piece.style.width = `${share}%`;
    bar.append(piece);
    const swatch = make("i", { class: `zds-swatch zds-part${i}`, "aria-hidden": "true" });
    list.append(make("li", { title: part.text }, swatch, `${part.name} ${share < 1 ? "<1" : Math.round(share)} %`));
  });
  node.append(bar, list);
  return node;
}

function letterTable(frame) {
  const node = make("details", { class: "zds-letters" });
  const count = frame.dead;
  node.append(make("summary", { text: `${count.toLocaleString("en")} dead ${count === 1 ? "letter" : "letters"}` }));
  const head = make("tr");
  for (const name of ["chunk", "attempts", "error", "message"]) head.append(make("th", { scope: "col", text: name }));
  const body = make("tbody");
  for (const row of frame.letters) body.append(make("tr", {}, ...row.map((text) => make("td", { text }))));
  const caption = make("caption", { text: "Chunks that were given up" });
  const table = make("table", {}, caption, make("thead", {}, head), body);
  node.append(make("div", { class: "zds-scroll", tabindex: "0", role: "region", "aria-label": "Dead letters" }, table));
  const more = count - frame.letters.length;
  if (more > 0) node.append(make("p", { class: "zds-quiet", text: `and ${more.toLocaleString("en")} more in stream.report.dead_letters` }));
  return node;
}

// -- the widget ---------------------------------------------------------------------------------------

function render({ model, el }) {
  const view = Math.random().toString(36).slice(2);
  let sequence = 0;
  let waits = null; // what was pressed and has not shown in a frame yet

  // A kernel that was started anew has closed the way to it: then there is no answer, and that is said.
  function send(message) {
    try {
      model.send(message);
    } catch (error) {
      console.debug("the kernel can't be reached:", error);
    }
  }

  const name = make("h3", { class: "zds-name" });
  const place = make("p", { class: "zds-place" });
  const badge = make("span", { class: "zds-badge", role: "status" });
  const line = make("p", { class: "zds-numbers" });
  const meter = make("div", { class: "zds-meter", role: "progressbar", "aria-label": "chunks that have ended", "aria-valuemin": "0", "aria-valuemax": "100" }, make("span"));
  const trouble = make("p", { class: "zds-trouble" });
  const pause = make("button", { type: "button", class: "zds-pause" });
  const drain = make("button", { type: "button", class: "zds-drain", title: "Read nothing more, hand out what is in flight, end", text: "Drain" });
  const rate = make("input", { type: "number", min: "0", step: "any", placeholder: "no limit", class: "zds-rate" });
  const note = make("p", { class: "zds-note", role: "status" });
  const axes = make("select", { class: "zds-axes" });
  const axesLabel = make("label", {}, "Axes ", axes);
  const legend = make("ul", { class: "zds-key zds-legend" });
  const map = new ChunkMap((cell) => send({ zds: "label", view, cell }));
  const empty = make("p", { class: "zds-quiet zds-empty" });
  const lines = make("div", { class: "zds-lines" });
  const time = make("div");
  const letters = make("div");
  const controls = make("div", { class: "zds-controls", role: "group", "aria-label": "Control of the stream" },
    pause, drain, make("label", {}, "Rate ", rate, " requests/s"));
  const root = make("section", { class: "zds-live" },
    make("header", {}, make("div", {}, name, place), badge), meter, line, trouble, controls, note,
    make("div", { class: "zds-maphead" }, make("h4", { text: "Chunk map" }), axesLabel),
    map.node, empty, map.said, legend, lines, time, letters);
  el.append(root);

  function press(kind, value, shows) {
    sequence += 1;
    const mine = { kind, shows };
    waits = mine;
    setTimeout(() => {
      if (waits !== mine) return;
      note.textContent = "No answer from the kernel yet: it is busy, or gone. What you pressed acts as soon as it listens.";
    }, PATIENCE_MS);
    send({ zds: kind, value, id: `${view}.${sequence}` });
  }

  pause.addEventListener("click", () => {
    const wanted = !model.get("frame").paused;
    press(wanted ? "pause" : "resume", null, (frame) => frame.paused === wanted);
  });
  drain.addEventListener("click", () => press("drain", null, (frame) => frame.draining || !frame.live));
  rate.addEventListener("change", () => {
    const wanted = rate.value.trim() === "" ? null : Number(rate.value);
    if (wanted !== null && !(wanted > 0)) {
      rate.setAttribute("aria-invalid", "true");
      note.textContent = "A rate is a number of requests per second greater than 0; leave it empty for no limit.";
      return;
    }
    rate.removeAttribute("aria-invalid");
    note.textContent = "";
    press("rate", wanted, (frame) => frame.rate === wanted);
  });
  for (const kind of ["keydown", "keyup", "keypress"]) rate.addEventListener(kind, (event) => event.stopPropagation());
  axes.addEventListener("change", () => press("axes", Number(axes.value), (frame) => frame.map === Number(axes.value)));

  let lettersKey = "";
  function update() {
    const frame = model.get("frame");
    if (!frame || frame.v !== 1) return;
    const dark = isDark();
    root.classList.toggle("zds-dark", dark);
    if (waits && waits.shows(frame)) {
      waits = null;
      note.textContent = "";
    }
    root.setAttribute("aria-label", `Stream of ${frame.url || frame.name}`);
    setText(name, frame.name);
    setText(place, frame.url);
    setText(badge, frame.badge);
    badge.dataset.state = frame.state;
    setText(line, frame.numbers.join(" · "));
    setText(trouble, frame.troubles.join(" · "));
    trouble.hidden = frame.troubles.length === 0;
    const share = frame.share;
    meter.hidden = share === null;
    if (share !== null) {
      meter.firstChild.style.width = `${100 * share}%`;
      meter.setAttribute("aria-valuenow", Math.floor(100 * share));
      meter.setAttribute("aria-valuetext", frame.numbers[0]);
    }
    setText(pause, frame.paused ? "Resume" : "Pause");
    pause.title = frame.paused ? "Go on reading" : "Submit nothing new; what is in flight comes back and can be taken";
    pause.disabled = frame.over && !frame.paused;
    drain.disabled = !frame.live || frame.draining;
    if (document.activeElement !== rate) rate.value = frame.rate === null ? "" : String(frame.rate);
    const options = frame.maps.join("|");
    if (axes.dataset.options !== options) {
      axes.dataset.options = options;
      axes.replaceChildren(...frame.maps.map((text, i) => make("option", { value: i, text })));
    }
    if (!waits || waits.kind !== "axes") axes.value = String(frame.map);
    axesLabel.hidden = frame.maps.length < 2;
    map.show(frame, dark);
    setText(empty, frame.empty);
    empty.hidden = !frame.empty;
    map.canvas.setAttribute("aria-label", `Chunk map, ${frame.layout.shape.join(" by ")} cells: ` +
      `${frame.counts.map((n, i) => (n ? `${n.toLocaleString("en")} ${frame.states[i]}` : "")).filter(Boolean).join(", ")}. Arrow keys move from cell to cell.`);
    const colours = frame.colours[dark ? "dark" : "light"];
    legend.replaceChildren(...frame.states.flatMap((state, i) => {
      if (!frame.counts[i] && !["planned", "in flight", "done"].includes(state)) return [];
      const swatch = make("i", { class: "zds-swatch", "aria-hidden": "true" });
      swatch.style.background = colours[i];
      if (state === "dead") swatch.textContent = "×";
      if (state === "retried") swatch.textContent = "○";
      return [make("li", {}, swatch, `${state} ${frame.counts[i].toLocaleString("en")}`)];
    }));
    legend.hidden = Boolean(frame.empty);
    lines.replaceChildren(...frame.series.map(sparkline));
    time.replaceChildren(timeBar(frame.time));
    const key = `${frame.run}.${frame.dead}`;
    if (key !== lettersKey) { // not at each frame: an open table stays open
      lettersKey = key;
      const open = letters.querySelector("details")?.open ?? false;
      letters.replaceChildren(...(frame.dead ? [letterTable(frame)] : []));
      if (open && frame.dead) letters.querySelector("details").open = true;
    }
  }

  // Frames that come faster than the screen can show them are drawn once.
  let asked = 0;
  const schedule = () => {
    if (!asked) asked = requestAnimationFrame(() => { asked = 0; update(); });
  };
  const heard = (message) => {
    if (message?.zds === "label" && message.view === view) map.learn(...message.cell, message.text);
  };
  model.on("change:frame", schedule);
  model.on("msg:custom", heard);
  const theme = new MutationObserver(schedule);
  theme.observe(document.body, { attributes: true });
  const system = matchMedia("(prefers-color-scheme: dark)");
  system.addEventListener("change", schedule);
  const size = new ResizeObserver(() => map.paint());
  size.observe(root);
  update();
  return () => {
    model.off("change:frame", schedule);
    model.off("msg:custom", heard);
    theme.disconnect();
    size.disconnect();
    system.removeEventListener("change", schedule);
    if (asked) cancelAnimationFrame(asked);
  };
}

export default { render };
