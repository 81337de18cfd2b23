"""What of a folder is published, what stays, and what is refused."""

import json
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from medsight.hub import files_to_push


STRAY = {
    "training_args.bin": "pickle",
    "weights.pt": "pickle",
    "trainer_state.json": "training",
    "steps.jsonl": "training",
    "run.log": "log",
    "metrics.json": "card",
    "scan.dcm": "patient",
    "volume.nii.gz": "patient",
    "screenshot.png": "patient",
    ".env": "hidden",
    "notes.txt": "not a file of a checkpoint",
    "install.py": "own code",
    "left_medsight.py": "does not use",
    "old.safetensors": "weights",
    "checkpoint-20/": "resume",
    ".git/": "hidden",
    "runs/": "log",
    "examples/": "patient",
    "region_codes/": "pictures",
    "onnx/": "not a file",
}


def make(folder: Path, name: str) -> None:
    (folder / name).write_text("{}", encoding="utf-8")


def paths(folder: Path, contact_sheets: Path | None = None) -> set[str]:
    return set(files_to_push(folder, contact_sheets).files)


def test_a_checkpoint_alone_is_published_whole_and_each_file_that_stays_has_its_reason(folder: Path) -> None:
    whole = files_to_push(folder)
    assert whole.sizes == {path.name: path.stat().st_size for path in folder.iterdir()}
    assert whole.kind == "model" and not whole.left_out
    for name in STRAY:
        if name.endswith("/"):
            (folder / name).mkdir()
            make(folder / name, "config.json")
        else:
            make(folder, name)
    upload = files_to_push(folder)
    assert upload.sizes == whole.sizes
    assert upload.left_out.keys() == STRAY.keys()
    for name, reason in upload.left_out.items():
        assert STRAY[name] in reason, (name, reason)


def test_a_folder_without_code_is_published_with_the_packages(folder: Path) -> None:
    code = {path.name: path.read_bytes() for path in folder.glob("*.py")}
    for name in code:
        (folder / name).unlink()
    files = files_to_push(folder).files
    assert len(code) > 8 and {path: file for path, file in files.items() if path.endswith(".py")} == code


def test_the_index_and_its_shards_go_and_other_shards_stay(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    AutoProcessor.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path / "sharded")
    shards = {path.name for path in (tmp_path / "sharded").glob("*.safetensors")}
    make(tmp_path / "sharded", "model-00009-of-00009.safetensors")
    upload = files_to_push(tmp_path / "sharded")
    assert len(shards) > 1 and {*shards, "model.safetensors.index.json"} <= set(upload.files)
    assert set(upload.left_out) == {"model-00009-of-00009.safetensors"}


def test_contact_sheets_are_published_only_where_they_are_named(folder: Path, tmp_path: Path) -> None:
    sheets = tmp_path / "sheets"
    sheets.mkdir()
    for name in ("C0_1.png", "C1_0.png"):
        Image.new("RGB", (4, 4)).save(sheets / name)
    assert paths(folder, sheets) - paths(folder) == {"region_codes/C0_1.png", "region_codes/C1_0.png"}
    (sheets / "patient.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"C0_0\.png.*patient\.png"):
        files_to_push(folder, sheets)


def test_an_adapter_is_published_without_pefts_empty_card(adapter: Path) -> None:
    (adapter / "optional.bin").write_bytes(b"x")
    upload = files_to_push(adapter)
    assert upload.kind == "adapter"
    assert list(upload.files) == ["adapter_config.json", "adapter_model.safetensors"]
    assert set(upload.left_out) == {"README.md", "optional.bin"}


def set_auto_map(folder: Path, entry: str) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["auto_map"]["AutoModel"] = entry
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: make(folder, ".config.json.partial"), "not finished"),
        (lambda folder: (folder / ".saving-model").mkdir(), "not finished"),
        (lambda folder: make(folder, "optimizer.pt"), r"resume training.*optimizer\.pt"),
        (lambda folder: make(folder, "rng_state_0.pth"), "resume training"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
        (lambda folder: make(folder, "model.safetensors"), "damaged"),
        (lambda folder: (folder / "config.json").unlink(), r"no config\.json"),
        (lambda folder: (folder / "processor_config.json").unlink(), "save the processor"),
        (lambda folder: (folder / "tokenizer.json").write_text("{", encoding="utf-8"), "not valid JSON"),
        (lambda folder: (folder / "loss_medsight.py").unlink(), r"lacks loss_medsight\.py"),
        (lambda folder: set_auto_map(folder, "org/other--modeling_medsight.MedSightModel"), "org/other--modeling"),
        (lambda folder: set_auto_map(folder, "evil.Model"), r"evil\.Model"),
        (lambda folder: make(folder, "tokenizer.json"), "would not load from the Hub"),
        (lambda folder: make(folder, "region_codes.json"), r"region_codes\.json"),
    ],
)
def test_what_is_unfinished_or_would_not_load_is_refused(folder: Path, break_it, message: str) -> None:
    break_it(folder)
    with pytest.raises((OSError, ValueError), match=message):
        files_to_push(folder)


def test_a_folder_may_be_called_as_it_likes_and_its_card_be_in_any_encoding(folder: Path) -> None:
    named = folder.rename(folder.with_name("optimizer-adamw"))
    (named / "README.md").write_bytes("für Ärzte".encode("latin-1"))
    assert {"model.safetensors", "README.md"} <= paths(named)


def test_a_whole_runs_folder_is_refused_with_the_one_to_push(tmp_path: Path) -> None:
    (tmp_path / "stages").mkdir()
    with pytest.raises(ValueError, match=r"push .*model, its result"):
        files_to_push(tmp_path)
    with pytest.raises(NotADirectoryError, match="no such folder"):
        files_to_push(tmp_path / "absent")


def test_an_adapter_with_broken_weights_is_refused(adapter: Path) -> None:
    make(adapter, "adapter_model.safetensors")
    with pytest.raises(ValueError, match="damaged"):
        files_to_push(adapter)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"no adapter_model\.safetensors"):
        files_to_push(adapter)
