/* Shows which patches survive compression: a frame, and next to it the same frame under two prompts, per stage. */

const CANVAS_PX = 640, THUMB_PX = 192;
const HEAT = [[255, 206, 86, 0.42], [240, 84, 84, 0.62], [158, 42, 140, 0.74], [52, 14, 92, 0.86]]; // from few to many patches per token
const ONLY_HERE = "#21d4fd";
const view = { stage: Infinity, frame: 0, prompts: [0, 1], cursor: null };
let redraw = () => {};
let step = () => {}; // shows another frame or stage

function survivorsSection(sample) {
  const stages = sample.stages ?? [], prompts = sample.prompts ?? [];
  const frames = sample.frames;
  const compressed = prompts.length > 0 && frames.every((frame) => frame.place);
  view.frame = Math.min(view.frame, frames.length - 1);
  view.stage = Math.min(view.stage, stages.length);
  view.prompts = view.prompts.map((prompt) => Math.max(0, Math.min(prompt, prompts.length - 1)));
  view.cursor = null;
  const largest = compressed ? largestSize(sample) : 1;

  const plain = panel("The frame");
  const panels = compressed ? (prompts.length > 1 ? [0, 1] : [0]).map((side) => promptPanel(sample, side)) : [];
  const strip = element("div", { class: "strip", role: "group", "aria-label": "Frames" });
  const thumbs = frames.map((frame, number) => {
    const canvas = element("canvas", { width: THUMB_PX, height: Math.round((THUMB_PX * frame.height) / frame.width) });
    const button = element("button", { type: "button", onclick: () => step({ frame: number }) }, canvas, element("span", {}, frameLabel(sample, frame)));
    strip.append(button);
    return { canvas, button };
  });
  const stageName = element("output", { class: "stage-name" });
  const slider = element("input", { type: "range", id: "stage", min: 0, max: stages.length, step: 1, oninput: () => step({ stage: Number(slider.value) }) });
  const shared = element("p", { class: "quiet", id: "shared" });
  const readout = element("p", { class: "readout", role: "status" });
  frames.forEach((frame) => loadImage(frame, () => redraw()));

  step = ({ frame = view.frame, stage = view.stage }) => {
    view.frame = Math.max(0, Math.min(frame, frames.length - 1));
    view.stage = Math.max(0, Math.min(stage, stages.length));
    view.cursor = null;
    redraw();
    const { button } = thumbs[view.frame]; // scrolls the strip only, not the page
    strip.scrollLeft = Math.min(Math.max(strip.scrollLeft, button.offsetLeft + button.offsetWidth - strip.clientWidth), button.offsetLeft);
  };
  redraw = () => {
    const frame = frames[view.frame];
    const found = (prompt, number = view.frame) =>
      compressed && view.stage > 0 ? patchesOf(sample, prompt, view.stage, number) : null;
    const looked = panels.map(({ side }) => found(view.prompts[side]));
    show(plain.canvas, frame);
    const mark = (patches) => view.cursor === null ? null : { patch: view.cursor, token: patches ? patches.target[view.cursor] : null };
    paint(plain.canvas, frame, null, null, largest, mark(null));
    plain.said.textContent = frameLabel(sample, frame) + (frame.place ? `, ${frame.place[1]} × ${frame.place[2]} patches` : "");
    panels.forEach((one, side) => {
      show(one.canvas, frame);
      paint(one.canvas, frame, looked[side], looked[1 - side], largest, mark(looked[side]));
      one.tell(frame, looked[side]);
    });
    thumbs.forEach(({ canvas, button }, number) => {
      const patches = found(view.prompts[0], number);
      paint(canvas, frames[number], patches, null, largest, patches && mark(looked[0]) && { ...mark(looked[0]), patch: null });
      button.setAttribute("aria-pressed", String(number === view.frame));
    });
    slider.value = view.stage;
    stageName.textContent = stageLabel(sample, view.stage);
    shared.textContent = looked.length > 1 && looked[0] ? sharedText(frames, found) : "";
    readout.textContent = view.cursor === null ? readoutHint(looked) : cursorText(sample, frame, looked);
  };
  const point = (cursor) => {
    if (cursor !== view.cursor) {
      view.cursor = cursor;
      redraw();
    }
  };
  if (compressed) for (const one of [plain, ...panels]) pointing(one.canvas, () => frames[view.frame], point);

  return element(
    "section",
    { class: "survivors", "aria-labelledby": "survivors-title" },
    element("h3", { id: "survivors-title" }, compressed ? "Patches that each prompt keeps" : "Frames"),
    compressed
      ? element("div", { class: "controls" }, element("label", { for: "stage" }, "Stage"), slider, stageName, legend(largest, sample))
      : element("p", { class: "quiet" }, noSurvivorsText(sample)),
    element("div", { class: `panels panels-${1 + panels.length}` }, plain.node, panels.map((one) => one.node)),
    compressed ? readout : null,
    compressed ? shared : null,
    strip,
  );
}

