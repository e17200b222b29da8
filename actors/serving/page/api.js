// The service's API as the page uses it. All addresses are relative: the page calls nobody else.

const STORED = "counterpoint key";

// What the service said instead of an answer; the message is one line.
export class Refused extends Error {
  constructor(message, status, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export const storedKey = () => sessionStorage.getItem(STORED) ?? "";

export function keepKey(key) {
  if (key) sessionStorage.setItem(STORED, key);
  else sessionStorage.removeItem(STORED);
}

// Models by kind, each with its details beside its name.
export async function servedModels() {
  const { body } = await ask("v1/models");
  const all = body.data.map((entry) => ({ ...entry, ...(entry.details ?? {}) }));
  return {
    images: all.filter((model) => model.kind === "images"),
    actions: all.filter((model) => model.kind === "actions"),
  };
}

// Return the answer with the milliseconds until it had arrived whole.
export async function ask(path, body, signal) {
  const begun = performance.now();
  const response = await send(path, body, signal);
  const answer = await response.json();
  return { body: answer, headers: response.headers, ms: performance.now() - begun };
}

// Yield the objects of a newline-delimited answer as they arrive; an error among them is thrown.
export async function* askLines(path, body, signal) {
  const response = await send(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    const lines = (rest + (value ?? "")).split("\n");
    rest = done ? "" : lines.pop();
    for (const line of lines) {
      if (!line.trim()) continue;
      const event = JSON.parse(line);
      if (event.event === "error") throw new Refused(event.error.message, 200, event.error.code);
      yield event;
    }
    if (done) return;
  }
}

// The same request for a shell; the key itself is never shown.
export function curl(path, body) {
  const quoted = JSON.stringify(body).replaceAll("'", "'\\''");
  const key = storedKey() ? ' -H "Authorization: Bearer $KEY"' : "";
  const address = new URL(path, document.baseURI);
  return `curl -sN ${address}${key} -H "Content-Type: application/json" -d '${quoted}'`;
}

// One line for whatever went wrong.
export function wording(error) {
  if (error instanceof Refused) return error.message;
  if (error instanceof TypeError) return "The service cannot be reached: try again in a moment.";
  return `The answer could not be read: ${error.message}`;
}

export const isAbort = (error) => error.name === "AbortError";

async function send(path, body, signal) {
  const headers = {};
  if (storedKey()) headers.Authorization = `Bearer ${storedKey()}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const response = await fetch(path, {
    method: body === undefined ? "GET" : "POST",
    headers,
    body: body === undefined ? undefined : JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  let told = {};
  try {
    told = (await response.json()).error ?? {};
  } catch (error) {
    if (isAbort(error)) throw error;
  }
  return new Refused(told.message ?? `The service answered ${response.status}.`, response.status, told.code);
}
