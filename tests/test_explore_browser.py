"""The page in a real browser: Chromium from Debian's packages (`make test-browser` has the set-up)."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="make test-browser installs it")
if shutil.which("chromium") is None:
    pytest.skip("needs chromium: make test-browser installs it", allow_module_level=True)
from helpers_explore import turning_world
from playwright.sync_api import expect, sync_playwright

from vjepa_ac_hf.app.explorer import Limits
from vjepa_ac_hf.app.page import launch, uploads_folder

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
HOSTILE = '<img src=x onerror="window.hacked=1"><b>bold</b>'
# A server in a process of its own, that is killed.
SERVE = """
import sys
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
from helpers_explore import turning_world
from vjepa_ac_hf.app.page import launch
_, address, page = launch(turning_world(Path(sys.argv[3])), host="127.0.0.1", port=int(sys.argv[4]) or None)
print(address, flush=True)
page.block_thread()
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    explorer = turning_world(
        tmp_path_factory.mktemp("explore") / "clips", uploads=uploads_folder(), limits=Limits(upload_bytes=100_000)
    )
    explorer.scenes.names[1] = HOSTILE
    return explorer


@pytest.fixture(scope="module")
def address(world):
    _, address, page = launch(world, host="127.0.0.1", port=None)
    yield address
    page.close()


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """Open the page as a visitor of their own; what the browser asks of other machines, or complains of, is noted."""
    contexts, outside, wrong = [], [], []

    def open_page(address):
        context = chromium.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda r: outside.append(r.url) if not r.url.startswith((address, "data:", "blob:")) else 0)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(address)
        ready(page)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not outside and not wrong


def ready(page):
    page.wait_for_function("window.vjepa && window.vjepa.ready", timeout=60_000)


def shown(page):
    return page.get_attribute("#vx-now", "src")


def pixels(page):
    """The picture that is shown, as rows of red, green and blue, read back from the browser."""
    code = """() => { const i = document.querySelector('#vx-now'), c = document.createElement('canvas');
        c.width = i.naturalWidth; c.height = i.naturalHeight; const x = c.getContext('2d'); x.drawImage(i, 0, 0);
        return [c.width, ...x.getImageData(0, 0, c.width, c.height).data]; }"""
    width, *values = page.evaluate(code)
    colours = [values[i : i + 3] for i in range(0, len(values), 4)]
    return [colours[i : i + width] for i in range(0, len(colours), width)]


def difference(left, right):
    pairs = [
        (a, b)
        for x, y in zip(left, right, strict=True)
        for p, q in zip(x, y, strict=True)
        for a, b in zip(p, q, strict=True)
    ]
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


def press(page, *keys):
    for key in keys:
        before = page.evaluate("vjepa.timings.length")
        page.keyboard.press(key)
        page.wait_for_function(f"vjepa.timings.length > {before}", timeout=20_000)


def cells(page):
    return page.locator("#vx-strip .vx-cell").count()


def test_keys_and_buttons_change_the_picture(visit, address):
    page = visit(address)
    first = shown(page)
    assert cells(page) == 2  # the context
    press(page, "ArrowLeft")
    assert shown(page) != first and cells(page) == 3
    texts = page.locator("#vx-strip .vx-cell p").all_inner_texts()
    assert "yaw -15.0°" in texts[-1]
    page.keyboard.press("Backspace")
    expect(page.locator("#vx-strip .vx-cell")).to_have_count(2)
    assert shown(page) == first
    page.click("[data-key='key.w']")
    expect(page.locator("#vx-strip .vx-cell")).to_have_count(3)
    page.keyboard.down("w")
    page.keyboard.press("3")  # while the step of w is imagined
    expect(page.locator("#vx-strip .vx-cell")).to_have_count(5)
    page.keyboard.up("w")
    last = page.locator("#vx-strip .vx-cell p").all_inner_texts()[-1].split("\n")[-1]
    assert set(last.split()) == {"w", "3"}
    box = page.locator("#vx-now").bounding_box()
    page.mouse.move(box["x"] + 100, box["y"] + 100)
    page.mouse.down()
    page.mouse.move(box["x"] + 200, box["y"] + 80)
    before = page.evaluate("vjepa.timings.length")
    page.mouse.up()
    page.wait_for_function(f"vjepa.timings.length > {before}")
    dragged = page.locator("#vx-strip .vx-cell p").all_inner_texts()[-1]
    assert "yaw +15.0°" in dragged and "pitch -3.0°" in dragged