function panel(title) {
  const canvas = element("canvas", { width: CANVAS_PX, height: CANVAS_PX, role: "img" });
  const said = element("p", { class: "quiet" });
  const head = element("div", { class: "head" }, element("h4", {}, title));
  return { canvas, said, head, node: element("figure", {}, head, canvas, element("figcaption", {}, said)) };
}

function promptPanel(sample, side) {
  const one = panel("");
  const answers = answersOf(unitRow);
  const select = element("select", { "aria-label": `Prompt of the ${side ? "right" : "left"} pattern`, onchange: () => {
    view.prompts[side] = select.selectedIndex;
    redraw();
  } }, sample.prompts.map((prompt) => element("option", {}, prompt.prompt_id)));
  const asked = element("p", { class: "asked" }), answered = element("p", { class: "answered" });
  one.head.replaceChildren(select, asked, answered);
  const tell = (frame, patches) => {
    const prompt = view.prompts[side];
    const all = frame.place[1] * frame.place[2];
    const alive = patches ? survivors(frame, patches).length : all;
    const total = sample.grids.reduce((sum, [t, y, x]) => sum + t * y * x, 0);
    const left = view.stage > 0 ? sample.prompts[prompt].stages[view.stage - 1].left : total;
    select.selectedIndex = prompt;
    asked.textContent = answers[prompt]?.question ?? "";
    answered.textContent = answers[prompt]?.text ?? "";
    one.said.textContent = `${whole(alive)} of ${whole(all)} patches survive here, ${whole(left)} of ${whole(total)} in the unit`;
    one.canvas.setAttribute("aria-label", `${sample.prompts[prompt].prompt_id}, ${frameLabel(sample, frame)}: ${one.said.textContent}`);
    one.canvas.dataset.survivors = alive;
  };
  return { ...one, side, tell };
}

/* Drawing. */

function loadImage(frame, done) {
  if (frame.image) return;
  frame.image = new Image();
  frame.image.addEventListener("load", done);
  frame.image.src = `data:image/jpeg;base64,${frame.jpeg}`;
}

function show(canvas, frame) {
  const height = Math.round((CANVAS_PX * frame.height) / frame.width);
  if (canvas.height !== height) canvas.height = height;
}

/* Draws the frame, heat over merged patches, outlines around survivors, hatching over dropped patches.

   `mark`: the patch under the pointer, and the token whose patches are highlighted. */
function paint(canvas, frame, patches, other, largest, mark) {
  const context = canvas.getContext("2d");
  if (!frame.image.complete) return;
  context.drawImage(frame.image, 0, 0, canvas.width, canvas.height);
  if (!frame.place) return;
  const [first, rows, columns] = frame.place;
  const edge = (place, of, px) => Math.round((place * px) / of);
  const cell = (patch) => {
    const [row, column] = [Math.floor(patch / columns), patch % columns];
    const [x, y] = [edge(column, columns, canvas.width), edge(row, rows, canvas.height)];
    return [x, y, edge(column + 1, columns, canvas.width) - x, edge(row + 1, rows, canvas.height) - y];
  };
  const line = Math.max(1, canvas.width / 260);
  if (patches) {
    for (let patch = 0; patch < rows * columns; patch++) {
      if (patches.size[patch] === 0) hatch(context, cell(patch), line);
      else if (patches.size[patch] > 1) {
        context.fillStyle = heat(patches.size[patch], largest);
        context.fillRect(...cell(patch));
      }
    }
    for (const patch of survivors(frame, patches)) {
      const onlyHere = other && other.target[patch] !== first + patch;
      outline(context, cell(patch), onlyHere ? ONLY_HERE : "#fff", onlyHere ? 2 * line : line);
    }
  }
  if (!mark) return;
  patches?.target.forEach((token, patch) => {
    if (token >= 0 && token === mark.token && patch !== mark.patch) outline(context, cell(patch), "#ffe14d", 2 * line, null);
  });
  if (mark.patch !== null) outline(context, cell(mark.patch), "#111", 2 * line, "#ffe14d");
}

