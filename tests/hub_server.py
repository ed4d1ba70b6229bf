"""A small Hub on this machine: repositories with commits, branches, tags, pull requests, LFS and tokens; no git inside.

It answers the routes that huggingface_hub's client asks, with the status codes and headers of the real one, and can be
told to fail or to do something else before it answers a certain request. Knows nothing of adapters, nor of torch.

The client reads its settings as it is imported, so what is to be seen of it happens in a process of its own: a test
file lists the functions that act (`main`), runs itself (`observe`), and tests what they report.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

ATTRIBUTES = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
LFS_NAMES = (".safetensors", ".bin", ".pt")
READ, WRITE = "read", "write"
OK, NO_ANSWER, LOST = 200, "no answer", "lost"


class Refusal(Exception):
    """An answer that is an error: status, and what the real Hub says in its headers."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


@dataclass
class Commit:
    parent: str | None
    message: str
    files: dict[str, bytes]

    @property
    def id(self) -> str:
        listing = [[path, hashlib.sha256(content).hexdigest()] for path, content in sorted(self.files.items())]
        return hashlib.sha1(json.dumps([self.parent, self.message, listing]).encode()).hexdigest()


@dataclass
class Repo:
    private: bool = False
    readers: set[str] | None = None  # of a gated repository: who was let in
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, message: str, changes: dict[str, bytes | None], base: str | None = None) -> str:
        parent = self.refs.get(base or ref)
        files = dict(self.commits[parent].files) if parent else {}
        for path, content in changes.items():
            if content is not None:
                files[path] = content
            elif files.pop(path, None) is None:
                raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
        new = Commit(parent, message, files)
        self.commits[new.id] = new
        self.refs[ref] = new.id
        return new.id

    def resolve(self, revision: str) -> str:
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in self.refs:
                return self.refs[ref]
        if revision in self.commits:
            return revision
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")


@dataclass
class Rule:
    """Something to do before the `nth` request from now on that is of this kind."""

    method: str
    pattern: str
    action: Any
    left: int


class Files(MutableMapping[str, bytes]):
    """The files on the main branch of one repository, as if nobody minded commits."""

    def __init__(self, hub: Hub, name: str) -> None:
        self.hub, self.name = hub, name

    def _now(self) -> dict[str, bytes]:
        repo = self.hub.repos.get(self.name)
        files = repo.commits[repo.resolve("main")].files if repo else {}
        return {path: content for path, content in files.items() if path not in ATTRIBUTES}

    def __getitem__(self, path: str) -> bytes:
        return self._now()[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._now())

    def __len__(self) -> int:
        return len(self._now())

    def __setitem__(self, path: str, content: bytes) -> None:
        self.hub.push(self.name, {path: content})

    def __delitem__(self, path: str) -> None:
        self.hub.push(self.name, {path: None})


