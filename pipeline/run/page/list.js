/* The list of units: search, filters, order. Only the visible rows are in the document. */

const ROW_PX = 58, BEYOND = 8;
const STATUSES = ["ok", "truncated", "skipped", "error"];
const ORDERS = {
  file: null,
  "slowest first": (row) => -["wait_s", "encode_s", "prefill_s", "generate_s"].reduce((sum, name) => sum + (value(row, name) ?? 0), 0),
  "most frames": (row) => -(value(row, "frames")?.[0] ?? 0),
  "most vision tokens": (row) => -(value(row, "vision_tokens") ?? 0),
  "most attempts": (row) => -value(row, "attempts"),
};
const list = document.getElementById("list");
const listRows = document.getElementById("rows");
const searchField = document.getElementById("search");
const filters = { statuses: new Set(), framed: false };
const drawn = new Map();
let shown = Array.from({ length: COUNT }, (_, row) => row);
let chosen = -1; // an index into `shown`
let haystacks = null;

function haystackOf(row) {
  haystacks ??= new Array(COUNT);
  haystacks[row] ??= [
    ...["uri", "id", "error_stage", "error_type", "error_message"].map((name) => value(row, name) ?? ""),
    ...(value(row, "uris") ?? []),
    ...answersOf(row).map((answer) => `${answer.id} ${answer.question} ${answer.text}`),
  ].join("\n").toLowerCase();
  return haystacks[row];
}

/* List the rows that match the filters; the chosen unit stays chosen if it matches. */
function applyFilters() {
  const terms = searchField.value.toLowerCase().split(/\s+/).filter(Boolean);
  const before = shown[chosen];
  shown = [];
  for (let row = 0; row < COUNT; row++) {
    if (filters.statuses.size && !filters.statuses.has(value(row, "status"))) continue;
    if (filters.framed && !(value(row, "id") in DATA.samples)) continue;
    if (terms.length && !terms.every((term) => haystackOf(row).includes(term))) continue;
    shown.push(row);
  }
  const rank = ORDERS[document.getElementById("order").value];
  if (rank) {
    const ranks = new Map(shown.map((row) => [row, rank(row)]));
    shown.sort((one, other) => ranks.get(one) - ranks.get(other) || one - other);
  }
  document.getElementById("found").textContent =
    shown.length === COUNT ? `${whole(COUNT)} units` : `${whole(shown.length)} of ${whole(COUNT)} units`;
  listRows.style.height = `${shown.length * ROW_PX}px`;
  for (const node of drawn.values()) node.remove();
  drawn.clear();
  chosen = shown.indexOf(before);
  if (chosen < 0) list.scrollTop = 0;
  else keepInSight();
  drawRows();
}

function drawRows() {
  const first = Math.max(0, Math.floor(list.scrollTop / ROW_PX) - BEYOND);
  const last = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW_PX) + BEYOND);
  for (const [place, node] of drawn) {
    if (place < first || place >= last) {
      node.remove();
      drawn.delete(place);
    }
  }
  for (let place = first; place < last; place++) {
    if (!drawn.has(place)) {
      const node = rowNode(place);
      drawn.set(place, node);
      listRows.append(node);
    }
    drawn.get(place).setAttribute("aria-selected", String(place === chosen));
  }
  if (drawn.has(chosen)) list.setAttribute("aria-activedescendant", `row-${chosen}`);
  else list.removeAttribute("aria-activedescendant");
}

function rowNode(place) {
  const row = shown[place];
  const status = value(row, "status");
  const frame = sampleOf(row)?.frames[0];
  const said = value(row, "error_message") ?? value(row, "answers")[0]?.[1] ?? "";
  const node = element(
    "div",
    { id: `row-${place}`, role: "option", class: "row", "aria-posinset": place + 1, "aria-setsize": shown.length, onclick: () => openUnit(place) },
    frame
      ? element("img", { class: "thumb", alt: "", src: `data:image/jpeg;base64,${frame.jpeg}` })
      : element("span", { class: "thumb" }),
    element("span", { class: "name" }, nameOf(row), windowOf(row) && element("small", {}, ` ${windowOf(row)}`)),
    element("span", { class: `status status-${status}` }, status === "error" || status === "skipped" ? value(row, "error_type") ?? status : status),
    element("span", { class: "said" }, said.slice(0, 200)),
  );
  node.style.top = `${place * ROW_PX}px`;
  return node;
}

/* Choose and show the unit at a position of the list. */
function choose(place) {
  if (!shown.length) return;
  chosen = Math.min(Math.max(place, 0), shown.length - 1);
  keepInSight();
  drawRows();
  showUnit(shown[chosen]);
  try {
    history.replaceState(null, "", `#${encodeURIComponent(value(shown[chosen], "id"))}`);
  } catch { /* a viewer without URLs */ }
}

/* Choose a unit and, on narrow screens where it is below the list, scroll to it. */
function openUnit(place) {
  choose(place);
  if (matchMedia("(max-width: 60rem)").matches) unitNode.scrollIntoView();
}

function keepInSight() {
  const [top, bottom] = [chosen * ROW_PX, (chosen + 1) * ROW_PX];
  if (top < list.scrollTop) list.scrollTop = top;
  else if (bottom > list.scrollTop + list.clientHeight) list.scrollTop = bottom - list.clientHeight;
}

function startList() {
  const chips = document.getElementById("chips");
  const counts = Object.fromEntries(STATUSES.map((status) => [status, 0]));
  for (let row = 0; row < COUNT; row++) counts[value(row, "status")]++;
  const chip = (label, count, toggle) => {
    const node = element("button", { type: "button", class: "chip", "aria-pressed": "false", "data-filter": label }, `${label} `, element("b", {}, whole(count)));
    node.addEventListener("click", () => {
      node.setAttribute("aria-pressed", String(toggle()));
      applyFilters();
    });
    chips.append(node);
  };
  for (const status of STATUSES.filter((name) => counts[name])) {
    chip(status, counts[status], () => !filters.statuses.delete(status) && Boolean(filters.statuses.add(status)));
  }
  const framed = Object.keys(DATA.samples).length;
  if (framed && framed < COUNT) chip("with frames", framed, () => (filters.framed = !filters.framed));
  const order = document.getElementById("order");
  for (const name of Object.keys(ORDERS)) order.append(element("option", {}, name));
  order.addEventListener("change", applyFilters);
  searchField.addEventListener("input", applyFilters);
  document.getElementById("filters").addEventListener("submit", (event) => event.preventDefault());
  list.addEventListener("scroll", drawRows, { passive: true });
  new ResizeObserver(drawRows).observe(list);
  list.addEventListener("keydown", (event) => {
    if (event.key === "Enter") unitNode.focus();
    const page = Math.max(1, Math.floor(list.clientHeight / ROW_PX) - 1);
    const places = { ArrowDown: chosen + 1, ArrowUp: chosen - 1, PageDown: chosen + page, PageUp: chosen - page, Home: 0, End: shown.length - 1 };
    if (!(event.key in places) || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    choose(places[event.key]);
  });
  for (const button of document.querySelectorAll("button[data-search]")) {
    button.addEventListener("click", () => {
      searchField.value = button.dataset.search;
      applyFilters();
      choose(0);
      list.scrollIntoView({ block: "nearest" });
      list.focus();
    });
  }
}
