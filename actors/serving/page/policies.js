// Policies: an episode arrives decision by decision, is drawn as it comes, and can be gone through again.

import { askLines, curl, isAbort, wording } from "./api.js";
import { byId, milliseconds, newSeed, options, say } from "./dom.js";
import { bars, curves, fromAbove, planar, wayOf } from "./drawing.js";

const PATH = "v1/episodes";

let policies = [];
let listening = false;
let underWay = new AbortController();
let episode = null;

// Show the policies that are served; called again when another key shows others.
export function showPolicies(served) {
  policies = served;
  options(byId("policy"), served.map((model) => model.id));
  tell();
  if (!listening) listen();
  listening = true;
}

function listen() {
  byId("episode").addEventListener("submit", (event) => {
    event.preventDefault();
    play();
  });
  byId("episode").addEventListener("input", tell);
  byId("stop").addEventListener("click", () => underWay.abort());
  byId("episode-new-seed").addEventListener("click", () => {
    byId("episode-seed").value = newSeed();
    play();
  });
  byId("scrub").addEventListener("input", () => {
    episode.follow = byId("scrub").value === byId("scrub").max;
    draw();
  });
}

function tell() {
  const rule = byId("selection").value;
  const chosen = policies.find((model) => model.id === byId("policy").value) ?? policies[0];
  const conditions = chosen.conditions ?? [];
  options(byId("mask"), conditions.length > 1 ? [...conditions].sort().reverse().concat("both") : conditions);
  byId("mask-field").hidden = rule !== "mg-select";
  for (const name of ["candidates", "temperature"]) {
    byId(`${name}-field`).hidden = rule === "greedy";
    byId(`${name}-told`).textContent = byId(name).value;
  }
}

function request() {
  const rule = byId("selection").value;
  const body = { model: byId("policy").value, selection: rule, seed: Number(byId("episode-seed").value) };
  if (rule !== "greedy") {
    body.num_candidates = Number(byId("candidates").value);
    body.temperature = Number(byId("temperature").value);
  }
  if (rule === "mg-select" && byId("mask").value) body.mask = byId("mask").value;
  return body;
}

// The newest episode wins; leaving one ends it in the simulator too.
async function play() {
  underWay.abort();
  const mine = (underWay = new AbortController());
  const body = request();
  const before = episode;
  say(byId("episode-error"), "");
  byId("stop").disabled = false;
  try {
    for await (const event of askLines(PATH, body, mine.signal)) {
      if (mine !== underWay) return;
      take(event, body);
    }
    if (episode === before || !episode.end) say(byId("episode-error"), "The connection ended before the episode did: play it again.");
  } catch (error) {
    if (mine !== underWay) return;
    if (!isAbort(error)) say(byId("episode-error"), wording(error));
    else if (episode !== before) outcome("stopped", "");
  }
  byId("stop").disabled = true;
}

function take(event, body) {
  if (event.event === "start") {
    episode = { start: event, decisions: [], end: null, follow: true };
    byId("instruction").textContent = event.instruction;
    byId("episode-curl").textContent = curl(PATH, body);
    outcome("playing", "");
    byId("episode-empty").hidden = true;
    byId("scrub").max = 0;
    return;
  }
  if (event.event === "decision") episode.decisions.push(event);
  if (event.event === "end") {
    episode.end = event;
    const last = episode.decisions.at(-1);
    if (last) last.executed = event.steps - last.step;
    outcome(`${event.outcome} after ${event.steps} steps`, event.success ? "met" : "missed");
  }
  byId("scrub").max = Math.max(0, episode.decisions.length - (episode.end ? 0 : 1));
  if (episode.follow) byId("scrub").value = byId("scrub").max;
  byId("episode-view").hidden = false;
  draw();
}

function outcome(words, kind) {
  byId("outcome").className = `badge ${kind}`;
  say(byId("outcome"), words);
}

// Draw the moment at which the slider stands: a decision, or the end.
function draw() {
  const place = Number(byId("scrub").value);
  const decision = episode.decisions[place] ?? null;
  const space = episode.start.action_space;
  const moment = decision ?? episode.end;
  if (!moment) return;
  const step = decision ? decision.step : episode.end.steps;
  const where = decision ? `Decision ${place + 1} of ${episode.decisions.length}` : "The end";
  byId("scrub-told").textContent = `${where}, step ${step} of at most ${episode.start.max_steps}`;
  byId("scrub").setAttribute("aria-valuetext", byId("scrub-told").textContent);
  byId("camera").src = `data:image/png;base64,${moment.image}`;
  byId("camera").alt = `Camera image at step ${step}`;
  byId("camera-told").textContent = `What the camera shows at step ${step}`;
  drawTop(place, decision, space);
  byId("bars").replaceChildren(...(decision ? bars(decision) : []));
  byId("bars-told").textContent = decision ? confidenceWords(decision) : "The episode is over";
  byId("work-told").textContent = decision ? workWords(decision.work ?? {}) : "";
  byId("curves").replaceChildren(...(decision ? curves(decision, space) : []));
  byId("curves-told").textContent = decision ? curveWords(decision, space) : "";
}

function drawTop(place, decision, space) {
  const axes = planar(space);
  byId("top-figure").hidden = axes === null;
  if (axes === null) return;
  const whole = wayOf(episode.decisions, space, axes);
  fromAbove(byId("top"), wayOf(episode.decisions.slice(0, place), space, axes), decision, axes, whole);
}

function confidenceWords(decision) {
  const some = decision.confidences.some((value) => Number.isFinite(value));
  const what = some ? "Confidence of each candidate" : "This rule compares no confidences";
  return decision.chosen < 0 ? `${what}; none could be used, so the greedy chunk was taken` : what;
}

function workWords({ queued_s: queued, compute_s: compute, batch_size: batch }) {
  const rows = Number.isFinite(batch) ? `, in a batch of ${Math.round(batch * 10) / 10}` : "";
  return `Decided in ${milliseconds(compute * 1000)} ms after ${milliseconds(queued * 1000)} ms in the queue${rows}`;
}

function curveWords(decision, space) {
  const steps = decision.actions.length;
  const executed = Math.min(space.execute, steps);
  return `Each panel is one dimension of the action over the ${steps} steps of a chunk, of which ${executed} are executed; the thick line is the candidate that was kept.`;
}
