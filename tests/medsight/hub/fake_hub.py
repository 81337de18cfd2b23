"""A stand-in for huggingface.co on this machine: repositories, uploads, LFS, commits, downloads, access, failures.

Speaks the Hub's HTTP interface as far as huggingface_hub uses it for publishing and loading a model, and keeps every
file's bytes, so that a test can compare them.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml


LARGE = (".safetensors", ".png", ".bin")
WRITER, READER = "hf_writer", "hf_reader"


@dataclass
class Commit:
    """One commit: its files afterwards, and the paths that it added, replaced or deleted."""

    oid: str
    message: str
    files: dict[str, bytes]
    changes: set[str]


@dataclass
class Repo:
    """A repository's branches, each a list of commits, oldest first."""

    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)


class FakeHub:
    """State of the server, a log of (method, path, status), and the status that every commit fails with, if any."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.log: list[tuple[str, str, int]] = []
        self.commits_fail_with: int | None = None
        self.url = ""

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        """The files of a branch, without the .gitattributes that every repository begins with."""
        files = self.repos[repo_id].branches[branch][-1].files
        return {path: content for path, content in files.items() if path != ".gitattributes"}

    def commits(self, repo_id: str, branch: str = "main") -> list[Commit]:
        """The commits after the first, which makes the repository."""
        return self.repos[repo_id].branches[branch][1:]

    def create(self, repo_id: str, private: bool = False) -> None:
        first = commit([], "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"}, set())
        self.repos[repo_id] = Repo(private, {"main": [first]})


def commit(before: list[Commit], message: str, files: dict[str, bytes], changes: set[str]) -> Commit:
    text = json.dumps([len(before), message, {path: digest(content) for path, content in files.items()}])
    return Commit(hashlib.sha1(text.encode()).hexdigest(), message, files, changes)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serve() -> Iterator[FakeHub]:
    """A running server on a free port of this machine."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (HubHandler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class RefusedError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        self.status, self.message, self.code, self.body = status, message, code, body


