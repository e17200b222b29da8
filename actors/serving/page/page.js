// The page: what is served decides its tabs; a key, where one is needed, stays in this browser tab.

import { keepKey, servedModels, storedKey, wording } from "./api.js";
import { byId, say } from "./dom.js";
import { showImages } from "./images.js";
import { showPolicies } from "./policies.js";

const tabs = [...document.querySelectorAll("[role=tab]")];

function choose(tab, focus = false) {
  for (const other of tabs) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", String(chosen));
    other.tabIndex = chosen ? 0 : -1;
    byId(other.getAttribute("aria-controls")).hidden = !chosen;
  }
  if (focus) tab.focus();
}

function listenToTabs() {
  for (const tab of tabs) {
    tab.addEventListener("click", () => {
      choose(tab);
      history.replaceState(null, "", `#${tab.getAttribute("aria-controls")}`);
    });
    tab.addEventListener("keydown", (event) => {
      const there = tabs.filter((other) => !other.hidden);
      const place = there.indexOf(tab);
      const next = {
        ArrowRight: there[(place + 1) % there.length],
        ArrowLeft: there[(place + there.length - 1) % there.length],
        Home: there[0],
        End: there.at(-1),
      }[event.key];
      if (!next) return;
      event.preventDefault();
      choose(next, true);
    });
  }
}

async function load() {
  say(byId("notice"), "");
  let served;
  try {
    served = await servedModels();
  } catch (error) {
    say(byId("notice"), wording(error));
    if (error.status === 401) byId("key").focus();
    return;
  }
  const counts = { images: served.images.length, policies: served.actions.length };
  for (const tab of tabs) tab.hidden = !counts[tab.getAttribute("aria-controls")];
  const there = tabs.filter((tab) => !tab.hidden);
  document.querySelector("[role=tablist]").hidden = there.length < 2;
  if (!there.length) {
    say(byId("notice"), "No model is served yet.");
    return;
  }
  const asked = there.find((tab) => `#${tab.getAttribute("aria-controls")}` === location.hash);
  choose(asked ?? there.find((tab) => tab.getAttribute("aria-selected") === "true") ?? there[0]);
  if (served.images.length) showImages(served.images);
  if (served.actions.length) showPolicies(served.actions);
}

byId("key").value = storedKey();
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  keepKey(byId("key").value.trim());
  load();
});
listenToTabs();
load();