class Hub:
    """
    The state of a Hub, and the server in front of it; `with Hub() as hub:` serves at `hub.address`.

    `me` owns `me/...` and writes in the organisation `org`; `you` reads what is public. Every request is in `asked`, as
    (method, path with its query, account).
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens = {"hf_write": ("me", WRITE), "hf_read": ("me", READ), "hf_other": ("you", WRITE)}
        self.organisations = {"org": {"me"}}
        self.large: dict[str, bytes] = {}
        self.asked: list[tuple[str, str, str | None]] = []
        self.rules: list[Rule] = []
        self.sizes_are_listed = True
        self.lock = threading.RLock()
        self.files = Files(self, "me/heads")

    def __enter__(self) -> Hub:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.server.hub = self  # type: ignore[attr-defined]
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        # Another host to the client, which has to keep its token from it, as from the real one's CDN.
        self.storage = f"http://localhost:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def create(self, name: str, private: bool = False, readers: set[str] | None = None) -> Repo:
        repo = self.repos[name] = Repo(private, readers)
        repo.commit("refs/heads/main", "initial commit", dict(ATTRIBUTES))
        return repo

    def push(self, name: str, files: dict[str, bytes | None], branch: str = "main", message: str = "push") -> str:
        """A commit by somebody at the server; makes repository and branch where they are not there."""
        repo = self.repos.get(name) or self.create(name)
        return repo.commit(f"refs/heads/{branch}", message, files, f"refs/heads/{branch}")

    def read(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[name]
        return dict(repo.commits[repo.resolve(revision)].files)

    def before(self, method: str, pattern: str, action: Any, nth: int = 1) -> None:
        """
        Before the `nth` request from now whose method and path match, calls `action`, or does as it says.

        A number is the status to answer with; `NO_ANSWER` closes the connection at once, and `LOST` after the request
        was carried out. An action may return one of these too.
        """
        self.rules.append(Rule(method, pattern, action, nth))

    def intercept(self, method: str, path: str) -> Any:
        for rule in list(self.rules):
            if method in rule.method.split("|") and re.search(rule.pattern, path):
                rule.left -= 1
                if rule.left == 0:
                    self.rules.remove(rule)
                    return rule.action() if callable(rule.action) else rule.action
        return None

    def may_read(self, name: str, account: str | None) -> bool:
        owner = name.split("/")[0]
        return not self.repos[name].private or account in {owner, *self.organisations.get(owner, ())}

    def find(self, name: str, account: str | None) -> Repo:
        if name not in self.repos or not self.may_read(name, account):
            if account is None:
                raise Refusal(401, "Invalid username or password.", "RepoNotFound")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return self.repos[name]

    def check_write(self, owner: str, account: str | None, role: str | None) -> None:
        if account is None:
            raise Refusal(401, "Invalid username or password.")
        if account != owner and account not in self.organisations.get(owner, ()):
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        if role != WRITE:
            raise Refusal(403, "Forbidden: you must use a write token to upload to a repository")


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(path: str) -> bool:
    return path.endswith(LFS_NAMES)


class Answer(BaseHTTPRequestHandler):
    """One request; `_ROUTES` at the end says which method answers which."""

    def log_message(self, *_: object) -> None:
        pass

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined]

    def do_GET(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.hub.lock:
            done = self.carry_out()
        if done is None or self.lost:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        status, content, headers = done
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def carry_out(self) -> tuple[int, Any, dict[str, str]] | None:
        """Status, content and headers; `None` for no answer."""
        self.lost = False
        token = (self.headers.get("authorization") or "").removeprefix("Bearer ")
        self.account, self.role = self.hub.tokens.get(token, (None, None))
        self.hub.asked.append((self.command, unquote(self.path), self.account))
        told = self.hub.intercept(self.command, unquote(self.path))
        if told == NO_ANSWER:
            return None
        self.lost = told == LOST
        try:
            if isinstance(told, Refusal):
                raise told
            if isinstance(told, int):
                raise Refusal(told, "told to fail")
            if token and self.account is None:
                raise Refusal(401, "Invalid credentials in Authorization header")
            parts = urlsplit(self.path)
            self.query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            for methods, pattern, answer in _ROUTES:
                found = re.fullmatch(pattern, parts.path)
                if found and self.command in methods.split("|"):
                    return answer(self, *(unquote(part or "") for part in found.groups()))
            raise Refusal(404, f"no such route: {self.command} {self.path}")
        except Refusal as refusal:
            return refusal.status, {"error": str(refusal)}, refusal.headers

    # --- reading ------------------------------------------------------------------------------------------------------

    def whoami(self) -> Any:
        if self.account is None:
            raise Refusal(401, "Invalid username or password.")
        return OK, {"type": "user", "name": self.account, "auth": {"accessToken": {"role": self.role}}}, {}

    def info(self, name: str, revision: str) -> Any:
        repo = self.hub.find(name, self.account)
        commit = repo.resolve(revision or "main")
        blobs = "blobs" in self.query and self.hub.sizes_are_listed
        siblings = [
            {"rfilename": path, **(self.metadata(path, content, "blobId", "sha256") if blobs else {})}
            for path, content in repo.commits[commit].files.items()
        ]
        gated = "manual" if repo.readers is not None else False
        facts = {"id": name, "modelId": name, "sha": commit, "private": repo.private, "gated": gated, "tags": []}
        return OK, {**facts, "siblings": siblings}, {}

    def tree(self, name: str, revision: str, folder: str) -> Any:
        repo = self.hub.find(name, self.account)
        commit = repo.resolve(revision)
        files = {path: content for path, content in repo.commits[commit].files.items() if path.startswith(folder)}
        if folder and not files:
            raise Refusal(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit})
        rows = [
            {"type": "file", "path": path, **self.metadata(path, content, "oid", "oid")}
            for path, content in files.items()
        ]
        return OK, rows, {}

    @staticmethod
    def metadata(path: str, content: bytes, blob: str, digest: str) -> dict[str, Any]:
        facts: dict[str, Any] = {"size": len(content), blob: git_id(content)}
        if is_large(path):
            sha = hashlib.sha256(content).hexdigest()
            facts["lfs"] = {digest: sha, "size": len(content), "pointerSize": 134}
        return facts

    def refs(self, name: str) -> Any:
        repo = self.hub.find(name, self.account)

        def listed(start: str) -> list[dict[str, str]]:
            own = {ref: commit for ref, commit in repo.refs.items() if ref.startswith(start)}
            return [{"name": ref.removeprefix(start), "ref": ref, "targetCommit": to} for ref, to in own.items()]

        heads, tags, requests = (listed(f"refs/{kind}/") for kind in ("heads", "tags", "pr"))
        return OK, {"branches": heads, "converts": [], "tags": tags, "pullRequests": requests}, {}

    def resolve(self, name: str, revision: str, path: str) -> Any:
        repo = self.hub.find(name, self.account)
        commit = repo.resolve(revision)
        headers = {"X-Repo-Commit": commit}
        if repo.readers is not None and self.account not in repo.readers:
            message = f"Access to model {name} is restricted. You must be authenticated and in the authorized list."
            raise Refusal(401 if self.account is None else 403, message, "GatedRepo")
        if path not in repo.commits[commit].files:
            raise Refusal(404, "Entry not found", "EntryNotFound", **headers)
        content = repo.commits[commit].files[path]
        if not is_large(path):
            return OK, content, {**headers, "ETag": f'"{git_id(content)}"'}
        sha = hashlib.sha256(content).hexdigest()
        self.hub.large[sha] = content
        headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{sha}"'}
        return 302, b"", {**headers, "Location": f"{self.hub.storage}/storage/{sha}"}

    def stored(self, sha: str) -> Any:
        if self.headers.get("authorization"):
            raise Refusal(400, "the token was sent to the storage")
        return OK, self.hub.large[sha], {"ETag": f'"{sha}"'}

    # --- writing ------------------------------------------------------------------------------------------------------

    def create(self) -> Any:
        asked = json.loads(self.body)
        if self.account is None:
            raise Refusal(401, "Invalid username or password.")
        name = f"{asked.get('organization') or self.account}/{asked['name']}"
        url = {"url": f"{self.hub.address}/{name}", "name": name, "id": name}
        self.hub.check_write(name.split("/")[0], self.account, self.role)
        if name in self.hub.repos:
            return 409, {"error": "You already created this model repo", **url}, {}
        self.hub.create(name, asked.get("visibility") == "private" or asked.get("private") is True)
        return OK, url, {}

    def validate(self) -> Any:
        return OK, {"errors": [], "warnings": []}, {}

    def writable(self, name: str, is_request: bool = False) -> Repo:
        repo = self.hub.find(name, self.account)
        self.hub.check_write(str(self.account) if is_request else name.split("/")[0], self.account, self.role)
        return repo

    def preupload(self, name: str, revision: str) -> Any:
        repo = self.writable(name, "create_pr" in self.query)
        there = repo.commits[repo.resolve(revision)].files
        files = []
        for file in json.loads(self.body)["files"]:
            large, content = is_large(file["path"]), there.get(file["path"])
            oid = None
            if content is not None:
                oid = hashlib.sha256(content).hexdigest() if large else git_id(content)
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return OK, {"files": files}, {}

    def batch(self, name: str) -> Any:
        self.hub.find(name, self.account)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.hub.storage}/storage/{wanted['oid']}"}
            verify = {"href": f"{self.hub.address}/verify/{wanted['oid']}"}
            actions = {} if wanted["oid"] in self.hub.large else {"actions": {"upload": upload, "verify": verify}}
            objects.append({**wanted, "authenticated": True, **actions})
        return OK, {"transfer": "basic", "objects": objects}, {}

    def store(self, sha: str) -> Any:
        if hashlib.sha256(self.body).hexdigest() != sha:
            raise Refusal(400, "the content is not what was announced")
        self.hub.large[sha] = self.body
        return OK, b"", {}

    def verify(self, sha: str) -> Any:
        if sha not in self.hub.large:
            raise Refusal(404, "no such object")
        return OK, {}, {}

    def commit(self, name: str, revision: str) -> Any:
        is_request = "create_pr" in self.query
        repo = self.writable(name, is_request)
        repo.resolve(revision)
        lines = [json.loads(line) for line in self.body.splitlines()]
        changes: dict[str, bytes | None] = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changes[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                changes[value["path"]] = None
            else:
                raise Refusal(400, f"{line['key']} is not known here")
        ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
        extra = {}
        if is_request:
            number = 1 + sum(known.startswith("refs/pr/") for known in repo.refs)
            extra = {"pullRequestUrl": f"{self.hub.address}/{name}/discussions/{number}"}
            new = repo.commit(f"refs/pr/{number}", lines[0]["value"]["summary"], changes, ref)
        else:
            new = repo.commit(ref, lines[0]["value"]["summary"], changes)
        url = f"{self.hub.address}/{name}/commit/{new}"
        return OK, {"success": True, "commitUrl": url, "commitOid": new, **extra}, {}

    def branch(self, name: str, branch: str) -> Any:
        repo = self.writable(name)
        if f"refs/heads/{branch}" in repo.refs:
            raise Refusal(409, "Reference already exists")
        start = (json.loads(self.body or b"{}") or {}).get("startingPoint", "main")
        repo.refs[f"refs/heads/{branch}"] = repo.resolve(start)
        return OK, {}, {}

    def tag(self, name: str, revision: str) -> Any:
        repo = self.writable(name)
        repo.refs[f"refs/tags/{json.loads(self.body)['tag']}"] = repo.resolve(revision)
        return OK, {}, {}


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("GET", "/api/whoami-v2", Answer.whoami),
    ("POST", "/api/repos/create", Answer.create),
    ("POST", "/api/validate-yaml", Answer.validate),
    ("GET", rf"/api/models/{_NAME}(?:/revision/([^/]+))?", Answer.info),
    ("GET", rf"/api/models/{_NAME}/tree/([^/]+)(?:/(.+))?", Answer.tree),
    ("GET", rf"/api/models/{_NAME}/refs", Answer.refs),
    ("POST", rf"/api/models/{_NAME}/preupload/([^/]+)", Answer.preupload),
    ("POST", rf"/api/models/{_NAME}/commit/([^/]+)", Answer.commit),
    ("POST", rf"/api/models/{_NAME}/branch/([^/]+)", Answer.branch),
    ("POST", rf"/api/models/{_NAME}/tag/([^/]+)", Answer.tag),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", Answer.batch),
    ("PUT", r"/storage/([0-9a-f]{64})", Answer.store),
    ("GET", r"/storage/([0-9a-f]{64})", Answer.stored),
    ("POST", r"/verify/([0-9a-f]{64})", Answer.verify),
    ("GET|HEAD", rf"/{_NAME}/resolve/([^/]+)/(.+)", Answer.resolve),
)


def environment(folder: Path, **settings: str) -> dict[str, str]:
    """For a process whose client keeps everything in `folder` and has no token."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    mine |= {"HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    mine |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    return mine | settings


def observe(script: str, folder: Path, *acts: str, **settings: str) -> dict[str, Any]:
    """Runs acts of a script one after the other in one process; what each reports, by name."""
    done = subprocess.run(
        [sys.executable, script, str(folder), *acts],
        env=environment(folder, **settings),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def main(acts: dict[str, Callable[[Hub, Path], dict[str, Any]]]) -> None:
    """The other side of `observe`: acts with a Hub of this process, each in spite of the failure of another."""
    seen = {}
    with Hub() as hub:
        os.environ["HF_ENDPOINT"] = hub.address
        for name in sys.argv[2:]:
            try:
                seen[name] = acts[name](hub, Path(sys.argv[1]))
            except Exception:
                seen[name] = {"failure": traceback.format_exc()}
    print(json.dumps(seen))


def said(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The type and message of the error that a call raises, or `nothing`."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
