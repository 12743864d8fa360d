"""The page of icetransfer.serve in a real browser, with a fake microphone fed from a file."""

import re
import shutil

import pytest
import soundfile
from playwright.sync_api import expect, sync_playwright

from icetransfer.serving.columns import find_columns

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 60_000  # milliseconds
DONE = "All was heard."
TEXT = ["een", "twee", "drie", "vier", "vijf"]
EEN = re.compile(r"een")


@pytest.fixture(scope="module")
def site(serve):
    with serve() as site:
        yield site


@pytest.fixture(scope="module")
def recording(bundle):
    return next(bundle.glob("*/test.wav"))


@pytest.fixture(scope="module")
def browser(recording):
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("no browser: apt-get install chromium, and this test runs the page in it")
    flags = [
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-audio-capture={recording}",
        "--disable-background-networking",
    ]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, site):
    """The page on a telephone's screen, with a microphone that is permitted."""
    context = browser.new_context(
        viewport={"width": 390, "height": 844}, permissions=["microphone"]
    )
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    problems = []
    page.on("pageerror", lambda error: problems.append(error))
    page.goto(f"http://localhost:{site.port}/")
    expect(page.locator("section.column")).to_have_count(1, timeout=PATIENCE)
    yield page
    context.close()
    assert not problems


def message(page, text):
    expect(page.locator("#message")).to_contain_text(text, timeout=PATIENCE)


def words(page, number):
    return page.locator("section.column").nth(number).locator(".word > span").all_inner_texts()


def test_test_speech_gives_both_precisions_the_words_of_the_model(page, columns) -> None:
    page.get_by_text("All precisions").click()
    expect(page.locator("section.column")).to_have_count(2)
    page.get_by_role("button", name="Test speech, 2 s").click()
    message(page, DONE)
    expect(page.locator("#said")).to_have_text("Said: Eén keer.")
    for number, column in enumerate(columns):
        listener, samples = column.listen(), speech_of(column)
        segments = listener.accept(samples) + listener.finish()
        assert words(page, number) == [word.text for found in segments for word in found.words]
        delays = page.locator("section.column").nth(number).locator(".word small")
        found = [int(text) for text in delays.all_inner_texts()]
        # A chunk of 320 ms and 130 ms of look-ahead lie between a first frame and its word.
        assert min(found) >= 0 and max(found) > 300
        figures = page.locator("section.column").nth(number).locator("dd").all_inner_texts()
        assert re.fullmatch(r"\d+ ms", figures[0]) and figures[2] == f"{len(found)}, 0"
        assert re.fullmatch(r"\d+\.\d %", figures[3])
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def speech_of(column):
    samples, _ = soundfile.read(column.exported.dir / "test.wav", dtype="float32")
    return samples


def test_a_microphone_is_heard_until_it_is_stopped(page) -> None:
    page.locator("#microphone").click()
    message(page, "Listening: speak now.")
    expect(page.locator(".partial .word").nth(9)).to_have_text(EEN, timeout=PATIENCE)
    expect(page.locator("#load")).to_contain_text("CPU", timeout=PATIENCE)
    expect(page.locator("#file")).to_be_disabled()
    page.locator("#stop").click()
    message(page, DONE)
    expect(page.locator(".partial")).to_have_count(0)


def test_files_that_are_sound_and_not(page, recording) -> None:
    bad = {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no sound"}
    page.set_input_files("#file", bad)
    message(page, "notes.txt cannot be read as sound: ffmpeg -i FILE")
    page.set_input_files("#file", recording)
    message(page, DONE)
    assert len(words(page, 0)) > 40


def test_words_that_change_and_vanish_are_marked(page) -> None:
    """What a server says that no nano model does."""
    page.evaluate(
        """async () => {
          const { Column } = await import("/page.js");
          const column = new Column({ id: "x", bundle: "x", tier: "320", precision: "fp32" });
          document.body.append(column.node);
          const at = (texts) => texts.map((text, i) => [text, i, i + 0.5, 0.9]);
          const hear = (ended, partial) =>
            column.hear({ ended: ended.map(at), partial: at(partial), seconds: 3, cpu: 0.1 }, 0, 9);
          hear([], ["een", "twee", "dr"]);
          hear([], ["een", "twee", "drie", "vier"]);
          hear([["een", "twee", "drie"]], ["vijf"]);
        }"""
    )
    added = page.locator("[data-id=x]")
    assert added.locator(".word > span").all_inner_texts() == TEXT
    assert added.locator(".changed > span").all_inner_texts() == ["drie"]
    assert "“dr” after" in added.locator(".changed").get_attribute("title")
    assert added.locator(".gone > span").all_inner_texts() == ["vier"]
    assert added.locator("dd").nth(2).inner_text() == "4, 2"


def test_bundles_stand_beside_each_other(browser, serve, bundle, columns, tmp_path) -> None:
    other = shutil.copytree(bundle, tmp_path / "nl-en" / "bundle")
    with serve(offered=[*columns, *find_columns([other])]) as site:
        page = browser.new_page()
        page.goto(f"http://localhost:{site.port}/")
        heads = page.locator("section.column h2")
        expect(heads).to_have_text(["nl-ml", "nl-en"], timeout=PATIENCE)
        page.locator("#choice input").nth(3).check()
        expect(heads).to_have_text(["nl-ml", "nl-en", "nl-en"])
        expect(page.locator("#chosen")).to_have_text("3 of 4")
        page.get_by_text("All bundles").click()
        expect(heads).to_have_text(["nl-ml", "nl-en"])
        expect(page.locator("#recordings button")).to_have_count(1)  # it is the same
        page.close()


def test_without_permission_microphone_or_server(browser, serve) -> None:
    with serve() as site:
        context = browser.new_context(permissions=[])
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.goto(f"http://localhost:{site.port}/")
        page.locator("#microphone").click()
        message(page, "The browser did not permit the microphone: allow it")
        page.evaluate(
            """() => {
              const error = new DOMException("", "NotFoundError");
              navigator.mediaDevices.getUserMedia = () => Promise.reject(error);
            }"""
        )
        page.locator("#microphone").click()
        message(page, "There is no microphone: connect one")
        page.locator("section.column").wait_for()
        page.locator("#recordings button").click()
        message(page, "Playing")
    message(page, "The server has ended")
    page.locator("input[type=checkbox]").first.uncheck()
    page.locator("#microphone").click()
    message(page, "Choose a model first")
    context.close()
