"""What a person does with the page, as functions of a browser's page; for any served address."""

import json
import re
import shutil
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
IMAGES, EPISODES = "/v1/images/generations", "/v1/episodes"
PATIENCE_MS = 20_000
VIOLATIONS = """
window.violations = [];
addEventListener("securitypolicyviolation", (event) =>
  window.violations.push(`${event.violatedDirective} ${event.blockedURI}`));
"""


@contextmanager
def browser():
    """Yield the system's Chromium; skips, with the reason, where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        pytest.skip(f"needs a browser: install one of {', '.join(CHROMIUM)}")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield launched
        launched.close()


@contextmanager
def watched(browser, base_url, complaints=0, **context):
    """Yield a page at `base_url`; it must have kept to its origin and policy, and the console quiet.

    `complaints` are the HTTP errors that it may have been answered, which browsers note in the console.
    """
    with browser.new_context(**context) as opened:
        page = opened.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.add_init_script(VIOLATIONS)
        said, faults, requests = [], [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(base_url)
        yield page
        assert faults == []
        assert page.evaluate("window.violations") == []
        refusals = [text for text in said if "the server responded with a status of 4" in text]
        assert len(refusals) <= complaints
        assert [text for text in said if text not in refusals] == []
        origins = {urlsplit(url)[:2] for url in requests if not url.startswith(("data:", "blob:"))}
        assert origins == {urlsplit(base_url)[:2]}


@contextmanager
def asking(page, path):
    """Yield a list that fills with the bodies of the requests to `path`."""
    bodies = []

    def note(request):
        if urlsplit(request.url).path == path:
            bodies.append(json.loads(request.post_data))

    page.on("request", note)
    yield bodies
    page.remove_listener("request", note)


def answered(page, path, act):
    """Do `act`; return what was asked of `path` and what was answered, once the page shows it."""
    with page.expect_response(lambda response: urlsplit(response.url).path == path) as caught:
        act()
    response = caught.value
    response.finished()
    page.wait_for_function("!document.querySelector('[aria-busy]')")
    return json.loads(response.request.post_data), response.json()


def see_pictures(page, letter="A"):
    """Return the addresses of a setting's pictures once they are there, each of them a whole picture."""
    pictures = page.get_by_label(f"Setting {letter}", exact=True).locator(".pictures img")
    pictures.first.wait_for()
    page.wait_for_function("[...document.querySelectorAll('.pictures img')].every((one) => one.naturalWidth)")
    assert pictures.first.evaluate("(one) => getComputedStyle(one).imageRendering") == "pixelated"
    return pictures.evaluate_all("(all) => all.map((one) => one.src)")


def see_timing(page, letter="A"):
    """Return what a setting tells of its answer by name, such as "queue", in words; "total" is a number."""
    setting = page.get_by_label(f"Setting {letter}", exact=True)
    rows = setting.locator(".facts > div").all()
    told = {row.locator("dt").inner_text(): row.locator("dd").inner_text() for row in rows}
    assert all(re.fullmatch(r"[\d.]+ ms", told[name]) for name in ("queue", "compute"))
    return told | {"total": float(setting.locator(".total b").inner_text())}


def generate_images(page):
    """Choose a class by name and a number; the pictures appear, with the milliseconds and the version."""
    see_pictures(page)
    choices = page.get_by_role("group", name="What to draw").get_by_role("radio")
    last = choices.count() - 1
    asked, _ = answered(page, IMAGES, lambda: choices.nth(last).check())
    assert asked["class_label"] == last
    asked, answer = answered(page, IMAGES, lambda: page.get_by_label("Pictures").fill("3"))
    assert asked["n"] == 3
    assert [source.partition(",")[2] for source in see_pictures(page)] == [
        picture["b64_json"] for picture in answer["data"]
    ]
    told = see_timing(page)
    assert told["total"] > 0
    assert told["version"] == answer["version"]
    assert float(told["batch"]) == pytest.approx(answer["timings"]["batch_size"], abs=0.05)


def move_steps(page):
    """Move the slider from its least to its most; every stop is asked for and shown."""
    see_pictures(page)
    slider = page.get_by_label("Steps")
    slider.focus()
    most = int(slider.get_attribute("max"))
    for steps in range(2, most + 1):
        asked, _ = answered(page, IMAGES, lambda: page.keyboard.press("ArrowRight"))
        assert asked["num_inference_steps"] == steps
        assert see_timing(page)["steps"] == str(steps)
    return most


