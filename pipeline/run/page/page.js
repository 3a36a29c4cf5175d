/* Handles the page-wide keys and the theme, and shows the first unit. */

document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});

document.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const typing = event.target.matches("input, select, textarea");
  if (event.target === searchField && event.key === "Escape") {
    searchField.value = "";
    applyFilters();
    list.focus();
  } else if (event.target === searchField && (event.key === "ArrowDown" || event.key === "Enter")) {
    event.preventDefault();
    list.focus();
    choose(Math.max(chosen, 0));
  } else if (!typing && event.key === "/") {
    event.preventDefault();
    searchField.select();
    searchField.focus();
  } else if (!typing && event.key === "ArrowLeft") step({ frame: view.frame - 1 });
  else if (!typing && event.key === "ArrowRight") step({ frame: view.frame + 1 });
  else if (!typing && event.key === "[") step({ stage: view.stage - 1 });
  else if (!typing && event.key === "]") step({ stage: view.stage + 1 });
});

/* Whether the URL fragment is the id of the row. */
function isAsked(row) {
  try {
    return value(row, "id") === decodeURIComponent(location.hash.slice(1));
  } catch { // not a fragment written by this page
    return false;
  }
}

/* The list position of the unit in the URL, else of the first unit with several prompts, with frames, or at all. */
function firstPlace() {
  const found = [
    isAsked,
    (row) => sampleOf(row)?.prompts?.length > 1,
    (row) => sampleOf(row) !== null,
  ].map((fits) => shown.findIndex(fits)).find((place) => place >= 0);
  return found ?? 0;
}

addEventListener("hashchange", () => {
  const place = shown.findIndex(isAsked);
  if (place >= 0) choose(place);
});

startList();
applyFilters();
if (COUNT) choose(firstPlace());
else unitNode.append(element("p", { class: "note" }, "No unit has a row yet."));
