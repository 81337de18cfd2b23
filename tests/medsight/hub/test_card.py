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
from medsight.hub import CardFacts, push, render_card, write_card
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
    text = render_card(folder, "me/tiny", CardFacts(license="cc-by-4.0", metrics=(path.parent,)))
    results = section(text, "Results")
    assert "| Dice | 68.8 (63.7–73.8) | 34.4 (29.4–39.4) | 40 |" in results
    assert "| busi | 81.2 (76.2–86.2) | 40 |" in results and "| tnbc | 6.2 | 1 |" in results
    assert "| No mask where there is one | 25.0 (20.0–30.0) | | 40 |" in results
    for note in ("11 rows are not an expert's: model (some network)", "Limited to the first", "empty reference"):
        assert note in results
    assert "hardly a figure: tnbc (3)" in results and "1 predictions with a problem: missing" in results
    assert "intervals drawn by patient or image" in results and "Jane" not in text
    data = ModelCard(text).data
    assert data.license == "cc-by-4.0"
    found = {(one.metric_type, one.metric_name): (one.metric_value, one.metric_args) for one in data.eval_results}
    assert found["dice", "Dice, mean over rows"] == (0.6875, {"low": 0.6375, "high": 0.7375, "n": 40})
    assert len(found) == 2 and {one.task_type for one in data.eval_results} == {"image-segmentation"}


def test_the_main_figures_of_several_benchmarks_come_first(folder: Path, tmp_path: Path) -> None:
    asked = {"benchmark": "presence", "title": "Is it there", "task": "vqa", "protocol": {"answers": "strict"}}
    asked |= {"scores": {"answer": {"micro": figure(0.75), "macro": figure(0.5)}}, "by": {}}
    paths = [save(tmp_path / "one.json", metrics_of(folder, 0.6875))]
    paths.append(save(tmp_path / "two.json", metrics_of(folder, 0.5) | asked))
    both = section(render_card(folder, "me/tiny", CardFacts(metrics=tuple(paths))), "Results")
    head = both.split("###")[0]
    assert "| Text-prompted segmentation | Dice | 68.8 (63.7–73.8) | 40 |" in head
    assert "| Is it there | All questions | 75.0 (70.0–80.0) | 40 |" in head
    alone = section(render_card(folder, "me/tiny", CardFacts(metrics=tuple(paths[:1]))), "Results")
    assert "| benchmark |" not in alone


def test_the_index_tells_one_benchmark_in_other_wordings_apart(folder: Path, tmp_path: Path) -> None:
    plain = metrics_of(folder, 0.6875)
    other = {"title": "Text-prompted segmentation, in wordings not trained on"}
    held_out = metrics_of(folder, 0.5) | other
    held_out["run"] = held_out["run"] | {"data": {"sha256": "cd"}}
    paths = tuple(save(tmp_path / f"{i}.json", one) for i, one in enumerate((plain, held_out)))
    index = ModelCard(render_card(folder, "me/tiny", CardFacts(metrics=paths))).data.to_dict()["model-index"]
    found = {one["dataset"]["name"]: one["metrics"][0]["value"] for one in index[0]["results"]}
    assert found == {plain["title"]: 0.6875, held_out["title"]: 0.5}


def test_metrics_in_the_folder_are_taken_and_stay_there(folder: Path) -> None:
    save(folder / "metrics.json", metrics_of(folder, 0.6875))
    planned = push(folder, "me/tiny", dry_run=True)
    assert "68.8" in render_card(folder, "me/tiny")
    assert "README.md" in planned.files and "metrics.json" in planned.left_out


def test_figures_of_other_weights_or_of_unknown_ones_are_refused(folder: Path, tmp_path: Path) -> None:
    metrics = metrics_of(folder, 0.5)
    for checkpoint, message in (({"weights_sha256": "f" * 64}, "is about weights ffff"), (None, "does not say which")):
        metrics["run"]["checkpoint"] = checkpoint
        path = save(tmp_path / "metrics.json", metrics)
        with pytest.raises(ValueError, match=message):
            render_card(folder, "me/tiny", CardFacts(metrics=(path,)))
    with pytest.raises(ValueError, match=r"no metrics\.json of medsight evaluate"):
        render_card(folder, "me/tiny", CardFacts(metrics=(save(tmp_path / "x.json", {"dice": 1}),)))
    path = save(tmp_path / "metrics.json", metrics_of(folder, 0.5))
    with pytest.raises(ValueError, match="given twice"):
        render_card(folder, "me/tiny", CardFacts(metrics=(path, path)))


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


