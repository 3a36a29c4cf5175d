"use strict";

/* Reads the page's data: columns of rows, prompts, versions, and the patches of samples. Formats numbers. */

const DATA = JSON.parse(document.getElementById("data").textContent);
const COLUMN = Object.fromEntries(DATA.columns.map((name, place) => [name, place]));
const COUNT = DATA.rows.length;
const FOLDER = commonFolder();

function value(row, name) {
  return DATA.rows[row][COLUMN[name]];
}

function answersOf(row) {
  return value(row, "answers").map(([prompt, text, status, promptTokens, outputTokens]) => {
    const [id, question] = DATA.prompts[prompt];
    return { id, question, text, status, promptTokens, outputTokens };
  });
}

/* The common folder of all files of the run, with its slash; names are shown relative to it. */
function commonFolder() {
  if (COUNT === 0) return "";
  let common = value(0, "uri");
  for (let row = 1; row < COUNT; row++) {
    const uri = value(row, "uri");
    let same = 0;
    while (same < common.length && common[same] === uri[same]) same++;
    common = common.slice(0, same);
  }
  return common.slice(0, common.lastIndexOf("/") + 1);
}

function nameOf(row) {
  return value(row, "uri").slice(FOLDER.length) || value(row, "uri");
}

function windowOf(row) {
  const [start, end] = [value(row, "start_s"), value(row, "end_s")];
  if (start === null && end === null) return "";
  return `${seconds(start ?? 0)} – ${end === null ? "end" : seconds(end)}`;
}

const samples = new Map();

/* The row's sample record, or null; parsed on first use. */
function sampleOf(row) {
  const number = DATA.samples[value(row, "id")];
  if (number === undefined) return null;
  if (!samples.has(number)) {
    samples.set(number, JSON.parse(document.getElementById(`sample-${number}`).textContent));
  }
  return samples.get(number);
}

/* For a sample's prompt, stage (from 1) and frame: the token that each patch belongs to, and its number of patches. */
function patchesOf(sample, prompt, stage, frame) {
  const found = sample.prompts[prompt].stages[stage - 1];
  const key = `patches${frame}`;
  found[key] ??= { target: numbers(found.target[frame], Int32Array), size: numbers(found.size[frame], Uint16Array) };
  return found[key];
}

function numbers(base64, Kind) {
  return new Kind(Uint8Array.from(atob(base64), (character) => character.charCodeAt(0)).buffer);
}

/* Formatting. */

function seconds(count) {
  if (count < 60) return `${Number(count.toFixed(2))} s`;
  const [hours, minutes] = [Math.floor(count / 3600), Math.floor(count / 60) % 60];
  const rest = (count % 60).toFixed(count % 1 ? 1 : 0).padStart(count % 1 ? 4 : 2, "0");
  return hours ? `${hours}:${String(minutes).padStart(2, "0")}:${rest}` : `${minutes}:${rest}`;
}

function bytes(count) {
  let unit = 0;
  for (; count >= 1024 && unit < 4; unit++) count /= 1024;
  return `${Number(count.toPrecision(4))} ${["B", "KiB", "MiB", "GiB", "TiB"][unit]}`;
}

function whole(count) {
  return count.toLocaleString("en");
}

/* Creates an element; strings among the children become text, never markup. */
function element(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, content] of Object.entries(attributes ?? {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), content);
    else if (content !== null && content !== false) node.setAttribute(name, content === true ? "" : content);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}