def test_a_mirrored_turn_gives_the_mirrored_change(visit, address, world):
    """The scene is made its own mirror image: turns to the left and to the right then show mirrored pictures."""
    page = visit(address)
    token = page.evaluate("sessionStorage.getItem('vjepa-token')")
    scene = world.sessions[token].story.scene
    halves = scene.features.unflatten(1, (8, 8))
    scene.features.copy_(((halves + halves.flip(2)) / 2).flatten(1, 2))
    press(page, "ArrowLeft", "ArrowLeft")
    left = pixels(page)
    page.keyboard.press("Backspace")
    page.keyboard.press("Backspace")
    expect(page.locator("#vx-strip .vx-cell")).to_have_count(2)
    press(page, "ArrowRight", "ArrowRight")
    right = pixels(page)
    assert difference(left, [row[::-1] for row in right]) < 3 < 10 < difference(left, right)  # but for WebP
    page.click("#vx-mirror")
    lane = page.locator("#vx-lanes img").last.get_attribute("src")
    page.evaluate("source => { document.querySelector('#vx-now').src = source; }", lane)
    page.wait_for_function("document.querySelector('#vx-now').complete")
    assert difference(left, pixels(page)) < 3


def test_two_browsers_do_not_see_each_others_story(visit, address):
    mine, yours = visit(address), visit(address)
    first = shown(yours)
    press(mine, "w", "ArrowRight")
    assert cells(mine) == 4 and cells(yours) == 2 and shown(yours) == first
    press(yours, "ArrowLeft")
    assert cells(mine) == 4
    yours.reload()
    ready(yours)
    assert cells(yours) == 3 and "yaw -15.0°" in yours.locator("#vx-strip .vx-cell p").all_inner_texts()[-1]


def test_reload_keeps_the_story(visit, address):
    page = visit(address)
    press(page, "w", "ArrowRight")
    page.click("#vx-aside")
    expect(page.locator("#vx-lanes .vx-cell")).to_have_count(2)
    press(page, "Enter", "Enter")
    before = page.locator("#vx-strip img").evaluate_all("images => images.map(i => i.src)")
    page.reload()
    ready(page)
    assert page.locator("#vx-strip img").evaluate_all("images => images.map(i => i.src)") == before
    assert page.locator("#vx-lanes .vx-cell").count() == 2
    press(page, "ArrowLeft")
    assert cells(page) == 5


def test_recorded_actions_show_what_happened_until_another_is_taken(visit, address):
    page = visit(address)
    press(page, "Enter")
    assert "what really happened; error of the features" in page.inner_text("#vx-real-caption")
    assert page.is_visible("#vx-real")
    press(page, "w")
    assert not page.is_visible("#vx-real")
    page.keyboard.press("Enter")
    expect(page.locator("#vx-status")).to_contain_text("this story has left what was recorded")


