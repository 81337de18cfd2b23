"""The upload of a checkpoint folder: one commit with all of it, or none."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import filter_repo_objects

from medsight import __version__
from medsight.checkpoint import CODES_FILE, INDEX_FILE, OPTIONAL, read_json

from .card import CardFacts, base_model_of_adapter, render_card
from .files import ADAPTER_CONFIG, CARD, CODE, Upload, check_repo_id, files_to_push


# What an earlier push may have left in the repository and would be loaded in place of, or beside, the new files.
STALE = [
    *("model*.safetensors", INDEX_FILE, CODE, ADAPTER_CONFIG, "adapter_model*", CODES_FILE),
    *("chat_template.*", "additional_chat_templates/*", *OPTIONAL),
]
MESSAGES = {
    401: "not logged in, or the token is not valid: run `hf auth login`, or set HF_TOKEN",
    403: "the token may not write there: it needs write access to the namespace",
    404: "not found: the repository, the branch, or the namespace does not exist, or the token may not see it",
    409: "it was changed by somebody else at the same time: push again",
    413: "the Hub found the upload too large",
    429: "too many requests: wait a few minutes",
}


@dataclass(frozen=True)
class Push:
    """What was uploaded, or would be.

    Example:
        >>> from medsight.hub import push
        >>> push("medsight/medsight-nano", "my-name/my-model", dry_run=True).kind
        'model'

    Attributes:
        repo_id, revision: where.
        kind: "model" or "adapter".
        files: path -> bytes.
        left_out: name in the folder -> why it stays.
        deleted: files of earlier pushes that went with the same commit.
        url, commit: of the commit; None for a dry run.
    """

    repo_id: str
    revision: str
    kind: str
    files: dict[str, int]
    left_out: dict[str, str]
    deleted: list[str]
    url: str | None = None
    commit: str | None = None


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
    facts: CardFacts | None = None,
    contact_sheets: str | Path | None = None,
) -> Push:
    """Publish a checkpoint folder, or an adapter, with its card, in one commit.

    A README.md in the folder is published as it is; otherwise the card is rendered.

    Args:
        repo_id: `namespace/name`; the repository is made where it is missing.
        private: make it private; refused where it exists and is public.
        revision: branch, made where it is missing; main by default.
        message: of the commit.
        token: by default the one of HF_TOKEN or `hf auth login`.
        dry_run: say what would be uploaded, without the network.
        facts: for the card.
        contact_sheets: see `files_to_push`.

    Raises:
        OSError: a file is missing, or the Hub refuses or cannot be reached; the message says what to do.
        ValueError: the folder is no finished checkpoint, the repository is public but `private` is asked, or the facts
            are not about this checkpoint.
    """
    folder, branch = Path(folder), revision or "main"
    check_repo_id(repo_id)
    upload = files_to_push(folder, None if contact_sheets is None else Path(contact_sheets))
    upload = replace(upload, files={**upload.files, **_rendered(folder, repo_id, upload, facts or CardFacts())})
    planned = Push(repo_id, branch, upload.kind, upload.sizes, upload.left_out, deleted=[])
    if dry_run:
        return planned
    try:
        commit, deleted = _commit(upload, repo_id, private, branch, message or f"Upload {upload.kind}", token)
    except (OfflineModeIsEnabled, HTTPError) as error:
        raise OSError(f"{repo_id}: {_plainly(error)}") from error
    return replace(planned, deleted=deleted, url=commit.commit_url, commit=commit.oid)


def _rendered(folder: Path, repo_id: str, upload: Upload, facts: CardFacts) -> dict[str, Path | bytes]:
    """The files that are made for an upload: its card, and an adapter's configuration with its base model's Hub id.

    Raises:
        ValueError: facts are given for a card that the folder has already.
    """
    files: dict[str, Path | bytes] = {}
    if upload.kind == "adapter":
        base_model = base_model_of_adapter(folder, facts.base_model)
        config = read_json(folder / ADAPTER_CONFIG) | {"base_model_name_or_path": base_model}
        files[ADAPTER_CONFIG] = json.dumps(config, indent=2, sort_keys=True).encode()
    if CARD not in upload.files:
        files[CARD] = render_card(folder, repo_id, facts).encode()
    elif facts != CardFacts(base_model=facts.base_model if upload.kind == "adapter" else None):
        raise ValueError(f"{folder / CARD} is published as it is: to add to it, remove it and have a card rendered")
    return files


def _commit(
    upload: Upload, repo_id: str, private: bool, branch: str, message: str, token: str | None
) -> tuple[Any, list[str]]:
    """One commit with all of it: `HfApi.upload_folder` may cut a large upload into several."""
    api = HfApi(token=token, library_name="medsight", library_version=__version__)
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    if private and not api.model_info(repo_id).private:
        raise ValueError(f"{repo_id} exists and is public: make it private on the Hub first, or push without private")
    if branch != "main":
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    there = api.list_repo_files(repo_id, revision=branch)
    stale = [path for path in filter_repo_objects(there, allow_patterns=STALE) if path not in upload.files]
    operations: list[Any] = [CommitOperationAdd(path, file) for path, file in sorted(upload.files.items())]
    operations += map(CommitOperationDelete, stale)
    return api.create_commit(repo_id, operations, commit_message=message, revision=branch), stale


def _plainly(error: Exception) -> str:
    """What an answer of the Hub means, in one line."""
    if isinstance(error, OfflineModeIsEnabled):
        return "offline mode is on: unset HF_HUB_OFFLINE to push"
    if not isinstance(error, HfHubHTTPError):
        return f"the Hub cannot be reached ({error}): push again"
    status = error.response.status_code
    meaning = MESSAGES.get(status) or ("the Hub failed: push again" if status >= 500 else "the Hub refused it")
    said = "".join(f", {line}" for line in (error.server_message or "").splitlines())
    return f"{meaning} (HTTP {status}{said})"
