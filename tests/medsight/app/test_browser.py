"""The page of the shipped model in a real browser, with real files, at the width of a screen and of a phone."""

import io
import os
import re
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.medsight.export.scans import bright_volume, write_dicom_series


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTHS = {"screen": (1280, 900), "phone": (390, 844)}
# What the answer looked like at each moment, and what has no name for a screen reader.
WATCH = """() => {
  window.seen = [];
  new MutationObserver(() => {
    const answers = document.querySelectorAll(".ms-answer");
    const last = answers.length ? answers[answers.length - 1] : null;
    if (last && last.querySelector(".ms-cursor")) window.seen.push(last.innerText);
  }).observe(document.body, {childList: true, subtree: true, characterData: true});
}"""
NAMELESS = """() => [...document.querySelectorAll("button, input, textarea, img")]
  .filter(element => element.offsetParent !== null)
  .filter(element => !(element.innerText || element.ariaLabel || element.title || element.alt || element.placeholder
    || element.querySelector("img")?.alt
    || [...(element.labels || [])].some(label => label.innerText.trim())))
  .map(element => element.outerHTML.slice(0, 200))"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: apt install chromium)"),
]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of a running page, and the folder that its uploads are in."""
    pytest.importorskip("gradio", reason="the page needs gradio (pip install 'medsight[app]')")
    from medsight.app import launch

    with pytest.MonkeyPatch.context() as patch:
        # A visitor's session ends a second after the page is closed, not an hour.
        patch.setenv("GRADIO_IS_E2E_TEST", "1")
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("private")))
        patch.setattr("tempfile.tempdir", None)
        page = launch(port=0, device="cpu", block=False)
        yield page.local_url, Path(page.private_folder.name)
        page.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser test needs playwright")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture
