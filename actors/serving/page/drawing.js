// A decision's candidates, drawn: as curves over the chunk, as paths from above, and by confidence.

import { drawn, element } from "./dom.js";

const MOST_COLOURS = 6;
const WIDTH = 220, HEIGHT = 110, EDGE = 6;
const SIDE = 320, MARGIN = 26;

// Return what is drawn of a decision: [{chunk, colour, kept}], the kept one last, so that it lies on top.
export function linesOf(decision) {
  const colour = (index) => (decision.candidates.length <= MOST_COLOURS ? `series-${index + 1}` : "many");
  const lines = decision.candidates.map((chunk, index) => ({
    chunk,
    colour: colour(index),
    kept: index === decision.chosen,
  }));
  if (decision.chosen < 0) lines.push({ chunk: decision.actions, colour: "ink", kept: true });
  return lines.filter((line) => isWhole(line.chunk)).sort((one, other) => one.kept - other.kept);
}

export const isWhole = (chunk) => Array.isArray(chunk) && chunk.flat().every((value) => Number.isFinite(value));

// Return a figure per action dimension with every candidate's values over the steps of the chunk.
export function curves(decision, space) {
  const lines = linesOf(decision);
  return space.names.map((name, dimension) => {
    const [low, high] = [space.low[dimension], space.high[dimension]];
    const steps = lines[0]?.chunk.length ?? 1;
    const across = (step) => (steps > 1 ? EDGE + ((WIDTH - 2 * EDGE) * step) / (steps - 1) : WIDTH / 2);
    const up = (value) => EDGE + (HEIGHT - 2 * EDGE) * (1 - (value - low) / (high - low));
    const label = `${name} of ${lines.length} candidates over ${steps} steps`;
    const picture = drawn("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label });
    picture.append(drawn("rect", { class: "ground", width: WIDTH, height: HEIGHT, rx: 4 }));
    if (space.execute < steps) {
      const left = (across(space.execute - 1) + across(space.execute)) / 2;
      picture.append(drawn("rect", { class: "later", x: left, width: WIDTH - left, height: HEIGHT }));
    }
    if (low < 0 && high > 0) {
      picture.append(drawn("line", { class: "zero", x1: 0, x2: WIDTH, y1: up(0), y2: up(0) }));
    }
    for (const line of lines) {
      const points = line.chunk.map((action, step) => [across(step), up(action[dimension])]);
      picture.append(trace(points, line), ...(line.kept ? points.map((point) => dot(point, line, 2.6)) : []));
    }
    const caption = element("figcaption", {}, element("b", {}, name), ` ${short(low)} to ${short(high)}`);
    return element("figure", {}, caption, picture);
  });
}

// Return the indices of the dimensions that move across the table; null for a policy without them.
export function planar(space) {
  const found = ["dx", "dy"].map((name) => space.names.indexOf(name));
  return found.includes(-1) ? null : found;
}

// Return the points passed so far: sums of the executed steps of `decisions`, from the origin.
export function wayOf(decisions, space, [x, y]) {
  const way = [[0, 0]];
  for (const decision of decisions) {
    for (const action of decision.actions.slice(0, decision.executed ?? space.execute)) {
      way.push(moved(way.at(-1), action[x], action[y]));
    }
  }
  return way;
}

// Draw into `picture` the way so far and, from its end, where each candidate of `decision` (or null) leads.
// `extent` are points that the frame takes in beside those drawn, so that it stands still.
export function fromAbove(picture, way, decision, [x, y], extent) {
  const paths = (decision ? linesOf(decision) : []).map((line) => ({
    ...line,
    points: line.chunk.reduce((path, action) => [...path, moved(path.at(-1), action[x], action[y])], [way.at(-1)]),
  }));
  const place = framing([...way, ...extent, ...paths.flatMap((path) => path.points)]);
  picture.setAttribute("viewBox", `0 0 ${SIDE} ${SIDE}`);
  const grey = { colour: "way", kept: false };
  picture.replaceChildren(
    drawn("rect", { class: "ground", width: SIDE, height: SIDE, rx: 4 }),
    drawn("text", { x: SIDE - 8, y: SIDE - 9, "text-anchor": "end" }, "dx →"),
    drawn("text", { x: 9, y: 18 }, "↑ dy"),
    trace(way.map(place), grey),
    dot(place(way[0]), grey, 3),
    ...paths.map((path) => trace(path.points.map(place), path)),
    ...paths.map((path) => dot(place(path.points.at(-1)), path, path.kept ? 4.5 : 2.6)),
    drawn("circle", { class: "here", cx: place(way.at(-1))[0], cy: place(way.at(-1))[1], r: 5 }),
  );
}

// Return a row per candidate: its number, a bar from the lowest to the highest confidence, the number in words.
export function bars(decision) {
  const values = decision.confidences.filter((value) => Number.isFinite(value));
  const low = Math.min(...values);
  const span = Math.max(...values) - low || 1;
  return decision.candidates.flatMap((chunk, index) => {
    const value = decision.confidences[index];
    const there = isWhole(chunk);
    const kept = index === decision.chosen ? "kept" : "";
    const colour = decision.candidates.length <= MOST_COLOURS ? `series-${index + 1}` : "many";
    const bar = element("i", { class: `${colour} ${kept}` });
    bar.style.width = Number.isFinite(value) ? `${8 + (92 * (value - low)) / span}%` : "0";
    const words = [there ? "" : "not decodable", Number.isFinite(value) ? value.toFixed(3) : "", kept];
    return [
      element("b", { class: kept }, String(index + 1)),
      element("span", { class: "track" }, bar),
      element("span", { class: kept }, words.filter(Boolean).join(" ")),
    ];
  });
}

const moved = ([across, up], dx, dy) => [across + dx, up + dy];

const short = (value) => String(Math.round(value * 100) / 100).replace("-", "−");

// Return the map from points to pixels, the same scale both ways, that takes in all `points`.
function framing(points) {
  const [xs, ys] = [points.map((point) => point[0]), points.map((point) => point[1])];
  const [left, right, low, high] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const span = Math.max(right - left, high - low, 1);
  const scale = (SIDE - 2 * MARGIN) / span;
  const [middle, centre] = [(left + right) / 2, (low + high) / 2];
  return ([x, y]) => [SIDE / 2 + (x - middle) * scale, SIDE / 2 - (y - centre) * scale];
}

function trace(points, { colour, kept }) {
  const path = points.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" ");
  return drawn("polyline", { class: `${colour} ${kept ? "kept" : "other"}`, points: path });
}

function dot([x, y], { colour, kept }, radius) {
  return drawn("circle", { class: `${colour} ${kept ? "kept" : "other"}`, cx: x.toFixed(1), cy: y.toFixed(1), r: radius });
}
