// Elements by name, and new ones. Texts that a server sent only ever become text nodes.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

// The element of a cloned template that carries data-part="name".
export const part = (root, name) => root.querySelector(`[data-part="${name}"]`);

export function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

export function drawn(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

// Show one line in an element that is hidden while there is nothing to say.
export function say(target, words) {
  target.textContent = words;
  target.hidden = !words;
}

export function options(select, names) {
  const before = select.value;
  select.replaceChildren(...names.map((name) => element("option", { value: name }, name)));
  if (names.includes(before)) select.value = before;
}

// A seed that a person can read out.
export const newSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] % 100000;

// Milliseconds with as many digits as are worth reading; a dash where nobody measured.
export function milliseconds(value) {
  if (!Number.isFinite(value)) return "–";
  return value < 9.95 ? value.toFixed(1) : Math.round(value).toString();
}

// Call `act` once calls have ceased for `wait` milliseconds; `.now()` calls at once.
export function debounced(act, wait) {
  let timer = 0;
  const later = () => {
    clearTimeout(timer);
    timer = setTimeout(act, wait);
  };
  later.now = () => {
    clearTimeout(timer);
    act();
  };
  return later;
}

function filled(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}
