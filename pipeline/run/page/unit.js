/* Shows one unit: its error, frames, answers and cost. */

const SPENT = ["wait", "encode", "prefill", "generate"];
const unitNode = document.getElementById("unit");
let unitRow = -1;

function showUnit(row) {
  unitRow = row;
  redraw = step = () => {};
  const sample = sampleOf(row);
  const answers = answersOf(row);
  const status = value(row, "status");
  unitNode.replaceChildren(
    element(
      "header",
      {},
      element("h2", {}, nameOf(row), " ", element("span", { class: `status status-${status}` }, status)),
      element("p", { class: "uri quiet" }, [value(row, "uri"), windowOf(row)].filter(Boolean).join(" · ")),
    ),
    ...[
      value(row, "error_type") && errorSection(row),
      sample?.frames.length && survivorsSection(sample),
      answers.length > 0 && answersSection(answers),
      !sample?.frames.length && element("p", { class: "note" }, framesNote(sample)),
      costSection(row),
    ].filter(Boolean),
  );
  redraw();
}

function errorSection(row) {
  return element(
    "section",
    { class: "error", "aria-label": "Error" },
    element("p", {}, element("b", {}, value(row, "error_type")), ` in ${value(row, "error_stage")}, attempt ${value(row, "attempts")}`),
    element("p", { class: "message" }, value(row, "error_message") ?? ""),
  );
}

function answersSection(answers) {
  return element(
    "section",
    { "aria-label": "Answers" },
    element(
      "table",
      { class: "answers" },
      element("thead", {}, element("tr", {}, ["Prompt", "Answer", "Tokens in", "out"].map((name) => element("th", { scope: "col" }, name)))),
      element("tbody", {}, answers.map((answer) => element(
        "tr",
        {},
        element("th", { scope: "row" }, element("code", {}, answer.id), element("span", { class: "quiet" }, answer.question)),
        element("td", {}, answer.text, answer.status === "ok" ? null : element("span", { class: "status status-truncated" }, answer.status)),
        element("td", { class: "count" }, whole(answer.promptTokens)),
        element("td", { class: "count" }, whole(answer.outputTokens)),
      ))),
    ),
  );
}

function framesNote(sample) {
  if (sample) return noSurvivorsText(sample);
  const framed = Object.keys(DATA.samples).length;
  return `Frames are recorded for ${whole(framed)} units only (report.samples), not for this one.`;
}

function costSection(row) {
  const of = (name) => value(row, name);
  const known = (name, format) => (of(name) === null ? null : format(of(name)));
  const frames = of("frames");
  const spent = SPENT.map((name) => [name, of(`${name}_s`) ?? 0]);
  const total = spent.reduce((sum, [, took]) => sum + took, 0);
  const bar = element("div", { class: "bar", "aria-hidden": "true" }, spent.map(([name, took]) => {
    const part = element("span", { class: `part-${name}` });
    part.style.width = `${(100 * took) / (total || 1)}%`;
    return part;
  }));
  const version = DATA.versions[of("version")];
  const facts = [
    ["Frames", frames && `${whole(frames[0])}, ${seconds(frames[1])} to ${seconds(frames[2])}`],
    ["Vision tokens", of("vision_tokens") && `${whole(of("vision_tokens"))} → ${whole(of("kept_tokens"))} in the last layers`],
    ["Vision KV kept", known("retention", (share) => `${(100 * share).toFixed(1)} %`)],
    ["KV cache", of("kv_bytes") && `${bytes(of("kv_bytes"))} of ${bytes(of("kv_bytes_uncompressed"))}`],
    ["Decoding", known("decode_s", seconds)],
    ["Attempts", whole(of("attempts"))],
    ["Peak memory", known("peak_memory_bytes", bytes)],
    ["Size", known("size_bytes", bytes)],
    ["Etag", of("etag")],
    ["Unit", of("id")],
    ["Model", version.model],
    ["Configuration", version.config_hash],
  ];
  return element(
    "section",
    { class: "cost", "aria-label": "Cost" },
    element("h3", {}, "Cost"),
    total > 0 ? bar : null,
    total > 0 ? element("p", { class: "quiet" }, spent.map(([name, took]) => element("span", { class: `key key-${name}` }, `${name} ${seconds(took)} `))) : null,
    element("dl", { class: "facts" }, facts.filter(([, fact]) => fact !== null && fact !== undefined).map(([name, fact]) => element("div", {}, element("dt", {}, name), element("dd", {}, String(fact))))),
    of("uris") ? element("details", {}, element("summary", {}, `${of("uris").length} images`), element("ol", {}, of("uris").map((uri) => element("li", {}, uri)))) : null,
  );
}