function heat(size, largest) {
  const place = Math.min(1, Math.log(size) / Math.log(Math.max(largest, 4))) * (HEAT.length - 1);
  const below = Math.min(Math.floor(place), HEAT.length - 2);
  const mixed = HEAT[below].map((one, channel) => one + (HEAT[below + 1][channel] - one) * (place - below));
  return `rgba(${mixed.slice(0, 3).map(Math.round).join(",")},${mixed[3].toFixed(2)})`;
}

function outline(context, [x, y, width, height], colour, line, around = "rgba(0,0,0,.55)") {
  const inset = line * 0.75;
  if (around) {
    context.lineWidth = line * 2;
    context.strokeStyle = around;
    context.strokeRect(x + line, y + line, width - 2 * line, height - 2 * line);
  }
  context.lineWidth = line;
  context.strokeStyle = colour;
  context.strokeRect(x + inset, y + inset, width - 2 * inset, height - 2 * inset);
}

function hatch(context, [x, y, width, height], line) {
  context.save();
  context.beginPath();
  context.rect(x, y, width, height);
  context.clip();
  context.fillStyle = "rgba(10,10,14,.82)";
  context.fillRect(x, y, width, height);
  context.strokeStyle = "rgba(255,255,255,.28)";
  context.lineWidth = line * 0.7;
  context.beginPath();
  for (let shift = -height; shift < width; shift += 5 * line) {
    context.moveTo(x + shift, y + height);
    context.lineTo(x + shift + height, y);
  }
  context.stroke();
  context.restore();
}

function legend(largest, sample) {
  const sizes = [1];
  while (sizes.at(-1) * 2 <= largest) sizes.push(sizes.at(-1) * 2);
  const swatch = (draw) => {
    const canvas = element("canvas", { width: 48, height: 48, "aria-hidden": "true" });
    const context = canvas.getContext("2d");
    context.fillStyle = "#8a93a3";
    context.fillRect(0, 0, 48, 48);
    draw(context);
    return canvas;
  };
  const dropped = sample.prompts.some((prompt) => prompt.stages.some((_, stage) => sample.frames.some((__, frame) => patchesOf(sample, sample.prompts.indexOf(prompt), stage + 1, frame).size.includes(0))));
  return element(
    "ul",
    { class: "legend", "aria-label": "Legend" },
    element("li", {}, swatch((context) => outline(context, [0, 0, 48, 48], "#fff", 4)), "survives"),
    sample.prompts.length > 1 ? element("li", {}, swatch((context) => outline(context, [0, 0, 48, 48], ONLY_HERE, 4)), "under this prompt only") : null,
    element("li", {}, element("span", { class: "ramp" }, sizes.slice(1).map((size) => swatch((context) => {
      context.fillStyle = heat(size, largest);
      context.fillRect(0, 0, 48, 48);
    }))), `2 to ${whole(largest)} patches in one token`),
    dropped ? element("li", {}, swatch((context) => hatch(context, [0, 0, 48, 48], 2)), "dropped") : null,
  );
}

