"""An upload is one commit with the folder's bytes, and what the Hub answers is said plainly."""

import json
from dataclasses import asdict
from pathlib import Path

import huggingface_hub.constants
import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForImageTextToText

from medsight.hub import CardFacts, push
from tests.medsight.hub.fake_hub import READER, FakeHub


def test_a_push_is_one_commit_with_the_folders_bytes_and_a_card(hub: FakeHub, folder: Path) -> None:
    (folder / "training_args.bin").write_bytes(b"a pickle")
    done = push(folder, "me/tiny", message="First upload")
    files = hub.files("me/tiny")
    card = ModelCard(files.pop("README.md").decode())
    assert files == {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".bin"}
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "image-text-to-text"
    (commit,) = hub.commits("me/tiny")
    assert commit.message == "First upload"
    assert (done.commit, done.url) == (commit.oid, f"{hub.url}/me/tiny/commit/{commit.oid}")
    assert done.files == {path: len(content) for path, content in hub.files("me/tiny").items()}
    assert list(done.left_out) == ["training_args.bin"]
    json.dumps(asdict(done))


def test_a_dry_run_says_the_same_and_asks_nobody(hub: FakeHub, folder: Path) -> None:
    planned = push(folder, "me/tiny", dry_run=True)
    assert not hub.log and planned.commit is None and planned.url is None
    done = push(folder, "me/tiny")
    assert (planned.files, planned.left_out) == (done.files, done.left_out)


def test_pushing_again_changes_what_changed_and_removes_what_would_be_loaded_in_its_place(
    hub: FakeHub, folder: Path
) -> None:
    push(folder, "me/tiny")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    there = hub.repos["me/tiny"].branches["main"][-1].files
    there["notes.md"] = b"somebody's own"
    stale = ["adapter_config.json", "adapter_model.safetensors", "model.safetensors", "region_codes.json"]
    there |= {name: b"{}" for name in stale if name != "model.safetensors"}
    done = push(folder, "me/tiny")
    first, second = hub.commits("me/tiny")
    files = hub.files("me/tiny")
    assert sorted(done.deleted) == stale and not files.keys() & {*stale}
    assert files["notes.md"] == b"somebody's own"
    on_disk = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert on_disk.items() <= files.items() and "model.safetensors.index.json" in on_disk
    changed = {path for path in {*files, *first.files} if files.get(path) != first.files.get(path)}
    assert second.changes == changed - {".gitattributes", "notes.md"}
    assert push(folder, "me/tiny").commit == second.oid and len(hub.commits("me/tiny")) == 2


def test_a_branch_is_made_and_main_stays(hub: FakeHub, folder: Path) -> None:
    for _ in range(2):
        assert push(folder, "me/tiny", revision="v2").revision == "v2"
    assert len(hub.commits("me/tiny", "v2")) == 1 and not hub.files("me/tiny")


def test_private_is_kept(hub: FakeHub, folder: Path) -> None:
    push(folder, "me/secret", private=True)
    assert hub.repos["me/secret"].private
    hub.create("me/open")
    with pytest.raises(ValueError, match=r"me/open exists and is public"):
        push(folder, "me/open", private=True)
    assert not hub.files("me/open")


def test_a_card_in_the_folder_is_published_as_it_is(hub: FakeHub, folder: Path) -> None:
    text = "---\nlicense: mit\n---\nMine.\n"
    (folder / "README.md").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"README\.md is published as it is"):
        push(folder, "me/tiny", facts=CardFacts(license="apache-2.0"))
    push(folder, "me/tiny")
    assert hub.files("me/tiny")["README.md"].decode() == text


def test_an_adapter_names_its_base_model_and_no_path_of_this_machine(hub: FakeHub, adapter: Path) -> None:
    with pytest.raises(ValueError, match=r"is no Hub id.*--base-model"):
        push(adapter, "me/adapter")
    done = push(adapter, "me/adapter", facts=CardFacts(base_model="me/tiny", license="cc-by-4.0"))
    files = hub.files("me/adapter")
    assert done.kind == "adapter" and set(files) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    written = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    assert json.loads(files["adapter_config.json"]) == {**written, "base_model_name_or_path": "me/tiny"}
    assert files["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()
    card = ModelCard(files["README.md"].decode())
    assert (card.data.base_model, card.data.license, card.data.library_name) == ("me/tiny", "cc-by-4.0", "peft")
    assert card.data.base_model_relation == "adapter" and "PeftModel.from_pretrained" in card.text
    assert str(adapter.parent).encode() not in b"".join(files.values())


@pytest.mark.parametrize(
    ("token", "message"), [("hf_nobody", r"hf auth login.*401"), (READER, r"may not write there.*403")]
)
def test_a_token_that_may_not_is_told_so(
    hub: FakeHub, folder: Path, token: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(OSError, match=message):
        push(folder, "other/new")
    hub.create("other/there")
    with pytest.raises(OSError, match=message):
        push(folder, "other/there", token=token)
    assert not hub.files("other/there") and "other/new" not in hub.repos


@pytest.mark.parametrize(
    ("status", "message"), [(500, "the Hub failed: push again"), (409, "somebody else"), (429, "wait"), (413, "large")]
)
def test_a_commit_that_fails_leaves_nothing_and_is_not_repeated(
    hub: FakeHub, folder: Path, status: int, message: str
) -> None:
    hub.commits_fail_with = status
    with pytest.raises(OSError, match=rf"me/tiny: .*{message}.*HTTP {status}"):
        push(folder, "me/tiny")
    assert not hub.files("me/tiny")
    assert len([path for _, path, _ in hub.log if "/commit/" in path]) == 1


def test_a_hub_that_is_not_there_is_said_to_be_so(hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="cannot be reached"):
        push(folder, "me/tiny")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="HF_HUB_OFFLINE"):
        push(folder, "me/tiny")


def test_a_bad_repository_name_is_refused(folder: Path) -> None:
    for repo_id in ("tiny", "a/b/c", "me/", "../tiny", "me/ti ny", ""):
        with pytest.raises(ValueError, match="NAMESPACE/NAME"):
            push(folder, repo_id)


def test_metadata_that_the_hub_refuses_stops_the_upload(hub: FakeHub, folder: Path) -> None:
    (folder / "README.md").write_text("---\n: [\n---\nMine.\n", encoding="utf-8")
    with pytest.raises(ValueError, match="README"):
        push(folder, "me/tiny")
    assert not hub.files("me/tiny")
