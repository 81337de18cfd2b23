"""report.html: self-contained, and whole in a real browser at the width of a phone and of a screen."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medsight.evaluation.cases import Case
from medsight.evaluation.predictions import encode_mask
from medsight.evaluation.report import confusion
from medsight.evaluation.report_cases import PICTURE_SIDE, case_picture, varied
from medsight.evaluation.summary import group_confusion


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NAMES = ["A name of forty-two characters, unbroken: ", "Übergröße", "<b>&amp;", '"><script>alert(1)</script>']


@pytest.fixture(scope="module")
def report(
    tmp_path_factory: pytest.TempPathFactory, draw_picture: Callable[..., Path], declare: Callable[..., Path]
) -> Path:
    """The report on sixty rows of many modalities and groups, some with names that are not to be read as HTML."""
    from medsight import cli

    root, generator = tmp_path_factory.mktemp("report"), np.random.default_rng(0)
    cases, predictions = [], []
    for number in range(60):
        mask = draw_picture(root / "data" / f"mask-{number}.png", mask=True, seed=number)
        draw_picture(root / "data" / f"{number}.png", seed=number)
        modality = [*NAMES, *(f"modality {index}" for index in range(14))][number % 18]
        absent = number % 10 == 9
        case = {"qa_id": f"q{number}", "question": "What is it? <image-like> " + "x" * 200, "modality": modality}
        case |= {"short_answer": NAMES[number % 4], "image_file": f"{number}.png", "dataset": f"set {number % 3}"}
        cases.append({**case, "mask_files": [] if absent else [mask.name], "site": "torso"})
        count, shown = number % 3, encode_mask(generator.random((16, 20)) < 0.4)
        answer = {"id": f"q{number}", "answer": f"{NAMES[(number + 1) % 4]} {'long' * 40}", "masks": [shown] * count}
        codes = [f"[C{number % 5}_{index}]" for index in range(count)]
        predictions.append({**answer, "codes": codes, "groups": [f"group {number % 5} of a long name"] * count})
    (root / "data" / "cases.json").write_text(json.dumps(cases))
    (root / "saved.jsonl").write_text("".join(json.dumps(record) + "\n" for record in predictions))
    arguments = ["--benchmark", declare("diagseg"), "--data", root / "data", "--output", root / "out"]
    assert cli.main(["evaluate", *map(str, arguments), "--predictions", str(root / "saved.jsonl")]) == 0
    return root / "out" / "report.html"


def test_the_page_fetches_nothing_and_runs_nothing(report: Path) -> None:
    page = report.read_text("utf-8")
    assert "<script" not in page and "@import" not in page and '<link rel="icon" href="data:,">' in page
    sources = re.findall(r"""(?:src|href)=["']([^"']*)""", page) + re.findall(r"url\(([^)]*)\)", page)
    assert sources and all(source.startswith("data:") for source in sources)
    assert html.escape(NAMES[3], quote=True).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in page


def test_it_shows_the_figures_of_metrics_json(report: Path) -> None:
    page, metrics = report.read_text("utf-8"), json.loads((report.parent / "metrics.json").read_text("utf-8"))
    for score in ("dice", "answer"):
        assert f"{100 * metrics['scores'][score]['macro']['value']:.1f}" in page
    assert metrics["run"]["predictions_sha256"] in page
    for title in ("Dice by modality", "All figures", "Cases", "Predicted code groups", "Code usage"):
        assert f"<h2>{title}</h2>" in page
    assert "first code that the answer cites" in page and metrics["predicted_groups"]["by"] == "cited codes"
    assert "The right codes of 54 rows are not known: neither the data nor the predictions name them." in page
    assert page.count("<figure>") == 3 * 4 + 4  # worst, median and best, and false masks


def row_of(site: str, groups: list[str], absent: bool = False, group: str | None = None) -> dict[str, Any]:
    row = {"modality": "MRI-T1", "site": site, "groups": groups, "absent": absent, "n_masks": len(groups)}
    return row | {"group": group}


def test_confusion_is_of_the_model_s_own_classifier_where_all_predictions_tell_it() -> None:
    rows = [row_of("brain", ["CT"], group="MRI brain"), row_of("brain", [], group="CT"), row_of("-", [], group="CT")]
    found = group_confusion(rows)
    assert found == {"by": "classifier", "counts": {"MRI-T1": {"CT": 1}, "MRI-T1 brain": {"CT": 1, "MRI brain": 1}}}
    foreign = group_confusion([*rows, row_of("brain", ["CT"])])
    counts = {"MRI-T1": {"no code": 1}, "MRI-T1 brain": {"CT": 2, "no code": 1}}
    assert foreign == {"by": "cited codes", "counts": counts}


def test_confusion_else_counts_the_first_cited_group() -> None:
    rows = [row_of("brain", ["MRI brain", "CT"]), row_of("brain", []), row_of("heart", ["CT"])]
    rows.append(row_of("brain", ["CT"], absent=True))
    found = confusion({"predicted_groups": group_confusion(rows)})
    assert found is not None and found["columns"] == ["MRI brain", "CT", "no code"]
    assert [[cell["text"] for cell in line["cells"]] for line in found["rows"]] == [[1, "", 1], ["", 1, ""]]
    assert found["rows"][0]["cells"][0]["diagonal"] and not found["rows"][1]["cells"][1]["diagonal"]
    assert group_confusion([row_of("brain", [])]) is None and confusion({}) is None


@pytest.mark.parametrize("size", [(40, 30), (3000, 400)])
def test_a_case_is_the_whole_image_and_nothing_else(size: tuple[int, int], tmp_path: Path) -> None:
    image, mask = Image.new("L", size, 90), Image.new("1", size)
    mask.paste(1, (0, 0, size[0] // 2, size[1]))
    image.save(tmp_path / "image.png")
    mask.save(tmp_path / "mask.png")
    entries = ({"path": str(tmp_path / name), "bytes": None} for name in ("image.png", "mask.png"))
    picture = case_picture(Case("a", "Where?", (next(entries),), masks=tuple(entries)), None)
    drawn = np.asarray(picture).astype(int)
    assert picture.size == (PICTURE_SIDE, round(PICTURE_SIDE * size[1] / size[0]))
    untouched = drawn[:, PICTURE_SIDE // 2 + 16 :]
    assert np.abs(untouched - 90).max() <= 1
    # All but a few pixels of the number's rim are of another colour than the image.
    assert (drawn[:, : PICTURE_SIDE // 2 - 16] != 90).any(axis=2).mean() > 0.99


PROBE = """<!DOCTYPE html><body style="margin:0"><pre id="found"></pre><script>
const page = {page};
const widths = [400, 1280];
function drawn(image) {{  // a picture that cannot be decoded draws nothing
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 8;
  if (!image.complete || !image.naturalWidth) return false;
  canvas.getContext("2d").drawImage(image, 0, 0, 8, 8);
  return canvas.getContext("2d").getImageData(0, 0, 8, 8).data.every((value, index) => index % 4 < 3 || value === 255);
}}
async function measure(width) {{
  const frame = document.createElement("iframe");
  frame.style = `border:0;height:900px;width:${{width}}px`;
  frame.srcdoc = page;
  const loaded = new Promise(done => frame.onload = done);
  document.body.append(frame);
  await loaded;
  const root = frame.contentDocument.documentElement;
  frame.contentDocument.querySelectorAll("details").forEach(part => part.open = true);
  const images = [...frame.contentDocument.images];
  return {{
    frame: frame.clientWidth, width: root.clientWidth, scroll: root.scrollWidth, images: images.length,
    decoded: images.filter(drawn).length,
    requests: frame.contentWindow.performance.getEntriesByType("resource").filter(
      entry => !entry.name.startsWith("data:")).length,
    title: frame.contentDocument.title,
  }};
}}
(async () => {{
  const found = [];
  for (const width of widths) found.push(await measure(width));
  document.getElementById("found").textContent = JSON.stringify(found);
}})();
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: apt install chromium)")
def test_in_a_browser_it_has_no_errors_no_sideways_scroll_and_all_its_pictures(report: Path, tmp_path: Path) -> None:
    probe = tmp_path / "probe.html"
    page = json.dumps(report.read_text("utf-8")).replace("</", "<\\/")
    probe.write_text(PROBE.format(page=page), encoding="utf-8")
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1400,1000"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    run = subprocess.run(
        [str(CHROMIUM), *arguments, profile, "--virtual-time-budget=20000", "--dump-dom", probe.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    console = [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    assert console == []
    match = re.search(r'<pre id="found">(.*?)</pre>', run.stdout, re.DOTALL)
    assert match is not None and match[1], run.stdout[-500:]
    found = json.loads(html.unescape(match[1]))
    assert [seen["frame"] for seen in found] == [400, 1280]
    for seen in found:
        assert seen["scroll"] <= seen["width"], seen
        assert seen["images"] == seen["decoded"] == 16, seen
        assert seen["requests"] == 0, seen
        assert seen["title"] == "DiagSeg · saved"


def test_cases_are_varied_but_the_best_are_among_the_best() -> None:
    rows = [{"modality": "CT"}] * 20 + [{"modality": "MRI"}] * 12
    ranked = [(float(index), index) for index in range(32)]
    assert [index for _, index in varied(ranked, rows)] == [0, 1, 2, 3]  # MRI begins beyond the first quarter
    assert [index for _, index in varied(ranked[14:], rows)] == [14, 15, 16, 17]
    assert [index for _, index in varied(ranked[18:], rows)] == [18, 19, 20, 21]
    mixed = [{"modality": name} for name in "aaaabbcd" * 4]
    assert [index for _, index in varied(ranked, mixed)] == [0, 4, 6, 7]
    assert [index for _, index in varied([(0.0, index) for index in range(32)], rows)] == [0, 1, 20, 21]