/* Calls `point` with the patch under the pointer or selected with the arrow keys. */
function pointing(canvas, frameNow, point) {
  canvas.tabIndex = 0;
  canvas.addEventListener("pointermove", (event) => {
    const [, rows, columns] = frameNow().place;
    const box = canvas.getBoundingClientRect();
    const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    if (x >= 0 && x < 1 && y >= 0 && y < 1) point(Math.floor(y * rows) * columns + Math.floor(x * columns));
  });
  canvas.addEventListener("pointerleave", () => point(null));
  canvas.addEventListener("blur", () => point(null));
  canvas.addEventListener("keydown", (event) => {
    const [, rows, columns] = frameNow().place;
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
    if (!(event.key in moves)) return;
    event.preventDefault();
    event.stopPropagation();
    const next = view.cursor === null ? 0 : view.cursor + moves[event.key];
    if (next >= 0 && next < rows * columns) point(next);
  });
}

/* Numbers and texts. */

function survivors(frame, patches) {
  const found = [];
  patches.target.forEach((token, patch) => token === frame.place[0] + patch && found.push(patch));
  return found;
}

function largestSize(sample) {
  let largest = 2;
  sample.prompts.forEach((prompt, number) => prompt.stages.forEach((_, stage) => sample.frames.forEach((__, frame) => {
    for (const size of patchesOf(sample, number, stage + 1, frame).size) largest = Math.max(largest, size);
  })));
  return largest;
}

function frameLabel(sample, frame) {
  return value(unitRow, "uris") ? `image ${frame.index + 1}` : seconds(frame.time_s);
}

function stageLabel(sample, stage) {
  if (stage === 0) return "before the first: every patch is one token";
  const { layer } = sample.stages[stage - 1];
  return `${stage} of ${sample.stages.length}: ${layer < 0 ? "on the embeddings" : `after layer ${layer}`}`;
}

/* How many surviving patches two prompts share in the frames shown. */
function sharedText(frames, found) {
  let [both, left, right] = [0, 0, 0];
  frames.forEach((frame, number) => {
    const [one, other] = [0, 1].map((side) => new Set(survivors(frame, found(view.prompts[side], number))));
    const common = [...one].filter((patch) => other.has(patch)).length;
    [both, left, right] = [both + common, left + one.size - common, right + other.size - common];
  });
  return `Of the ${whole(both + left + right)} patches of these ${whole(frames.length)} frames that survive under either prompt, ${whole(both)} survive under both, ${whole(left)} under the left one only, ${whole(right)} under the right one only.`;
}

function readoutHint(looked) {
  return looked[0] ? "Point at a patch to see which patches share its token." : "";
}

function cursorText(sample, frame, looked) {
  const at = (patch) => `Row ${Math.floor(patch / frame.place[2]) + 1}, column ${(patch % frame.place[2]) + 1}`;
  const sides = looked.map((patches) => {
    if (!patches) return "a token of its own";
    const [size, token] = [patches.size[view.cursor], patches.target[view.cursor]];
    if (size === 0) return "dropped";
    if (size === 1) return "a token of its own";
    const own = token === frame.place[0] + view.cursor;
    return `${own ? "survives for" : "one of"} ${whole(size)} patches${own ? "" : `, in the token at ${placeText(sample, frame, token)}`}`;
  });
  return `${at(view.cursor)}: ${[...new Set(sides)].length === 1 ? sides[0] : sides.map((side, number) => `${number ? "right" : "left"}, ${side}`).join("; ")}.`;
}

/* The position of a vision token: row, column and, if it is another one, the frame or image. */
function placeText(sample, frame, token) {
  let item = 0;
  for (; item < sample.grids.length; item++) {
    const [t, y, x] = sample.grids[item];
    if (token < t * y * x) break;
    token -= t * y * x;
  }
  const [, y, x] = sample.grids[item];
  const time = Math.floor(token / (y * x));
  const place = `row ${Math.floor((token % (y * x)) / x) + 1}, column ${(token % x) + 1}`;
  const index = sample.grids.length > 1 ? item : time * sample.step;
  return index === frame.index ? place : `${place} of ${value(unitRow, "uris") ? "image" : "frame"} ${index + 1}`;
}

function noSurvivorsText(sample) {
  if (!sample.frames.length) return "The unit failed before its first frame.";
  return sample.prompts ? "Compression was disabled." : "The unit failed before compression; these are its frames until then.";
}
