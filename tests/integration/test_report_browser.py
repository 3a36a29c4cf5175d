"""The inspection page in a browser: what users do with it. Nothing in its data runs, and it makes no requests."""

import base64
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from pipeline.captioning.captioner import Captioner
from pipeline.config import load_config
from pipeline.decoding.decode import FrameBatch
from pipeline.errors import UnitError
from pipeline.mini.render import render
from pipeline.mini.scene import sample_scene
from pipeline.mini.world import scene_seed
from pipeline.run.directory import RunDirectory
from pipeline.run.report import build_report
from pipeline.run.samples import Sampling, folder_of
from pipeline.schema import rows_table
from tests.pipeline.rows import row, units

pytestmark = pytest.mark.integration

HOSTILE = "</script><script>window.ran = 1</script><img src=x onerror='window.ran = 2'>\"&lt;\u2028"
PROMPTS = [
    {"prompt_id": "caption", "prompt": "describe the video."},
    {"prompt_id": "count", "prompt": "how many objects are there?"},
    {"prompt_id": HOSTILE, "prompt": HOSTILE},
]
PLAIN_ROWS = 10_000
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1400,1000"
).split()


def _unit(name, kind="video"):
    whole = {"etag": None, "size_bytes": 1, "start_s": None, "end_s": None, "attempts": 0}
    return whole | {"id": name, "kind": kind, "uris": [f"/videos/{name}"], "prompts": PROMPTS}


def _batches(name, index):
    rng = np.random.default_rng(scene_seed("demo", index))
    times = np.arange(16) / 2
    yield FrameBatch(name, 0, render(sample_scene(rng, 96, 96, 8.0), times), times, 0.1)


