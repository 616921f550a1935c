"use strict";
// Everything from the trace goes into text nodes, never into markup.
function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined && text !== null) made.textContent = text;
  return made;
}

function shaded(candidate) {
  const box = element("div", "text");
  const letters = Array.from(candidate.text);
  let at = 0, marked = candidate.mark === null;
  const put = (from, to, look) => {
    if (to > from) box.append(element("span", "e" + (look >> 1) + (look & 1 ? " phase" : ""), letters.slice(from, to).join("")));
  };
  for (let i = 0; i < candidate.pieces.length; i += 2) {
    const end = at + candidate.pieces[i], look = candidate.pieces[i + 1];
    if (!marked && candidate.mark <= end) {
      put(at, candidate.mark, look);
      box.append(element("b", "mark", "▼"));
      at = candidate.mark;
      marked = true;
    }
    put(at, end, look);
    at = end;
  }
  if (at < letters.length) box.append(letters.slice(at).join(""));
  return box;
}

function strip(candidate) {
  const box = element("div", "strip");
  for (const level of candidate.strip) box.append(element("i", "e" + level));
  if (candidate.centroid !== null) {
    const mark = element("b", "mark", "▼");
    mark.style.left = (100 * candidate.centroid).toFixed(1) + "%";
    box.append(mark);
  }
  return box;
}

function number(value) {
  return value === null || value === undefined ? "–" : value.toPrecision(3);
}

function card(candidate, chosen) {
  const box = element("section", "candidate" + (chosen ? " chosen" : ""));
  box.append(element("h3", "", "#" + candidate.index + (chosen ? " ★ chosen" : "")));
  const facts = ["score " + number(candidate.score), "centroid " + number(candidate.centroid),
    candidate.tokens === null ? "no signals" : candidate.tokens + " tokens", candidate.phases + " phases"];
  if (candidate.seconds !== null) facts.push(number(candidate.seconds) + " s");
  if (candidate.finish) facts.push(candidate.finish);
  box.append(element("p", "facts", facts.join(" · ")));
  for (const [name, found] of Object.entries(candidate.flaws)) box.append(element("p", "facts flaw", name + ": " + found));
  for (const call of candidate.calls) box.append(element("p", "text call", "→ " + call));
  if (candidate.answer) box.append(element("p", "text", candidate.answer));
  if (candidate.strip) box.append(strip(candidate));
  box.append(shaded(candidate));
  if (!candidate.exact) box.append(element("p", "facts", "Shading is approximate: the trace has no token boundaries, so the text is divided evenly."));
  return box;
}

function table(data, byIndex) {
  const box = element("div", "scroll scores"), made = element("table"), head = element("tr");
  for (const title of ["rank", "#", "score: " + data.scorer, "centroid", "tokens", "phases", "seconds"]) head.append(element("th", "", title));
  head.append(element("th", "text", "flaws"), element("th", "text", "action"));
  made.append(head);
  data.order.forEach((index, rank) => {
    const c = byIndex.get(index), row = element("tr", index === data.chosen ? "chosen" : "");
    for (const text of [rank + 1, index, number(c.score), number(c.centroid), c.tokens === null ? "–" : c.tokens, c.phases, number(c.seconds)]) row.append(element("td", "", text));
    row.append(element("td", "text flaw", Object.keys(c.flaws).join(", ")));
    row.append(element("td", "text", (c.calls.join(" ") || c.answer || c.text).slice(0, 120)));
    made.append(row);
  });
  for (const [index, text] of Object.entries(data.failures)) {
    const row = element("tr"), cell = element("td", "text flaw", "failed: " + text);
    cell.colSpan = 7;
    row.append(element("td", "", "–"), element("td", "", index), cell);
    made.append(row);
  }
  box.append(made);
  return box;
}

function show(step) {
  const source = step.querySelector("script");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  source.remove();
  const byIndex = new Map(data.candidates.map((candidate) => [candidate.index, candidate]));
  step.append(table(data, byIndex));
  const row = element("div", "candidates");
  row.tabIndex = 0;
  for (const index of data.order) row.append(card(byIndex.get(index), index === data.chosen));
  step.append(row);
}

for (const step of document.querySelectorAll("details.step")) {
  step.addEventListener("toggle", () => { if (step.open) show(step); });
}
const first = document.querySelector("details.step");
if (first) first.open = true;
