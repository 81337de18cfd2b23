"""A card says what is known of a checkpoint, from files, and that the rest is not known."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from medsight import cli
from medsight.checkpoint import weights_sha256
from medsight.hub import CardFacts, push, render_card
from tests.medsight.hub.fake_hub import FakeHub


def figure(value: float, spread: float | None = 0.05, n: int = 40) -> dict[str, Any]:
    ends = {"low": None, "high": None} if spread is None else {"low": value - spread, "high": value + spread}
    return {"value": value, **ends, "n": n}


def metrics_of(folder: Path, dice: float) -> dict[str, Any]:
    """A metrics.json as `medsight evaluate` writes it."""
    return {
        "system": "tiny",
        "benchmark": "segmentation",
        "title": "Text-prompted segmentation",
        "task": "segment",
        "protocol": {"masks": "medsight", "mask_flags": {"threshold": 0.5}},
        "n": 41,
        "patients": 17,
        "interval_unit": "patient or image",
        "scores": {"dice": {"micro": figure(dice), "macro": figure(dice / 2)}},
        "by": {
            "dataset": {"busi": {"n": 38, "dice": figure(0.8125)}, "tnbc": {"n": 3, "dice": figure(0.0625, None, 1)}}
        },
        "counts": {"by_modality": {"CT": 41}, "label_origin": {"expert": 30, "model (some network)": 11}},
        "refused": {"mask": {"empty reference": 2}},
        "present": {"n": 40, "no_region_rate": figure(0.25)},
        "negatives": {"n": 1, "no_region_rate": None, "false_mask_rate": None},
        "problems": {"missing": {"count": 1, "rows": ["patient Jane Doe"]}},
        "notes": ["Limited to the first 41 rows."],
        "run": {
            "medsight_version": "0.1.0",
            "checkpoint": {"weights_sha256": weights_sha256(folder)},
            "data": {"sha256": "ab"},
        },
    }


def save(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def card_of(folder: Path, *metrics: Path, **facts: Any) -> str:
    return render_card(folder, "me/tiny", CardFacts(metrics=metrics, **facts))


def section(card: str, title: str) -> str:
    return card.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_a_card_without_facts_has_no_figures_and_says_so(folder: Path) -> None:
    text = render_card(folder, "me/tiny")
    card = ModelCard(text)
    assert card.data.license == "other" and card.data.eval_results is None and card.data.datasets is None
    assert "None were measured" in section(text, "Results")
    assert "Not recorded" in section(text, "Training data and licences")
    assert "not recorded" in section(text, "Training, time and carbon")
    assert "Not a medical device" in text and section(text, "Intended use") and section(text, "Forbidden use")
    assert "2606.06760" in section(text, "How to cite")
    assert "{{" not in text and "{%" not in text and "None\n" not in text
    assert not re.search(r"\d+\.\d+ ?%|Dice", text)


def test_figures_and_intervals_are_those_of_metrics_json(folder: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "scores" / "metrics.json", metrics_of(folder, 0.6875))
    text = card_of(folder, path.parent, license="cc-by-4.0")
    results = section(text, "Results")
    for line in (
        "| Dice | 68.8 (63.7–73.8) | 34.4 (29.4–39.4) | 40 |",
        "| busi | 81.2 (76.2–86.2) | 40 |",
        "| tnbc | 6.2 | 1 |",
        "| No mask where there is one | 25.0 (20.0–30.0) | | 40 |",
        *("11 rows are not an expert's: model (some network)", "Limited to the first", "empty reference"),
        *("hardly a figure: tnbc (3)", "1 predictions with a problem: missing"),
        "intervals drawn by patient or image",
    ):
        assert line in results
    assert "Jane" not in text and "| benchmark |" not in results
    data = ModelCard(text).data
    assert data.license == "cc-by-4.0"
    found = {(one.metric_type, one.metric_name): (one.metric_value, one.metric_args) for one in data.eval_results}
    assert found["dice", "Dice, mean over rows"] == (0.6875, {"low": 0.6375, "high": 0.7375, "n": 40})
    assert len(found) == 2 and {one.task_type for one in data.eval_results} == {"image-segmentation"}


def test_the_main_figures_of_several_benchmarks_come_first_and_the_index_tells_them_apart(
    folder: Path, tmp_path: Path
) -> None:
    asked = {"benchmark": "presence", "title": "Is it there", "task": "vqa", "protocol": {"answers": "strict"}}
    asked |= {"scores": {"answer": {"micro": figure(0.75), "macro": figure(0.5)}}, "by": {}}
    plain, held_out = metrics_of(folder, 0.6875), metrics_of(folder, 0.5)
    held_out |= {"title": "Text-prompted segmentation, in wordings not trained on"}
    held_out["run"] |= {"data": {"sha256": "cd"}}
    every = (plain, held_out, metrics_of(folder, 0.5) | asked)
    text = card_of(folder, *(save(tmp_path / f"{i}.json", content) for i, content in enumerate(every)))
    head = section(text, "Results").split("###")[0]
    assert "| Text-prompted segmentation | Dice | 68.8 (63.7–73.8) | 40 |" in head
    assert "| Is it there | All questions | 75.0 (70.0–80.0) | 40 |" in head
    index = ModelCard(text).data.to_dict()["model-index"]
    found = {one["dataset"]["name"]: one["metrics"][0]["value"] for one in index[0]["results"]}
    assert found == {plain["title"]: 0.6875, held_out["title"]: 0.5, "Is it there": 0.75}


def test_metrics_in_the_folder_are_taken_and_stay_there(folder: Path) -> None:
    save(folder / "metrics.json", metrics_of(folder, 0.6875))
    planned = push(folder, "me/tiny", dry_run=True)
    assert "68.8" in card_of(folder)
    assert "README.md" in planned.files and "metrics.json" in planned.left_out


def test_figures_of_other_weights_or_of_unknown_ones_are_refused(folder: Path, tmp_path: Path) -> None:
    metrics = metrics_of(folder, 0.5)
    path = save(tmp_path / "metrics.json", metrics)
    with pytest.raises(ValueError, match="given twice"):
        card_of(folder, path, path)
    for checkpoint, message in (({"weights_sha256": "f" * 64}, "is about weights ffff"), (None, "does not say which")):
        metrics["run"]["checkpoint"] = checkpoint
        save(path, metrics)
        with pytest.raises(ValueError, match=message):
            card_of(folder, path)
    with pytest.raises(ValueError, match=r"no metrics\.json of medsight evaluate"):
        card_of(folder, save(tmp_path / "x.json", {"dice": 1}))


RECORD = {
    "datasets": ["busi", "tnbc"],
    "emissions": {"emissions": 1250.0, "source": "codecarbon", "training_type": "training"},
    "data": "40 training images.\n\n| set | licence |\n|---|---|\n| busi | CC-BY-9.9 |",
    "training": "| 1_regions | 1:00 | device Some GPU |",
}


@pytest.fixture
def run(folder: Path) -> Path:
    """The folder of a finished run, whose result is the tiny checkpoint."""
    save(folder.parent / "training_record.json", RECORD)
    return folder.parent


def test_a_run_tells_of_its_data_and_of_its_training(folder: Path, run: Path, adapter: Path) -> None:
    text = card_of(folder)
    assert RECORD["data"] in section(text, "Training data and licences")
    assert RECORD["training"] in section(text, "Training, time and carbon")
    assert ModelCard(text).data["co2_eq_emissions"]["emissions"] == 1250.0 and str(run) not in text
    of_adapter = card_of(adapter, base_model="me/tiny", run=run)
    assert RECORD["training"] in of_adapter
    assert ModelCard(text).data.datasets == ModelCard(of_adapter).data.datasets == RECORD["datasets"]


def test_what_a_run_did_not_record_is_not_stated_and_a_damaged_record_is_named(folder: Path, run: Path) -> None:
    path = save(run / "training_record.json", RECORD | {"datasets": [], "emissions": None})
    assert not {"datasets", "co2_eq_emissions"} & set(ModelCard(card_of(folder)).data.to_dict())
    save(path, {"datasets": [], "emissions": None, "training": ""})
    with pytest.raises(ValueError, match=r"training_record\.json has no 'data'"):
        card_of(folder)
    path.unlink()
    assert "Not recorded" in card_of(folder)
    with pytest.raises(FileNotFoundError, match=r"training_record\.json is not there.*train on.*omit --run"):
        card_of(folder, run=run)


def test_a_run_that_ended_with_other_weights_is_refused(folder: Path, run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert RECORD["training"] in card_of(copy, run=run) and RECORD["training"] not in card_of(copy)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(weights))
    with pytest.raises(ValueError, match="ended with weights"):
        card_of(copy, run=run)


def test_a_card_can_be_written_alone_and_is_then_the_one_that_is_published(
    hub: FakeHub, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8)).save(folder / "example.png")
    half = Path(shutil.copytree(folder, tmp_path / "half"))
    (half / "tokenizer.json").unlink()
    alone = ["push", str(folder), "--repo-id", "me/tiny", "--write-card"]
    alone += ["--license", "cc-by-4.0", "--limits", "* One more limit.", "--prompt", "Segment the moon."]
    assert cli.main([*alone, "--dry-run"]) == 1 and "leave out --dry-run" in capsys.readouterr().err
    assert cli.main([*alone, "--json"]) == 0
    path = Path(json.loads(capsys.readouterr().out)["card"])
    facts = {"license": "cc-by-4.0", "limits": "* One more limit.", "prompt": "Segment the moon."}
    text = path.read_text("utf-8")
    assert cli.main(alone) == 1 and "README.md exists" in capsys.readouterr().err
    assert cli.main(["push", str(half), "--repo-id", "me/tiny", "--write-card"]) == 1
    assert "has no tokenizer.json" in capsys.readouterr().err and not (half / "README.md").exists()
    assert not hub.log and text == card_of(folder, **facts)

    push(folder, "me/tiny")
    assert hub.files("me/tiny")["README.md"].decode() == text and "example.png" in hub.files("me/tiny")
    card = ModelCard(text)
    (widget,) = card.data["widget"]
    assert widget["text"] == "Segment the moon." and "* One more limit." in card.text
    assert widget["src"] == f"{hub.url}/me/tiny/resolve/main/example.png"


def test_the_example_in_the_card_runs_as_it_is_printed(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    push(folder, "me/tiny")
    text = hub.files("me/tiny")["README.md"].decode()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]  # type: ignore[index]
    Image.new("RGB", (40, 30), (200, 20, 20)).save(tmp_path / "scan.png")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()
