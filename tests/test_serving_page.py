"""The page: its files, and what a browser makes of them."""

import shutil
import threading
import tomllib
from contextlib import contextmanager
from pathlib import Path

import page_steps
import pytest
import uvicorn
from page_steps import EPISODES, IMAGES, answered, asking, see_pictures, watched
from serving_parts import BLOCKS, DIGITS, FakeBackend, service
from starlette.testclient import TestClient

from actors.serving import page_routes
from actors.serving.app import create_app
from actors.serving.errors import ApiError
from actors.serving.keys import new_token

FOLDER = Path(page_routes.__file__).parent / page_routes.FOLDER


@pytest.fixture(scope="module")
def chromium():
    with page_steps.browser() as launched:
        yield launched


@contextmanager
def served(backend, **changes):
    """Yield the address at which the application answers, from a thread of this process."""
    settings = uvicorn.Config(
        create_app(backend, service(**changes)), host="127.0.0.1", port=0, log_level="warning", lifespan="off"
    )
    server = uvicorn.Server(settings)
    listening = settings.bind_socket()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


@pytest.fixture(scope="module")
def address():
    with served(FakeBackend()) as url:
        yield url


@pytest.fixture
def page(chromium, address):
    with watched(chromium, address) as opened:
        yield opened


@pytest.fixture(scope="module")
def client():
    return TestClient(create_app(FakeBackend(), service()))


def test_every_file_of_the_folder_is_served_and_packaged():
    names = {path.name for path in FOLDER.iterdir()}
    assert set(page_routes.TYPES) == names
    project = tomllib.loads((FOLDER.parents[2] / "pyproject.toml").read_text())
    globs = project["tool"]["setuptools"]["package-data"]["actors"]
    packaged = {path.name for glob in globs for path in FOLDER.parents[1].glob(glob)}
    assert names <= packaged


def test_the_root_is_the_page_and_browsers_ask_whether_it_is_still_the_same(client):
    first = client.get("/")
    assert first.headers["content-type"] == "text/html; charset=utf-8"
    assert first.headers["cache-control"] == "no-cache"
    assert first.content == (FOLDER / "index.html").read_bytes()
    tag = first.headers["etag"]
    for named in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        again = client.get("/", headers={"if-none-match": named})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert client.get("/", headers={"if-none-match": '"other"'}).status_code == 200
    assert client.head("/").status_code == 200


@pytest.mark.parametrize("name", sorted(page_routes.TYPES))
def test_files_come_with_their_type_and_the_page_uses_each(client, name):
    answer = client.get(f"/page/{name}")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == page_routes.TYPES[name]
    assert answer.content == (FOLDER / name).read_bytes()
    users = "".join(path.read_text() for path in FOLDER.iterdir() if path.name != name)
    assert name == "index.html" or name in users


@pytest.mark.parametrize(
    "path",
    [
        "nothing.js",
        "../page_routes.py",
        "..%2Fpage_routes.py",
        "%2e%2e/%2e%2e/pyproject.toml",
        "a/b",
        "%00",
        "",
    ],
)
def test_nothing_else_is_served(client, path):
    answer = client.get(f"/page/{path}")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


def test_the_files_name_no_other_host_and_set_no_markup_from_texts():
    for path in FOLDER.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "//" not in text.replace("// ", "").replace("${", ""), path.name
        for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert way not in text, path.name
    index = (FOLDER / "index.html").read_text()
    assert " style=" not in index
    assert " on" + "click" not in index


def test_pictures_appear_with_their_milliseconds(page):
    page_steps.generate_images(page)


def test_the_slider_changes_the_steps_that_are_asked_for(page):
    assert page_steps.move_steps(page) == 4


def test_two_settings_stand_side_by_side(page):
    page_steps.compare_settings(page)


def test_an_episode_draws_its_candidates(page):
    asked, drawn = page_steps.play_episode(page)
    assert asked == {
        "model": "blocks", "selection": "mg-select", "seed": 7, "num_candidates": 3, "temperature": 0.5,
        "mask": "text",
    }  # fmt: skip
    # The backend's second candidate is never decodable.
    assert drawn["lines"] == 1
    assert drawn["widths"][0] > 0
    assert drawn["widths"][1] == 0
    assert drawn["words"] == ["1.500 kept", "not decodable"]


def test_greedy_has_nothing_to_choose_from(page):
    asked, _ = page_steps.play_episode(page, "greedy")
    assert asked == {"model": "blocks", "selection": "greedy", "seed": 7}


def test_the_keyboard_suffices(page):
    page_steps.use_keyboard(page)


def test_an_error_is_one_line_and_the_page_recovers(chromium, address):
    with watched(chromium, address, complaints=1) as page:
        page_steps.see_error(page)


def test_it_fits_a_phone(page):
    page.get_by_label("Compare").check()
    see_pictures(page, "B")
    page_steps.play_episode(page)
    page.locator("#scrub").press("Home")
    for width in (320, 390, 800, 1300):
        page_steps.stay_within(page, width)


