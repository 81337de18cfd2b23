"""Every road to the Hub publishes the same files, and a stranger loads them back from there."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.medsight.hub.fake_hub import FakeHub


def run(*arguments: object) -> list[float]:
    script = Path(__file__).with_name("roads.py")
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def without_card(hub: FakeHub, repo_id: str) -> dict[str, bytes]:
    return {path: content for path, content in hub.files(repo_id).items() if path != "README.md"}


@pytest.mark.slow
def test_all_roads_publish_the_same_files_and_a_stranger_loads_them(
    hub: FakeHub, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    expected = run("push", tiny_checkpoint, tmp_path)
    files = without_card(hub, "me/folder")
    on_disk = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    assert files == on_disk and "region_codes.json" in files
    for repo in ("me/model", "me/saving", "me/stage"):
        assert without_card(hub, repo) == files, repo
    # transformers' own Trainer adds what it always adds: its arguments, and a card of its own making.
    assert set(without_card(hub, "me/trainer")) - set(files) == {"training_args.bin"}
    assert files.items() <= hub.files("me/trainer").items()

    auto_map = json.loads(files["config.json"])["auto_map"]
    assert set(auto_map) >= {"AutoConfig", "AutoModelForImageTextToText", "AutoProcessor"}
    assert all(re.fullmatch(r"\w+_medsight\.MedSight\w+", entry) for entry in auto_map.values())
    cards = {}
    for repo in ("me/folder", "me/stage"):  # the others' is transformers' own
        text = hub.files(repo)["README.md"].decode()
        assert "Not a medical device" in text and repo in text and "None were measured" in text
        cards[repo] = text.replace(repo, "").replace(f"# {repo.split('/')[1]}\n", "")
    assert cards["me/folder"] == cards["me/stage"]
    assert [hub.repos[repo].private for repo in ("me/model", "me/folder")] == [True, False]
    assert len(hub.commits("me/folder")) == len(hub.commits("me/stage")) == 1
    assert hub.commits("me/stage")[0].message == "The last stage"

    assert run("load", "me/folder", "me/again") == expected
    again = without_card(hub, "me/again")
    assert {path: again[path] for path in files if path.endswith(".py")} == {
        path: content for path, content in files.items() if path.endswith(".py")
    }
    assert json.loads(again["config.json"]) == json.loads(files["config.json"])
    assert again["model.safetensors"] == files["model.safetensors"]


def test_a_run_that_would_upload_its_logs_and_pictures_is_refused(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from transformers import TrainingArguments

    from medsight.training.trainer import StageTrainer

    arguments = TrainingArguments(str(tmp_path), push_to_hub=True, use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="publish the result with medsight push"):
        StageTrainer(None, args=arguments, stage=SimpleNamespace())