def _broken(name):
    yield from _batches(name, 0)
    raise UnitError("decode", "Corrupt", f"expected a frame, got {HOSTILE}")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three sampled videos, a sampled failure, a hostile row and thousands of others."""
    folder = tmp_path_factory.mktemp("run")
    job = load_config(
        None, ["source.uri=/videos", f"sink.uri={folder}", "model.max_new_tokens=12", "lightkv.retention=0.3"]
    )
    work = RunDirectory(job).open()
    captioner = Captioner(job, work.run_id, Sampling(folder_of(job.sink.uri), 1.0, 8, job.storage))
    rows = [captioner.row(_unit(f"clip-{n}.mp4"), _batches(f"clip-{n}.mp4", n)) for n in range(3)]
    rows.append(captioner.row(_unit("broken.mp4"), _broken("broken.mp4")))
    answer = {"prompt_id": "caption", "prompt": "describe the video.", "status": "ok"}
    tokens = {"prompt_tokens": 9, "output_tokens": 3}
    rows.append(
        row(
            "hostile",
            uri=f"/videos/z/{HOSTILE}",
            uris=[f"/videos/z/{HOSTILE}"],
            model=HOSTILE,
            lightkv=HOSTILE,
            answers=[answer | tokens | {"text": HOSTILE, "prompt": HOSTILE}],
        )
    )
    for n in range(PLAIN_ROWS):
        said = answer | tokens | {"text": f"a red circle, number {n}"}
        rows.append(row(f"plain-{n:05}", uri=f"/videos/plain/{n:05}.mp4", frame_times_s=[0.0, 1.0], answers=[said]))
    work.write_manifest(units(*(one["id"] for one in rows)))
    (folder / "data").mkdir()
    pq.write_table(rows_table(rows), folder / "data" / "a.parquet")
    (folder / "_run" / "report.html").write_bytes(build_report(str(folder), job.storage))
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if chromium is None or driver is None:
        raise RuntimeError("expected chromium and chromedriver; run infra/test-packages.sh")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


@pytest.fixture
def page(browser, run):
    """The page, just opened. Checks afterwards that no script in its data ran, no error was logged, no request made."""
    browser.get("about:blank")
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(f"file://{run}/_run/report.html")
    WebDriverWait(browser, 20).until(lambda b: b.find_elements(By.CSS_SELECTOR, "#unit h2"))
    yield browser
    assert browser.execute_script("return window.ran") is None
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert {url.partition(":")[0] for url in asked} <= {"file", "data", "about"}
    assert len([url for url in asked if url.startswith("file")]) == 1


def _text(page, selector):
    return page.find_element(By.CSS_SELECTOR, selector).text


def _rows(page):
    return page.find_elements(By.CSS_SELECTOR, "#rows .row")


def _find(page, text):
    field = page.find_element(By.ID, "search")
    field.clear()
    field.send_keys(text)
    return field


def _open(page, name):
    _find(page, name).send_keys(Keys.ENTER)
    WebDriverWait(page, 20).until(lambda _: name in _text(page, "#unit h2"))


def _pictures(page):
    """The panels from left to right: frame, left prompt, right prompt; once the frame is decoded."""
    ready = "return [...document.querySelectorAll('.panels canvas')].map(c => c.toDataURL())"
    blank = "const c = document.createElement('canvas'); c.width = c.height = 640; return c.toDataURL()"
    WebDriverWait(page, 20).until(lambda p: p.execute_script(blank) not in p.execute_script(ready))
    return page.execute_script(ready)


def _sample(run, unit_id):
    found = (json.loads(path.read_text()) for path in (run / "_run" / "samples").glob("*.json"))
    return next(sample for sample in found if sample["id"] == unit_id)


def _survivors(sample, prompt, stage, frame):
    """Numbers of the patches that are kept in a shown frame."""
    targets = np.frombuffer(base64.b64decode(sample["prompts"][prompt]["stages"][stage]["target"][frame]), "<i4")
    first = sample["frames"][frame]["place"][0]
    return set(np.flatnonzero(targets == first + np.arange(len(targets))).tolist())


def test_a_unit_with_frames_is_shown_at_once(page):
    assert _text(page, "#unit h2").startswith("clip-0.mp4")
    assert _text(page, "#found") == f"{PLAIN_ROWS + 5:,} units"
    assert f"{PLAIN_ROWS + 5:,} of {PLAIN_ROWS + 5:,}" in _text(page, ".overview")


def test_thousands_of_rows_keep_the_document_small(page):
    assert 0 < len(_rows(page)) < 60
    page.find_element(By.ID, "list").send_keys(Keys.END)
    WebDriverWait(page, 20).until(lambda p: p.find_elements(By.ID, f"row-{PLAIN_ROWS + 4}"))
    assert 0 < len(_rows(page)) < 60
    chosen = page.find_element(By.ID, "list").get_attribute("aria-activedescendant")
    assert page.find_element(By.ID, chosen).get_attribute("aria-selected") == "true"
    assert page.execute_script("return document.querySelectorAll('*').length") < 1000


def test_units_are_filtered_by_status(page):
    page.find_element(By.CSS_SELECTOR, "[data-filter=error]").click()
    assert _text(page, "#found") == f"1 of {PLAIN_ROWS + 5:,} units"
    assert [one.text.split("\n")[0] for one in _rows(page)] == ["broken.mp4"]
    page.find_element(By.CSS_SELECTOR, "[data-filter=error]").click()
    page.find_element(By.CSS_SELECTOR, "[data-filter='with frames']").click()
    assert len(_rows(page)) == 4


def test_units_are_found_by_file_by_answer_and_by_error(page):
    numbered = sum("123" in f"{n:05}" for n in range(PLAIN_ROWS))
    for text, count in (("PLAIN/00042", 1), ("circle number 123", numbered), ("corrupt", 1), ("no such words", 0)):
        _find(page, text)
        assert _text(page, "#found").startswith(f"{count} of"), text


def test_the_keyboard_is_enough(page):
    page.find_element(By.TAG_NAME, "body").send_keys("/")
    page.switch_to.active_element.send_keys("plain/0000", Keys.ENTER)
    assert _text(page, "#unit h2").startswith("plain/00000.mp4")
    page.switch_to.active_element.send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    assert _text(page, "#unit h2").startswith("plain/00002.mp4")
    assert page.current_url.endswith("#plain-00002")


def test_the_errors_of_the_overview_lead_to_their_units(page):
    page.find_element(By.CSS_SELECTOR, "button[data-search=Corrupt]").click()
    assert _text(page, "#unit h2").startswith("broken.mp4")
    assert HOSTILE.replace("\u2028", "") in _text(page, ".message").replace("\u2028", "").replace("\n", "")
    assert _text(page, "#survivors-title") == "Frames"
    assert len(page.find_elements(By.CSS_SELECTOR, ".strip button")) == 8


def test_survivors_of_two_prompts_are_drawn_stage_by_stage(page, run):
    sample = _sample(run, "clip-1.mp4")
    frames, stages = range(len(sample["frames"])), len(sample["stages"])
    left, right = ([_survivors(sample, prompt, stages - 1, frame) for frame in frames] for prompt in (0, 1))
    differing = next(frame for frame in frames if left[frame] != right[frame])
    _open(page, "clip-1.mp4")
    page.find_elements(By.CSS_SELECTOR, ".strip button")[differing].click()
    frame, *drawn = _pictures(page)
    assert len({frame, *drawn}) == 3
    told = [canvas.get_attribute("data-survivors") for canvas in page.find_elements(By.CSS_SELECTOR, ".panels canvas")]
    assert told == [None, str(len(left[differing])), str(len(right[differing]))]
    either = sum(len(one | other) for one, other in zip(left, right, strict=True))
    assert f"Of the {either} patches of these {len(frames)} frames" in _text(page, "#shared")

    for _ in range(stages):
        page.find_element(By.TAG_NAME, "body").send_keys("[")
    assert page.find_element(By.ID, "stage").get_attribute("value") == "0"
    assert set(_pictures(page)) == {frame}
    page.find_element(By.ID, "stage").send_keys(Keys.ARROW_RIGHT)
    assert len(set(_pictures(page)[1:]) & set(drawn)) == 0

    Select(page.find_elements(By.CSS_SELECTOR, ".panels select")[1]).select_by_index(0)
    _, one, other = _pictures(page)
    assert one == other


def test_a_patch_tells_which_token_it_is_part_of(page, run):
    sample = _sample(run, "clip-0.mp4")
    sizes = np.frombuffer(base64.b64decode(sample["prompts"][0]["stages"][-1]["size"][0]), "<u2")
    canvas = page.find_elements(By.CSS_SELECTOR, ".panels canvas")[1]
    page.execute_script("arguments[0].focus()", canvas)
    before = _pictures(page)[1]
    canvas.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    told = _text(page, ".readout")
    assert told.startswith("Row 1, column 2: ")
    assert ("a token of its own" if sizes[1] == 1 else f"{sizes[1]} patches") in told
    assert _pictures(page)[1] != before


def test_what_a_run_holds_is_shown_as_text(page):
    _open(page, "z/")
    _find(page, "window.ran z/").send_keys(Keys.ENTER)
    assert "<script>window.ran = 1</script>" in _text(page, "#unit h2")
    assert "onerror='window.ran = 2'" in _text(page, ".answers td")
    assert HOSTILE[:40] in _text(page, ".answers th[scope=row]")
    page.find_element(By.CSS_SELECTOR, ".overview summary").click()
    assert HOSTILE[:40] in _text(page, ".overview details")


@pytest.mark.parametrize("width", [390, 820])
def test_narrow_windows_show_everything_without_scrolling_sideways(page, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        assert _text(page, "#unit h2").startswith("clip-0.mp4")
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_light_and_dark_follow_the_system_and_the_button(page):
    ground = "return getComputedStyle(document.body).backgroundColor"
    light = page.execute_script(ground)
    feature = {"name": "prefers-color-scheme", "value": "dark"}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    try:
        dark = page.execute_script(ground)
        page.find_element(By.ID, "theme").click()
        assert (dark != light, page.execute_script(ground)) == (True, light)
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