def test_it_is_light_by_day_and_dark_by_night(page):
    brightness = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]"
    for scheme, bright in (("light", True), ("dark", False)):
        page.emulate_media(color_scheme=scheme)
        assert (page.evaluate(brightness) > 127) == bright


def test_the_latest_request_wins_and_the_one_before_is_given_up(page):
    see_pictures(page)
    held, failed = [], []
    page.on("requestfailed", lambda request: failed.append(request.post_data_json["num_inference_steps"]))
    page.route(f"**{IMAGES}", lambda route: held.append(route), times=1)  # playwright takes no method
    slider = page.get_by_label("Steps")
    with page.expect_request(f"**{IMAGES}"):
        slider.fill("2")
    _, answer = answered(page, IMAGES, lambda: slider.fill("4"))
    assert len(held) == 1
    assert failed == [2]
    assert see_pictures(page)[0].endswith(answer["data"][0]["b64_json"])
    assert page_steps.see_timing(page)["steps"] == "4"


def test_a_slider_in_motion_asks_once_it_rests(page):
    see_pictures(page)
    with asking(page, IMAGES) as bodies:
        move = """(slider) => { for (const steps of [2, 3, 4]) {
          slider.value = steps; slider.dispatchEvent(new Event("input", { bubbles: true })); } }"""
        answered(page, IMAGES, lambda: page.get_by_label("Steps").evaluate(move))
    assert [body["num_inference_steps"] for body in bodies] == [4]


class Endless(FakeBackend):
    """Plays until it is stopped."""

    ended = threading.Event()

    async def play(self, model, selection, seed, deadline_s):
        events = super().play(model, selection, seed, deadline_s)
        yield await anext(events)
        decision = await anext(events)
        try:
            while True:
                yield decision
                await self._wait(deadline_s)
        finally:
            self.ended.set()


def test_stopping_ends_the_episode_in_the_service_too(chromium):
    backend = Endless(delay=0.05)
    with served(backend) as url, watched(chromium, f"{url}#policies") as page:
        page.get_by_role("button", name="Play").click()
        page.locator("#curves svg").first.wait_for()
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("stopped").wait_for()
        assert page.get_by_role("button", name="Stop").is_disabled()
        assert backend.ended.wait(20)


class Broken(FakeBackend):
    """Fails after the first decision."""

    async def play(self, model, selection, seed, deadline_s):
        events = super().play(model, selection, seed, deadline_s)
        yield await anext(events)
        yield await anext(events)
        raise ApiError("unavailable", "the simulator failed: play it again")


def test_an_error_in_the_middle_of_an_episode_is_shown(chromium):
    with served(Broken()) as url, watched(chromium, f"{url}#policies") as page:
        page.get_by_role("button", name="Play").click()
        page.locator("#episode-error").wait_for()
        assert page.locator("#episode-error").inner_text() == "the simulator failed: play it again"
        assert page.locator("#curves svg").count() == 2


def test_a_key_opens_the_page_and_stays_in_this_tab(chromium):
    token, sha256 = new_token()
    keys = [{"name": "ada", "sha256": sha256}]
    with served(FakeBackend(), keys=keys) as url, watched(chromium, url, complaints=1) as page:
        page.locator("#notice").wait_for()
        assert page.get_by_role("tabpanel").count() == 0
        page.get_by_label("Key").fill(token)
        page.get_by_label("Key").press("Enter")
        see_pictures(page)
        assert page.locator("#notice").is_hidden()
        page_steps.play_episode(page)
        page.reload()
        page.get_by_role("tabpanel", name="Policies").wait_for()
        assert token not in page.content()
        assert page.evaluate("localStorage.length") == 0
        assert page.context.cookies() == []
        assert token not in page.url


def test_only_what_is_served_has_a_tab(chromium):
    for infos, shown in (((DIGITS,), "images"), ((BLOCKS,), "policies")):
        with served(FakeBackend(infos=infos)) as url, watched(chromium, url) as page:
            page.locator(f"#{shown}").wait_for()
            assert page.get_by_role("tab").count() == 0
            assert page.get_by_role("tabpanel").count() == 1


def test_texts_of_the_service_are_never_markup(chromium):
    evil = "<img src=x onerror=alert(1)>"
    infos = (type(DIGITS)(evil, "images", "r", evil, 1, {**DIGITS.details, "classes": [evil]}, refused=evil),)
    with served(FakeBackend(infos=infos)) as url, watched(chromium, url) as page:
        page.get_by_role("radio", name=evil).wait_for()
        see_pictures(page)
        page.get_by_text(f"not taken: {evil}").wait_for()
        assert page.locator("img[src=x]").count() == 0


def test_without_a_browser_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(pytest.skip.Exception, match="install one of"), page_steps.browser():
        pass


def test_an_unreachable_service_is_said_so(chromium, address):
    with chromium.new_context() as context:
        page = context.new_page()
        page.goto(address)
        see_pictures(page)
        page.route(f"**{EPISODES}", lambda route: route.abort())
        page.get_by_role("tab", name="Policies").click()
        page.get_by_role("button", name="Play").click()
        page.get_by_text("The service cannot be reached").wait_for()