def test_names_are_text_and_videos_are_dropped(visit, address, tmp_path):
    from helpers_data import make_video

    page = visit(address)
    page.select_option("#vx-clip", index=1)
    expect(page.locator("#vx-note")).to_have_text(HOSTILE)
    (tmp_path / f"{HOSTILE.replace('/', '')}.mp4").write_bytes(make_video(100))
    page.set_input_files("#vx-files", next(tmp_path.glob("*.mp4")))
    expect(page.locator("#vx-note")).to_contain_text("no log", timeout=20_000)
    assert "<b>bold<b>" in page.inner_text("#vx-note")
    assert page.evaluate("window.hacked") is None and page.locator(".vx b").count() == 0
    press(page, "w")
    (tmp_path / "no.mp4").write_text("<html>no video</html>")
    page.set_input_files("#vx-files", tmp_path / "no.mp4")
    expect(page.locator("#vx-status")).to_contain_text("no.mp4", timeout=20_000)
    (tmp_path / "big.mp4").write_bytes(bytes(3_000_000))
    page.set_input_files("#vx-files", tmp_path / "big.mp4")
    expect(page.locator("#vx-status")).to_contain_text("big.mp4 is too large")
    press(page, "w")  # and the story goes on
    assert cells(page) == 4


def test_films_and_logs_are_saved(visit, address):
    page = visit(address)
    press(page, "w", "ArrowRight")
    for button, name, begins in (
        ("webp", "story.webp", b"RIFF"),
        ("mp4", "story.mp4", None),
        ("log", "story.jsonl", b"{"),
    ):
        with page.expect_download() as download:
            page.click(f"#vx-{button}")
        content = Path(download.value.path()).read_bytes()
        assert download.value.suggested_filename == name and len(content) > 500
        assert content.startswith(begins) if begins else b"ftyp" in content[:16]


def test_a_plan_is_watched_and_one_closed_in_its_middle_leaves_the_others_working(visit, address, world):
    page, other = visit(address), visit(address)
    press(other, "w")
    page.locator(".vx-goal").nth(5).click()
    expect(page.locator("#vx-status")).to_have_text(re.compile("plan|arrived|gave up"))
    page.close()
    press(other, "ArrowLeft")
    assert cells(other) == 4
    for _ in range(30):  # the plan that nobody waits for ends by itself
        other.locator(".vx-goal").nth(1).click()
        text = other.locator("#vx-status")
        expect(text).to_have_text(re.compile("another visitor|arrived|gave up|distance"), timeout=30_000)
        if "another visitor" not in text.inner_text():
            break
        time.sleep(1)
    assert "another visitor" not in other.inner_text("#vx-status")


def test_a_plan_tells_its_distances_and_how_it_ended(visit, address):
    page = visit(address)
    page.locator(".vx-goal").nth(6).click()
    status = page.locator("#vx-status")
    told = re.compile(
        r"distance to the goal [\d.]+ now, [\d.]+ a step before, [\d.]+ at the start; the plan expects [\d.]+"
    )
    expect(status).to_have_text(told, timeout=30_000)
    expect(status).to_have_text(
        re.compile(r"(arrived|gave up).* [\d.]+ from the goal, [\d.]+ at the start"), timeout=60_000
    )
    assert 3 <= cells(page) <= 10


def test_a_lost_connection_says_so_and_a_new_program_ends_the_story(visit, tmp_path):
    def serve(port):
        arguments = [
            sys.executable,
            "-c",
            SERVE,
            str(ROOT / "tests"),
            str(ROOT / "src"),
            str(tmp_path / "clips"),
            str(port),
        ]
        process = subprocess.Popen(
            arguments, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        return process, process.stdout.readline().strip()

    server, address = serve(0)
    try:
        page = visit(address)
        press(page, "w")
        server.send_signal(signal.SIGKILL)
        server.wait()
        page.keyboard.press("w")
        expect(page.locator("#vx-lost")).to_contain_text("the connection is lost")
        assert cells(page) == 3  # what is shown stays
        server, again = serve(int(address.rsplit(":", 1)[1].strip("/")))
        assert again == address
        expect(page.locator("#vx-lost")).to_contain_text("Choose a clip to begin another one", timeout=30_000)
        page.select_option("#vx-clip", index=2)
        expect(page.locator("#vx-lost")).to_be_hidden()
        press(page, "w")
        assert cells(page) == 3
    finally:
        server.kill()
        server.wait()