def test_a_run_tells_of_its_data_and_of_its_training(folder: Path, run: Path) -> None:
    text = render_card(folder, "me/tiny")
    assert RECORD["data"] in section(text, "Training data and licences")
    assert RECORD["training"] in section(text, "Training, time and carbon")
    data = ModelCard(text).data
    assert data.datasets == RECORD["datasets"] and data["co2_eq_emissions"]["emissions"] == 1250.0
    assert str(run) not in text


def test_an_adapter_has_a_run_too(adapter: Path, run: Path) -> None:
    text = render_card(adapter, "me/adapter", CardFacts(base_model="me/tiny", run=run))
    assert RECORD["training"] in text and ModelCard(text).data.datasets == RECORD["datasets"]


def test_a_run_without_emissions_or_known_sets_states_neither(folder: Path, run: Path) -> None:
    save(run / "training_record.json", RECORD | {"datasets": [], "emissions": None})
    data = ModelCard(render_card(folder, "me/tiny")).data.to_dict()
    assert not {"datasets", "co2_eq_emissions"} & set(data)


def test_a_run_whose_record_is_missing_or_damaged_is_named(folder: Path, run: Path) -> None:
    path = save(run / "training_record.json", {"datasets": [], "emissions": None, "training": ""})
    with pytest.raises(ValueError, match=r"training_record\.json has no 'data'"):
        render_card(folder, "me/tiny")
    path.unlink()
    assert "Not recorded" in render_card(folder, "me/tiny")
    with pytest.raises(FileNotFoundError, match=r"has no training_record\.json.*train on.*leave out --run"):
        render_card(folder, "me/tiny", CardFacts(run=run))


def test_a_run_that_ended_with_other_weights_is_refused(folder: Path, run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    facts = CardFacts(run=run)
    assert RECORD["training"] in render_card(copy, "me/tiny", facts)
    assert RECORD["training"] not in render_card(copy, "me/tiny")
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(weights))
    with pytest.raises(ValueError, match="ended with weights"):
        render_card(copy, "me/tiny", facts)


def test_a_written_card_is_the_one_that_is_published(hub: FakeHub, folder: Path) -> None:
    facts = CardFacts(license="cc-by-4.0", limits="* One more limit.", prompt="Segment the moon.")
    Image.new("RGB", (8, 8)).save(folder / "example.png")
    path = write_card(folder, "me/tiny", facts)
    assert path.read_text("utf-8") == render_card(folder, "me/tiny", facts)
    with pytest.raises(FileExistsError, match="exists"):
        write_card(folder, "me/tiny", facts)
    push(folder, "me/tiny")
    card = ModelCard(hub.files("me/tiny")["README.md"].decode())
    (widget,) = card.data["widget"]
    assert widget["text"] == "Segment the moon." and "* One more limit." in card.text
    assert widget["src"] == f"{hub.url}/me/tiny/resolve/main/example.png" and "example.png" in hub.files("me/tiny")


def test_push_can_write_the_card_alone(
    hub: FakeHub, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["push", str(folder), "--repo-id", "me/tiny"]
    alone = [*command, "--write-card"]
    assert cli.main([*alone, "--dry-run"]) == 1 and "leave out --dry-run" in capsys.readouterr().err
    assert cli.main([*alone, "--license", "mit", "--json"]) == 0
    path = Path(json.loads(capsys.readouterr().out)["card"])
    assert path.read_text("utf-8") == render_card(folder, "me/tiny", CardFacts(license="mit"))
    assert cli.main([*alone, "--license", "mit"]) == 1 and "README.md exists" in capsys.readouterr().err
    assert cli.main([*command, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"]["README.md"] == path.stat().st_size
    assert not hub.log

    half = Path(shutil.copytree(folder, tmp_path / "half"))
    (half / "README.md").unlink()
    (half / "tokenizer.json").unlink()
    assert cli.main(["push", str(half), "--repo-id", "me/tiny", "--write-card"]) == 1
    assert "has no tokenizer.json" in capsys.readouterr().err and not (half / "README.md").exists()


def test_the_example_in_the_card_runs_as_it_is_printed(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    push(folder, "me/tiny")
    text = hub.files("me/tiny")["README.md"].decode()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]  # type: ignore[index]
    Image.new("RGB", (40, 30), (200, 20, 20)).save(tmp_path / "scan.png")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()