def compare_settings(page):
    """Put a second setting beside the first, and give it a seed of its own."""
    see_pictures(page)
    answered(page, IMAGES, lambda: page.get_by_label("Compare").check())
    seed = page.get_by_label("Setting B", exact=True).get_by_label("Seed")
    asked, _ = answered(page, IMAGES, lambda: seed.fill("12"))
    assert asked["seed"] == 12
    first, second = see_pictures(page, "A"), see_pictures(page, "B")
    assert len(first) == len(second)
    assert first != second
    assert see_timing(page, "A")["total"] > 0
    assert see_timing(page, "B")["total"] > 0
    page.get_by_label("Compare").uncheck()
    assert page.get_by_label("Setting B", exact=True).count() == 0


def play_episode(page, selection="mg-select", candidates=3):
    """Play an episode; decisions are drawn, and can be gone through again. Returns what was asked."""
    page.get_by_role("tab", name="Policies").click()
    page.get_by_label("Selection").select_option(selection)
    if selection != "greedy":
        page.get_by_label("Candidates").fill(str(candidates))
    with asking(page, EPISODES) as bodies:
        page.get_by_role("button", name="Play").click()
        page.locator(".badge.met, .badge.missed").wait_for()
    assert page.locator("#instruction").inner_text()
    assert re.search(r"after \d+ steps", page.locator("#outcome").inner_text())
    scrub = page.locator("#scrub")
    decisions = int(scrub.get_attribute("max"))
    assert decisions >= 1
    scrub.fill("0")
    assert page.locator("#scrub-told").inner_text().startswith(f"Decision 1 of {decisions}, step 0")
    assert page.locator("#camera").evaluate("(one) => one.complete && one.naturalWidth") > 0
    drawn = see_decision(page)
    scrub.press("End")
    assert page.locator("#scrub-told").inner_text().startswith("The end")
    return bodies[0], drawn


def see_decision(page):
    """Return how many lines a panel has, and the words beside the bars; each drawing has one thick line."""
    panels = page.locator("#curves svg").all()
    assert panels
    for picture in [*panels, page.locator("#top")]:
        assert picture.locator("polyline.kept").count() == 1
    assert len(panels) == page.locator("#curves figcaption").count()
    widths = page.locator("#bars i").evaluate_all(
        "(all) => all.map((one) => one.getBoundingClientRect().width)"
    )
    words = page.locator("#bars > span:last-child, #bars > span:not(.track)").all_inner_texts()
    assert len(widths) == len(words)
    return {"lines": panels[0].locator("polyline").count(), "widths": widths, "words": words}


def use_keyboard(page):
    """Reach everything by Tab, and work it with the keys that each kind of control has."""
    see_pictures(page)
    tab_to(page, "#tab-images")
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("tabpanel", name="Policies").is_visible()
    page.keyboard.press("ArrowLeft")
    assert page.get_by_role("tabpanel", name="Images").is_visible()
    tab_to(page, "#classes input")
    asked, _ = answered(page, IMAGES, lambda: page.keyboard.press("ArrowRight"))
    assert asked["class_label"] == 1
    tab_to(page, "#compare")
    page.keyboard.press("Space")
    see_pictures(page, "B")
    page.keyboard.press("Space")
    tab_to(page, "#wanted .main")
    answered(page, IMAGES, lambda: page.keyboard.press("Enter"))
    page.locator("#tab-images").focus()
    page.keyboard.press("ArrowRight")
    tab_to(page, "#play")
    page.keyboard.press("Enter")
    page.locator(".badge.met, .badge.missed").wait_for()
    tab_to(page, "#scrub")
    page.keyboard.press("Home")
    assert page.locator("#scrub-told").inner_text().startswith("Decision 1 ")


def tab_to(page, selector, most=40):
    """Press Tab until the element has the focus."""
    for _ in range(most):
        if page.evaluate("(wanted) => document.activeElement.matches(wanted)", selector):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"{selector} was not reached with {most} tabs")


def see_error(page):
    """Ask for what does not exist; the page shows the service's one line and recovers."""
    see_pictures(page)
    prompt = page.get_by_label("or in words")
    _, answer = answered(page, IMAGES, lambda: prompt.fill("neither of them"))
    shown = page.get_by_label("Setting A", exact=True).get_by_role("alert")
    shown.wait_for()
    assert shown.inner_text() == answer["error"]["message"]
    asked, _ = answered(page, IMAGES, lambda: prompt.fill(""))
    assert asked["class_label"] == 0
    shown.wait_for(state="hidden")


def stay_within(page, width):
    """In a window of `width` pixels nothing is wider than it, whichever tab is shown."""
    page.set_viewport_size({"width": width, "height": 700})
    for tab in page.get_by_role("tab").all():
        tab.click()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
