"""A Hugging Face hub on this machine, as far as models are looked up, fetched and uploaded: names, files, commits and
large files (Git LFS), kept in memory. What was asked of it can be looked at, and it can be told to refuse."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

LARGE = (".safetensors", ".png", ".bin")
"""Endings of files that go to the large files' store."""


@dataclass
class Repository:
    """A model: its files at every commit, the last one main's."""

    private: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        """One more commit, with more files or other ones; its hash."""
        now = (self.commits[-1][1] if self.commits else {}) | files
        told = str(len(self.commits)) + "".join(
            f"{name}{hashlib.sha256(now[name]).hexdigest()}" for name in sorted(now)
        )
        self.commits.append((hashlib.sha1(told.encode()).hexdigest(), now))
        return self.commits[-1][0]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Hash and files of a branch, tag or commit."""
        if revision == "main":
            return self.commits[-1]
        wanted = self.tags.get(revision, revision)
        return next((each for each in self.commits if each[0] == wanted), None)


@dataclass
class Hub:
    """The hub's state."""

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    """Method and path of every request."""
    tokens: set[str] = field(default_factory=set)
    """What came in Authorization headers."""
    refuse: dict[str, int] = field(default_factory=dict)
    """Part of a path → status that requests for it get."""

    def put(self, name: str, folder: Path) -> str:
        """A public model with a folder's files; the commit's hash."""
        files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        return self.repositories.setdefault(name, Repository()).commit(files)

    def files(self, name: str) -> dict[str, bytes]:
        """A model's files now."""
        return self.repositories[name].commits[-1][1]

    def asked_for(self, part: str) -> list[str]:
        """Requests whose path has a part."""
        return [each for each in self.asked if part in each]