def open_page(browser: Any, address: tuple[str, Path]) -> Iterator[Callable[[str], Any]]:
    """Opens the page in a new browser profile that reaches nothing else; errors of the page fail the test."""
    contexts, problems = [], []

    def route(request: Any) -> None:
        if request.request.url.startswith((address[0], "data:", "blob:")):
            request.continue_()
        else:
            problems.append(f"fetched {request.request.url}")
            request.abort()

    def open_it(width: str, scheme: str = "light") -> Any:
        size = dict(zip(("width", "height"), WIDTHS[width], strict=True))
        context = browser.new_context(viewport=size, color_scheme=scheme, accept_downloads=True)
        contexts.append(context)
        context.route("**/*", route)
        page = context.new_page()
        page.on("console", lambda entry: problems.append(entry.text) if entry.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address[0])
        page.get_by_label("Question").wait_for()
        page.evaluate(WATCH)
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture
def screenshot(tmp_path: Path) -> Callable[[Any, str], None]:
    """Keeps a picture of the page in the folder that MEDSIGHT_SCREENSHOTS names, or in the test's own."""
    folder = Path(os.environ.get("MEDSIGHT_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)

    def keep(page: Any, name: str) -> None:
        page.wait_for_timeout(300)
        page.screenshot(path=folder / f"app-{name}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), f"{name}: scrolls sideways"
        assert page.evaluate(NAMELESS) == [], name

    return keep


def picture(page: Any) -> np.ndarray:
    """The pixels that the viewer shows."""
    page.locator("#ms-picture img").wait_for()
    file = page.request.get(page.locator("#ms-picture img").get_attribute("src")).body()
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def becomes(page: Any, condition: Callable[[np.ndarray], Any]) -> np.ndarray:
    """The pixels of the viewer, as soon as they meet a condition."""
    deadline = time.monotonic() + 20
    while not condition(shown := picture(page)):
        assert time.monotonic() < deadline, "the viewer does not show what it should"
        page.wait_for_timeout(100)
    return shown


def ask(page: Any, question: str) -> None:
    answers = page.locator(".ms-answer").count()
    page.get_by_label("Question").fill(question)
    page.get_by_role("button", name="Ask", exact=True).click()
    page.locator(".ms-answer").nth(answers).wait_for()
    page.locator(".ms-cursor").wait_for(state="detached")
    page.get_by_role("button", name="Ask", exact=True).wait_for()


@pytest.mark.parametrize("width", list(WIDTHS))
def test_a_volume_is_asked_about_slice_by_slice_and_its_masks_come_home(
    open_page: Callable[..., Any], screenshot: Callable[[Any, str], None], tmp_path: Path, width: str
) -> None:
    nibabel = pytest.importorskip("nibabel")
    from medsight.app.examples import draw_heart_volume

    scan = tmp_path / "Doe^Jane.nii"
    scan.write_bytes(draw_heart_volume())
    page = open_page(width)
    screenshot(page, f"{width}-1-start")
    page.locator("#ms-upload input[type=file]").set_input_files(scan)
    page.get_by_text("NIfTI · 12 slices · 128 × 128 pixels · 1.6 × 1.6 × 8 mm").wait_for()
    plain = picture(page)

    ask(page, "Segment the left ventricle.")
    seen = page.evaluate("window.seen")
    assert len(set(seen)) > 1, f"the answer came at once: {seen}"
    word = page.locator(".ms-answer mark")
    assert word.inner_text() == "left ventricle"
    color = re.search(r"#\w+", word.get_attribute("style"))
    code = page.locator("#ms-chat button[data-finding='0']")
    assert color is not None and color[0] in code.get_attribute("style")
    masked = becomes(page, lambda shown: (shown != plain).any())
    changed = (masked != plain).any(axis=2)
    assert 0.005 < changed.mean() < 0.2
    screenshot(page, f"{width}-2-answer")

    box = page.get_by_label("left ventricle")
    box.uncheck()
    becomes(page, lambda shown: (shown == plain).all())
    box.check()
    becomes(page, lambda shown: (shown == masked).all())

    code.click()
    page.get_by_role("heading", name=re.compile(r"Heat map of \[C5_")).wait_for()
    becomes(page, lambda shown: shown.shape == masked.shape and (shown != masked).any() and (shown != plain).any())
    assert page.locator("#ms-card").get_by_text("MRI heart").count()
    screenshot(page, f"{width}-3-heat-map")
    page.get_by_role("button", name="Back to the masks").click()
    page.get_by_role("button", name="Back to the masks").wait_for(state="hidden")
    becomes(page, lambda shown: (shown == masked).all())

    page.get_by_role("slider", name="Slice").press("ArrowRight")
    page.locator(".ms-layers").wait_for(state="hidden")
    eighth = becomes(page, lambda shown: (shown != masked).any() and (shown != plain).any())
    ask(page, "Segment the left ventricle.")
    assert page.locator(".ms-slice").all_inner_texts() == ["Slice 7 of 12", "Slice 8 of 12"]
    page.locator("#ms-window input").fill("100/60")
    page.locator("#ms-window input").press("Enter")
    becomes(page, lambda shown: (shown != eighth).mean() > 0.3)

    page.get_by_role("button", name="Download the masks").click()
    page.get_by_label("nifti").check()
    page.get_by_role("button", name="Make the archive").click()
    with page.expect_download() as download:
        page.locator("#ms-archive a").first.click()
    download.value.save_as(tmp_path / "masks.zip")
    screenshot(page, f"{width}-4-download")
    with zipfile.ZipFile(tmp_path / "masks.zip") as archive:
        assert {"mask-01.png", "mask-02.png", "labels.nii.gz", "overview.png"} <= set(archive.namelist())
        archive.extract("labels.nii.gz", tmp_path)
    labels, source = nibabel.load(tmp_path / "labels.nii.gz"), nibabel.load(scan)
    assert np.allclose(labels.affine, source.affine) and labels.shape == source.shape
    values, voxels = np.asarray(labels.dataobj), np.asarray(source.dataobj)
    assert voxels[values > 0].mean() > 2 * voxels[values == 0].mean()  # the ventricle is brighter than the rest
    assert (values > 0).any(axis=(0, 1)).sum() == 2
    assert "Doe" not in page.content()


@pytest.mark.parametrize("width", list(WIDTHS))
def test_a_micrograph_is_talked_about_over_several_turns(
    open_page: Callable[..., Any], screenshot: Callable[[Any, str], None], width: str
) -> None:
    mahotas = pytest.importorskip("mahotas.demos")
    page = open_page(width, "dark")
    page.locator("#ms-upload input[type=file]").set_input_files(mahotas.image_path("nuclear.png"))
    page.get_by_text("Picture · 1344 × 1024 pixels").wait_for()
    for control in ("#ms-slice", "#ms-window"):
        page.locator(control).wait_for(state="hidden")
    for question in ("Segment the nucleus.", "<img src=x onerror=alert(1)> {{value}} ${2 + 2} `"):
        ask(page, question)
        assert page.locator(".ms-question").last.inner_text().endswith(question)
    assert page.locator("#ms-chat button[data-finding='0']").count() == 1
    screenshot(page, f"{width}-dark")
    page.get_by_role("button", name="New conversation").click()
    page.locator(".ms-empty").wait_for()
    page.locator(".ms-layers").wait_for(state="hidden")  # or not there at all


def test_dicom_never_shows_who_the_patient_is_and_is_deleted_with_the_session(
    open_page: Callable[..., Any],
    address: tuple[str, Path],
    capfd: pytest.CaptureFixture[str],
    screenshot: Callable[[Any, str], None],
    tmp_path: Path,
) -> None:
    pydicom = pytest.importorskip("pydicom")
    from pydicom.data import get_testdata_file

    name = str(pydicom.dcmread(get_testdata_file("CT_small.dcm")).PatientName)
    page = open_page("screen")
    page.locator("#ms-upload input[type=file]").set_input_files(get_testdata_file("CT_small.dcm"))
    page.get_by_text("DICOM, CT · 128 × 128 pixels").wait_for()
    plain = picture(page)
    page.get_by_label("Window").click()
    page.get_by_role("option", name="lung").click()
    becomes(page, lambda shown: (shown != plain).any())
    ask(page, "What is in this image?")
    screenshot(page, "screen-dicom")
    files = [path for path in address[1].rglob("*") if path.is_file() and path.read_bytes()[128:132] == b"DICM"]
    assert [file.name for file in files] == ["00001"]

    (tmp_path / "broken").write_bytes(Path(get_testdata_file("CT_small.dcm")).read_bytes()[:400])
    page.locator("#ms-upload input[type=file]").set_input_files(tmp_path / "broken")
    page.get_by_text("The upload").wait_for()
    assert files[0].exists() and page.locator("#ms-picture").is_visible()  # what was open stays
    page.locator("#ms-upload input[type=file]").set_input_files(get_testdata_file("MR_small.dcm"))
    page.get_by_text("DICOM, MR").wait_for()
    assert not files[0].exists()
    assert name not in page.content() and "Doe" not in page.content()
    written = capfd.readouterr()
    assert name not in written.out + written.err

    page.close()
    deadline = time.monotonic() + 30
    while list((address[1] / "sessions").iterdir()) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert list((address[1] / "sessions").iterdir()) == []


def test_a_series_is_uploaded_as_its_files(open_page: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    files = write_dicom_series(tmp_path / "series", bright_volume((3, 48, 56)))
    page = open_page("screen")
    page.locator("#ms-upload input[type=file]").set_input_files(files)
    page.get_by_text("DICOM, CT · 3 slices").wait_for()


def test_an_answer_can_be_stopped(open_page: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from modeling_medsight import MedSightForConditionalGeneration

    generate = MedSightForConditionalGeneration.generate

    def endless(self: Any, *arguments: Any, **settings: Any) -> Any:
        settings["suppress_tokens"] = [self.generation_config.eos_token_id]
        return generate(self, *arguments, **settings)

    monkeypatch.setattr(MedSightForConditionalGeneration, "generate", endless)
    page = open_page("screen")
    page.get_by_role("button", name="Cell nuclei").click()
    page.get_by_text("Picture · 1344 × 1024 pixels").wait_for()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("number input for Longest answer").fill("512")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("(stopped)").wait_for()
    page.get_by_role("button", name="Ask", exact=True).wait_for()


def test_a_port_that_is_taken_is_refused_by_name(address: tuple[str, Path]) -> None:
    from medsight.app import launch

    port = int(address[0].rstrip("/").rpartition(":")[2])
    with pytest.raises(OSError, match=f"port {port} .*another port"):
        launch(port=port)
