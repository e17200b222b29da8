// Images: what to draw is shared; model, steps, guidance and seed belong to a setting, of which two can be compared.

import { ask, curl, isAbort, wording } from "./api.js";
import { byId, debounced, element, milliseconds, newSeed, options, part, say } from "./dom.js";

const PATH = "v1/images/generations";
const WAIT = 120;
const FORMATS = ["png", "jpeg", "webp"];

let models = [];
let settings = [];
let listening = false;
let replaced = "";

// Show the generators that are served; called again when another key shows others.
export function showImages(served) {
  models = served;
  drawClasses();
  if (!settings.length) settings = [newSetting("A")];
  for (const setting of settings) setting.offer();
  if (!listening) listen();
  listening = true;
  refresh();
}

function listen() {
  const later = debounced(refresh, WAIT);
  byId("wanted").addEventListener("submit", (event) => {
    event.preventDefault();
    later.now();
  });
  byId("classes").addEventListener("change", () => {
    byId("prompt").value = "";
    later.now();
  });
  // Words replace the class, which comes back when they are taken away.
  byId("prompt").addEventListener("input", () => {
    const said = byId("prompt").value.trim();
    for (const radio of byId("classes").querySelectorAll("input")) {
      if (said && radio.checked) replaced = radio.value;
      radio.checked = !said && radio.value === replaced;
    }
    later();
  });
  byId("count").addEventListener("input", later);
  byId("compare").addEventListener("change", compare);
}

function refresh() {
  for (const setting of settings) setting.generate();
}

function compare() {
  const two = byId("compare").checked;
  byId("settings").classList.toggle("two", two);
  if (two) {
    const other = newSetting("B");
    settings.push(other);
    other.offer();
    other.copy(settings[0]);
    other.generate();
  } else {
    settings.pop().leave();
  }
}

function drawClasses() {
  const names = models[0].classes ?? [];
  const before = byId("classes").querySelector("input:checked")?.value ?? names[0];
  byId("classes").replaceChildren(
    ...names.map((name) => {
      const radio = element("input", { type: "radio", name: "class", value: name });
      radio.checked = name === before && !byId("prompt").value;
      return element("label", {}, radio, element("span", {}, name));
    }),
  );
}

// What to draw, by name and in a request's fields: the label that `model` gives to the chosen class, or a prompt.
function wanted(model) {
  const words = byId("prompt").value.trim();
  if (words) return { name: words, fields: { prompt: words } };
  const name = byId("classes").querySelector("input:checked")?.value;
  if (name === undefined) return null;
  const label = (model.classes ?? []).indexOf(name);
  return { name, fields: label < 0 ? { prompt: name } : { class_label: label } };
}

function newSetting(letter) {
  const root = byId("setting-template").content.firstElementChild.cloneNode(true);
  const its = (name) => part(root, name);
  let underWay = new AbortController();

  const model = () => models.find((one) => one.id === its("model").value) ?? models[0];

  function tell() {
    its("steps").max = model().max_steps ?? 4;
    its("steps-told").textContent = its("steps").value;
    its("guidance-told").textContent = Number(its("guidance").value).toFixed(1);
  }

  function request() {
    return {
      model: model().id,
      ...wanted(model()).fields,
      n: Number(byId("count").value),
      num_inference_steps: Number(its("steps").value),
      guidance_scale: Number(its("guidance").value),
      seed: Number(its("seed").value),
    };
  }

  // The newest request wins: the one before it is given up, which frees its place in the service.
  async function generate() {
    underWay.abort();
    const what = wanted(model());
    if (!what) {
      root.removeAttribute("aria-busy");
      return;
    }
    const mine = (underWay = new AbortController());
    const body = request();
    root.setAttribute("aria-busy", "true");
    try {
      const answer = await ask(PATH, body, mine.signal);
      if (mine.signal.aborted) return;
      say(its("error"), "");
      root.classList.remove("stale");
      drawPictures(its("pictures"), answer.body, `${what.name}, seed ${body.seed}`);
      drawTiming(its, answer);
      its("curl").textContent = curl(PATH, body);
      say(its("refused"), model().refused ? `A newer checkpoint was not taken: ${model().refused}` : "");
    } catch (error) {
      if (isAbort(error) || mine.signal.aborted) return;
      say(its("error"), wording(error));
      root.classList.add("stale");
    }
    root.removeAttribute("aria-busy");
  }

  const later = debounced(generate, WAIT);
  root.setAttribute("aria-label", `Setting ${letter}`);
  its("letter").textContent = letter;
  its("seed").value = 7;
  its("form").addEventListener("submit", (event) => {
    event.preventDefault();
    later.now();
  });
  its("form").addEventListener("input", () => {
    tell();
    later();
  });
  its("new-seed").addEventListener("click", () => {
    its("seed").value = newSeed();
    later.now();
  });
  byId("settings").append(root);

  return {
    generate,
    offer() {
      options(its("model"), models.map((one) => one.id));
      tell();
    },
    // Begin as the other setting is, but with other steps (or another model), so that there is a difference.
    copy(other) {
      for (const name of ["model", "steps", "guidance", "seed"]) its(name).value = other.value(name);
      const next = models[models.findIndex((one) => one.id === its("model").value) + 1];
      tell();
      const most = Number(its("steps").max);
      if (most > 1) its("steps").value = Number(its("steps").value) === most ? 1 : most;
      else if (next) its("model").value = next.id;
      tell();
    },
    value: (name) => its(name).value,
    leave() {
      underWay.abort();
      root.remove();
    },
  };
}

function drawPictures(place, answer, name) {
  const format = FORMATS.includes(answer.output_format) ? answer.output_format : "png";
  const pictures = answer.data.map((picture, index) =>
    element("img", {
      src: `data:image/${format};base64,${picture.b64_json}`,
      alt: `${name}, picture ${index + 1} of ${answer.data.length}`,
    }),
  );
  place.replaceChildren(...pictures);
  const columns = pictures.length <= 5 ? pictures.length : Math.ceil(pictures.length / 2);
  place.style.setProperty("--columns", columns);
}

function drawTiming(its, { body, headers, ms }) {
  const timings = body.timings ?? {};
  const told = (field, header) => timings[field] ?? Number(headers.get(header) ?? NaN);
  const queue = told("queue_ms", "x-queue-ms");
  const compute = told("compute_ms", "x-compute-ms");
  const batch = told("batch_size", "x-batch-size");
  const rest = Math.max(0, ms - (queue || 0) - (compute || 0));
  its("total").textContent = milliseconds(ms);
  for (const [name, value] of Object.entries({ queue, compute, rest })) {
    its(name).textContent = `${milliseconds(value)} ms`;
    its(`${name}-bar`).style.width = `${(100 * (value || 0)) / ms}%`;
  }
  its("batch").textContent = Number.isFinite(batch) ? String(Math.round(batch * 10) / 10) : "–";
  its("steps-done").textContent = body.num_inference_steps ?? "–";
  its("version").textContent = body.version ?? headers.get("x-model-version") ?? "–";
  its("timing").hidden = false;
}