def oid(content: bytes) -> str:
    """Git's hash of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """The hub's interface."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *given: Any) -> None:
        """Says nothing."""

    def answer(self, status: int, body: Any = b"", **headers: str) -> None:
        """Send a reply; what is no bytes is sent as JSON."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        if not isinstance(body, bytes):
            self.send_header("Content-Type", "application/json")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self) -> None:
        """Any request."""
        path, body = unquote(urlsplit(self.path).path), self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.asked.append(f"{self.command} {path}")
        self.hub.tokens.add(self.headers.get("Authorization", ""))
        for part, status in self.hub.refuse.items():
            if part in path:
                said = f"refused; you sent {self.headers.get('Authorization')}"  # a proxy that repeats what it was sent
                return self.answer(status, {"error": said}, X_Error_Message=said)
        for pattern, method in ROUTES:
            if found := re.fullmatch(pattern, path):
                return method(self, body, **found.groupdict())
        return self.answer(404, {"error": "not found"}, X_Error_Code="RepoNotFound")

    do_HEAD = do_POST = do_PUT = do_GET

    def found(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """A model's commit; answers itself if there is none."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self.headers.get("Authorization")):
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        if (commit := repository.at(revision)) is None:
            self.answer(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
        return commit

    def info(self, body: bytes, name: str, revision: str | None = None) -> None:
        """What a model has."""
        if commit := self.found(name, revision or "main"):
            files = [{"rfilename": file, "size": len(content)} for file, content in commit[1].items()]
            self.answer(200, {"id": name, "sha": commit[0], "siblings": files, "private": False, "tags": []})

    def tree(self, body: bytes, name: str, revision: str, below: str | None) -> None:
        """All files of a commit; none of these models has a folder."""
        if below is not None:
            self.answer(404, {"error": "no such folder"}, X_Error_Code="EntryNotFound")
        elif commit := self.found(name, revision):
            self.answer(200, [entry(file, content) for file, content in commit[1].items()])

    def resolve(self, body: bytes, name: str, revision: str, file: str) -> None:
        """A file."""
        if commit := self.found(name, revision):
            if file not in commit[1]:
                return self.answer(404, {"error": "no such file"}, X_Error_Code="EntryNotFound")
            content = commit[1][file]
            etag = hashlib.sha256(content).hexdigest() if file.endswith(LARGE) else oid(content)
            self.answer(200, content, ETag=f'"{etag}"', X_Repo_Commit=commit[0], Accept_Ranges="bytes")
        return None

    def create(self, body: bytes) -> None:
        """A new model."""
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in self.hub.repositories:
            return self.answer(
                409, {"error": "You already created this model repo", "url": f"{self.hub.endpoint}/{name}"}
            )
        private = asked.get("private", asked.get("visibility") == "private")
        self.hub.repositories[name] = Repository(private=bool(private))
        self.hub.repositories[name].commit({".gitattributes": b""})
        return self.answer(200, {"url": f"{self.hub.endpoint}/{name}", "name": name, "id": "1"})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        """How each file wants to come."""
        if commit := self.found(name, revision):
            self.answer(200, {"files": [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                 "shouldIgnore": False, **remote(commit[1], file["path"])}
                for file in json.loads(body)["files"]
            ]})  # fmt: skip

    def batch(self, body: bytes, name: str) -> None:
        """Where large files go that are not here."""
        self.answer(200, {"transfer": "basic", "objects": [
            {"oid": each["oid"], "size": each["size"],
             **({} if each["oid"] in self.hub.large else
                {"actions": {"upload": {"href": f"{self.hub.endpoint}/large/{each['oid']}"}}})}
            for each in json.loads(body)["objects"]
        ]})  # fmt: skip

    def store(self, body: bytes, key: str) -> None:
        """A large file."""
        assert hashlib.sha256(body).hexdigest() == key
        self.hub.large[key] = body
        self.answer(200)

    def commit(self, body: bytes, name: str, revision: str) -> None:
        """The files of one commit."""
        files: dict[str, bytes] = {}
        for line in filter(None, body.split(b"\n")):
            told = json.loads(line)
            if told["key"] == "file":
                files[told["value"]["path"]] = base64.b64decode(told["value"]["content"])
            elif told["key"] == "lfsFile":
                files[told["value"]["path"]] = self.hub.large[told["value"]["oid"]]
        new = self.hub.repositories[name].commit(files)
        self.answer(200, {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{new}", "commitOid": new, "success": True})

    def valid(self, body: bytes) -> None:
        """A model card's front matter."""
        self.answer(200, {"errors": [], "warnings": []})

    def who(self, body: bytes) -> None:
        """Whose token it is."""
        self.answer(200, {"name": "me", "orgs": []})


def remote(files: dict[str, bytes], path: str) -> dict[str, str]:
    """The hash of a file that is there."""
    if path not in files:
        return {}
    return {"oid": hashlib.sha256(files[path]).hexdigest() if path.endswith(LARGE) else oid(files[path])}


def entry(file: str, content: bytes) -> dict[str, Any]:
    """A file in a listing."""
    large = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return {"type": "file", "path": file, "size": len(content), "oid": oid(content)} | (
        {"lfs": large} if file.endswith(LARGE) else {})  # fmt: skip


NAME = r"(?P<name>[^/]+/[^/]+)"
ROUTES = [
    (r"/api/whoami-v2", Handler.who),
    (r"/api/validate-yaml", Handler.valid),
    (r"/api/repos/create", Handler.create),
    (rf"/api/models/{NAME}", Handler.info),
    (rf"/api/models/{NAME}/revision/(?P<revision>.+)", Handler.info),
    (rf"/api/models/{NAME}/tree/(?P<revision>[^/]+)(?P<below>/.+)?", Handler.tree),
    (rf"/api/models/{NAME}/preupload/(?P<revision>.+)", Handler.preupload),
    (rf"/api/models/{NAME}/commit/(?P<revision>.+)", Handler.commit),
    (rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (r"/large/(?P<key>[0-9a-f]{64})", Handler.store),
    (rf"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", Handler.resolve),
]


@contextlib.contextmanager
def hub_here(cache: Path, patch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that huggingface_hub talks to in this process, with an empty cache."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    from btx.model_files import hub as asked_before

    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfThisHub", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    disable_progress_bars()
    for name, value in {
        "ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(cache),
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    }.items():  # fmt: skip
        patch.setattr(constants, name, value)
    patch.setenv("HF_HUB_OFFLINE", "0")
    asked_before._why_not.cache_clear()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        asked_before._why_not.cache_clear()
