"""A stand-in of the Hugging Face hub on this machine: what huggingface_hub 2.4 asks of it.

Repositories are folders, `<root>/OWNER/NAME`, with one branch, main, whose commit is a hash of the
files. Reading: the API's model info and tree, and files under `resolve` with HEAD, ETag and ranges.
Writing: whoami, validate-yaml, create, preupload, the LFS batch with its uploads, and commits.
Facts are those of huggingface_hub's own calls (hf_api.py, _commit_api.py, lfs.py); files do not go
by Xet, whose storage is not imitated: HF_HUB_DISABLE_XET.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml
from web import Handler, Web

TOKEN = "hf_of_ada"
LARGE = (".safetensors", ".bin", ".model")
LICENCES = {"apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "llama2", "other"}
"""those that the stand-in knows; the hub knows more"""


class HubHandler(Handler):
    server: Hub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path in self.server.faults:
            super().do_GET()
        elif path == "/api/whoami-v2":
            self.server.requests.append((path, dict(self.headers)))
            me = self.server.me if self.authorized() else {"error": "Invalid credentials"}
            self.json(200 if self.authorized() else 401, me)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            self.server.requests.append((path, dict(self.headers)))
            self.repository(*found.groups())
        elif (found := re.match(r"/([^/]+/[^/]+)/resolve/", path)) and self.hidden(found[1]):
            self.error(401, "RepoNotFound")
        elif found and self.server.file(path) is None:
            self.server.requests.append((path, dict(self.headers)))
            self.error(404, "EntryNotFound")
        else:
            super().do_GET()

    def repository(self, repo: str, kind: str | None, revision: str | None) -> None:
        if self.hidden(repo):
            self.error(401, "RepoNotFound")
        elif revision not in (None, "main", self.server.commit(repo)):
            self.error(404, "RevisionNotFound")
        else:
            self.json(200, self.server.tree(repo) if kind == "tree" else self.server.info(repo))

    def do_POST(self) -> None:
        path, content = unquote(urlsplit(self.path).path), self.body()
        self.server.requests.append((path, dict(self.headers)))
        if fault := self.fault(path):
            self.answer(fault["status"], b"", fault.get("headers"))
        elif path == "/api/validate-yaml":
            self.json(*self.server.validated(json.loads(content)["content"]))
        elif not self.authorized():
            self.error(401, "Unauthorized")
        elif path == "/api/repos/create":
            self.json(*self.server.create(json.loads(content)))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path):
            act = self.server.preupload if found[2] == "preupload" else self.server.apply
            self.json(200, act(found[1], content))
        elif path.endswith("/info/lfs/objects/batch"):
            self.json(200, self.server.batch(json.loads(content)))
        else:
            self.error(404, "EntryNotFound")

    def do_PUT(self) -> None:
        path, content = unquote(urlsplit(self.path).path), self.body()
        self.server.requests.append((path, dict(self.headers)))
        if fault := self.fault(path):
            self.answer(fault["status"], b"")
            return
        assert hashlib.sha256(content).hexdigest() == path.rpartition("/")[2]
        self.server.stored[path.rpartition("/")[2]] = content
        self.answer(200, b"")

    def fault(self, path: str) -> dict | None:
        faults = next((x for key, x in self.server.faults.items() if path.startswith(key)), [])
        return (faults[0] if faults[0].get("always") else faults.pop(0)) if faults else None

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def authorized(self) -> bool:
        return self.headers.get("authorization") == f"Bearer {TOKEN}"

    def hidden(self, repo: str) -> bool:
        there = (self.server.root / repo).is_dir()
        return not there or (repo in self.server.private and not self.authorized())

    def json(self, status: int, content: object) -> None:
        self.answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def error(self, status: int, code: str) -> None:
        self.answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})


class Hub(Web):
    """Serves the repositories under `root`; see `Web` for faults, requests and what was sent.

    A fault's key is the path a request begins with, for POST and PUT. `private` are the ids that
    only the token sees, `me` what whoami says of its owner. `commits` has (id, summary) of each.
    """

    handler = HubHandler

    def __init__(self, root: Path):
        super().__init__({})
        self.root, self.private = root, set[str]()
        self.me = {
            "type": "user", "name": "ada", "orgs": [{"name": "guild"}],
            "auth": {"accessToken": {"displayName": "test", "role": "write"}},
        }  # fmt: skip
        self.stored: dict[str, bytes] = {}  # what was uploaded as LFS, by its SHA-256
        self.commits: list[tuple[str, str]] = []

    def add(self, repo: str, folder: Path) -> Path:
        """A copy of a folder as a repository."""
        return Path(shutil.copytree(folder, self.root / repo))

    def environment(self, cache: Path) -> dict[str, str]:
        """For a process of its own that takes this for the hub."""
        return os.environ | {
            "HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip

    def use(self, monkeypatch, cache: Path) -> None:
        """Make this process take this for the hub; the client's session is to be closed after."""
        import huggingface_hub

        constants = {
            "ENDPOINT": self.url, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": False,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_TOKEN_PATH": str(cache / "no-token"),
        }  # fmt: skip
        for name, value in constants.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        huggingface_hub.close_session()

    def files(self, repo: str) -> list[str]:
        folder = self.root / repo
        return sorted(x.relative_to(folder).as_posix() for x in folder.rglob("*") if x.is_file())

    def commit(self, repo: str) -> str:
        content = [(name, self.describe(repo, name)["oid"]) for name in self.files(repo)]
        return hashlib.sha1(repr(content).encode()).hexdigest()

    def describe(self, repo: str, name: str) -> dict:
        """A file as the tree has it: its git object, that of the pointer where it is large."""
        content = (self.root / repo / name).read_bytes()
        found = {"type": "file", "path": name, "size": len(content)}
        if not name.endswith(LARGE):
            return found | {"oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}
        sha256 = hashlib.sha256(content).hexdigest()
        lfs = {"oid": sha256, "size": len(content), "pointerSize": 130}
        return found | {"oid": sha256[:40], "lfs": lfs}

    def tree(self, repo: str) -> list[dict]:
        return [self.describe(repo, name) for name in self.files(repo)]

    def info(self, repo: str) -> dict:
        siblings = [
            {"rfilename": x["path"], "size": x["size"], "blobId": x["oid"]}
            | ({"lfs": {"sha256": x["lfs"]["oid"]} | x["lfs"]} if "lfs" in x else {})
            for x in self.tree(repo)
        ]
        private = repo in self.private
        return {"id": repo, "sha": self.commit(repo), "private": private, "siblings": siblings}

    def file(self, path: str) -> Path | None:
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if found is None or found[2] not in ("main", self.commit(found[1])):
            return None
        file = self.root / found[1] / found[3]
        return file if file.is_file() else None

    def headers(self, path: str) -> dict[str, str]:
        _, owner, name, _, _, file = path.split("/", 5)
        found = self.describe(f"{owner}/{name}", file)
        headers = {"X-Repo-Commit": self.commit(f"{owner}/{name}"), "ETag": f'"{found["oid"]}"'}
        if "lfs" in found:
            linked = {"X-Linked-Etag": f'"{found["lfs"]["oid"]}"'}
            headers |= linked | {"X-Linked-Size": str(found["size"])}
        return headers

    def validated(self, card: str) -> tuple[int, dict]:
        front_matter = yaml.safe_load(card.split("---\n")[1]) or {}
        if (licence := front_matter.get("license")) in (None, *LICENCES):
            return 200, {"errors": [], "warnings": []}
        return 400, {"errors": [{"message": f'"license" must be one of …, not {licence}'}]}

    def create(self, asked: dict) -> tuple[int, dict]:
        repo = f"{asked['organization'] or self.me['name']}/{asked['name']}"
        if (self.root / repo).is_dir():
            said = "You already created this model repo"
            return 409, {"error": said, "url": f"{self.url}/{repo}"}
        (self.root / repo).mkdir(parents=True)
        (self.root / repo / ".gitattributes").write_text("*.safetensors filter=lfs\n")
        if asked.get("visibility") == "private":
            self.private.add(repo)
        return 200, {"url": f"{self.url}/{repo}"}

    def preupload(self, repo: str, content: bytes) -> dict:
        there = {x["path"]: x.get("lfs", x)["oid"] for x in self.tree(repo)}
        modes = [
            {"path": x["path"], "shouldIgnore": False, "oid": there.get(x["path"]),
             "uploadMode": "lfs" if x["path"].endswith(LARGE) else "regular"}
            for x in json.loads(content)["files"]
        ]  # fmt: skip
        return {"files": modes}

    def batch(self, asked: dict) -> dict:
        objects = [
            {"oid": x["oid"], "size": x["size"]}
            | ({} if x["oid"] in self.stored else {"actions": self.upload(x["oid"])})
            for x in asked["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    def upload(self, oid: str) -> dict:
        return {"upload": {"href": f"{self.url}/lfs/{oid}", "header": {}}}

    def apply(self, repo: str, lines: bytes) -> dict:
        """A commit: one JSON a line, of the header, of files and of what is deleted."""
        folder = self.root / repo
        for item in map(json.loads, lines.splitlines()):
            value = item["value"]
            if item["key"] == "header":
                self.commits.append((repo, value["summary"]))
                continue
            path = folder / value["path"]
            if item["key"] == "deletedFile":
                path.unlink()
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            large = item["key"] == "lfsFile"
            path.write_bytes(
                self.stored[value["oid"]] if large else base64.b64decode(value["content"])
            )
        commit = self.commit(repo)
        return {"commitUrl": f"{self.url}/{repo}/commit/{commit}", "commitOid": commit}