class HubHandler(BaseHTTPRequestHandler):
    """One request."""

    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.path_only = unquote(urlsplit(self.path).path)
        self.content = self.read_body()
        try:
            for method, pattern, name in ROUTES:
                match = re.fullmatch(pattern, self.path_only)
                if match and self.command in method:
                    return getattr(self, name)(**match.groupdict())
            raise RefusedError(404, f"no route for {self.command} {self.path_only}")
        except RefusedError as refused:
            headers = {"X-Error-Message": refused.message}
            headers |= {"X-Error-Code": refused.code} if refused.code else {}
            body = {"error": refused.message, **refused.body}
            self.send(refused.status, json.dumps(body).encode(), headers)

    do_HEAD = do_POST = do_PUT = do_GET

    def read_body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.hub.log.append((self.command, self.path_only, status))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def reply(self, content: Any) -> None:
        self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    # Access

    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def require_write(self) -> None:
        if self.token() not in (WRITER, READER):
            raise RefusedError(401, "Invalid credentials in Authorization header")
        if self.token() == READER:
            raise RefusedError(403, "You don't have the rights to write here")

    def repo(self, repo_id: str) -> Repo:
        found = self.hub.repos.get(repo_id)
        if found is None or (found.private and self.token() is None):
            raise RefusedError(401 if self.token() is None else 404, "Repository not found", "RepoNotFound")
        return found

    def head(self, repo_id: str, revision: str) -> Commit:
        branches = self.repo(repo_id).branches
        by_oid = {commit.oid: commit for commits in branches.values() for commit in commits}
        found = branches[revision][-1] if revision in branches else by_oid.get(revision)
        if found is None:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    # Repositories

    def create(self) -> None:
        self.require_write()
        asked = json.loads(self.content)
        repo_id = f"{asked.get('organization') or 'me'}/{asked['name']}"
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.repos:
            raise RefusedError(409, "You already created this model repo", url=url)
        self.hub.create(repo_id, asked.get("visibility") == "private" or bool(asked.get("private")))
        self.reply({"url": url})

    def info(self, repo_id: str, revision: str | None = None) -> None:
        head = self.head(repo_id, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(head.files)]
        private = self.repo(repo_id).private
        self.reply({"id": repo_id, "modelId": repo_id, "sha": head.oid, "private": private, "siblings": siblings})

    def tree(self, repo_id: str, revision: str, path: str | None = None) -> None:
        files = self.head(repo_id, revision).files
        found = {name: content for name, content in files.items() if not path or name.startswith(f"{path}/")}
        if path and not found:
            raise RefusedError(404, f"{path} does not exist", "EntryNotFound")
        self.reply(
            [
                {"type": "file", "path": name, "size": len(content), "oid": git_oid(content)}
                for name, content in sorted(found.items())
            ]
        )

    def branch(self, repo_id: str, name: str) -> None:
        self.require_write()
        branches = self.repo(repo_id).branches
        if name in branches:
            raise RefusedError(409, "Reference already exists")
        branches[name] = list(branches["main"])
        self.reply({})

    def validate_yaml(self) -> None:
        front = re.match(r"---\n(.*?)\n---\n", json.loads(self.content)["content"], re.DOTALL)
        try:
            yaml.safe_load(front[1] if front else "[")
        except yaml.YAMLError:
            errors = [{"message": "no valid YAML header"}]
            raise RefusedError(400, "bad metadata", errors=errors, warnings=[]) from None
        self.reply({"errors": [], "warnings": []})

    # Upload

    def preupload(self, repo_id: str, revision: str) -> None:
        self.require_write()
        files = self.head(repo_id, revision).files
        answers = []
        for asked in json.loads(self.content)["files"]:
            large, there = asked["path"].endswith(LARGE), files.get(asked["path"])
            oid = None if there is None else digest(there) if large else git_oid(there)
            mode = "lfs" if large else "regular"
            answers.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.reply({"files": answers})

    def lfs_batch(self, repo_id: str) -> None:
        self.require_write()
        objects = json.loads(self.content)["objects"]
        for asked in objects:
            asked["actions"] = {"upload": {"href": f"{self.hub.url}/storage/{asked['oid']}", "header": {}}}
        self.reply({"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        if digest(self.content) != oid:
            raise RefusedError(400, "the content has another sha256")
        self.hub.large[oid] = self.content
        self.send(200)

    def commit(self, repo_id: str, revision: str) -> None:
        self.require_write()
        if self.hub.commits_fail_with is not None:
            raise RefusedError(self.hub.commits_fail_with, "told to fail")
        branch = self.repo(repo_id).branches.get(revision)
        if branch is None:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        header, *operations = (json.loads(line) for line in self.content.splitlines())
        files = dict(branch[-1].files)
        for operation in operations:
            key, value = operation["key"], operation["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif files.pop(value["path"], None) is None:
                raise RefusedError(404, f"{key}: a file with this name doesn't exist", "EntryNotFound")
        changes = {operation["value"]["path"] for operation in operations}
        branch.append(commit(branch, header["value"]["summary"], files, changes))
        url = f"{self.hub.url}/{repo_id}/commit/{branch[-1].oid}"
        self.reply({"success": True, "commitOid": branch[-1].oid, "commitUrl": url})

    # Download

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        head = self.head(repo_id, revision)
        if path not in head.files:
            raise RefusedError(404, "Entry not found", "EntryNotFound")
        content = head.files[path]
        self.send(200, content, {"X-Repo-Commit": head.oid, "ETag": f'"{digest(content)}"'})


REPO = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
ROUTES = (
    (("POST",), "/api/repos/create", "create"),
    (("POST",), "/api/validate-yaml", "validate_yaml"),
    (("POST",), f"/api/models/{REPO}/preupload/(?P<revision>.+)", "preupload"),
    (("POST",), f"/api/models/{REPO}/commit/(?P<revision>.+)", "commit"),
    (("POST",), f"/api/models/{REPO}/branch/(?P<name>.+)", "branch"),
    (("GET",), rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "tree"),
    (("GET",), rf"/api/models/{REPO}(?:/revision/(?P<revision>.+))?", "info"),
    (("POST",), rf"/{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    (("PUT",), r"/storage/(?P<oid>\w+)", "store"),
    (("GET", "HEAD"), f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
)
