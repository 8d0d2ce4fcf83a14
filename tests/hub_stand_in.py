"""A stand-in for the Hub: the endpoints that huggingface_hub uses for creating, pushing, reading and loading models, with files
in memory. Clients find it by `HF_ENDPOINT`, and take the plain LFS way with `HF_HUB_DISABLE_XET=1`."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WRITE, READ = "write", "read"
TOKENS = {"hf_mine": ("me", WRITE), "hf_reader": ("me", READ)}


@dataclass
class Repository:
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=lambda: ["0" * 40])


@dataclass
class Hub:
    """What is on it, and what goes wrong: `drop` is a pattern of `METHOD path` whose next requests get no answer, `count` how
    many; `hold` is one whose request never gets one, and `held` says that it has come."""

    repositories: dict[str, Repository] = field(default_factory=lambda: {"you/taken": Repository()})
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    drop: str | None = None
    count: int = 0
    hold: str | None = None
    held: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    url: str = ""


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **more: str):
        self.status, self.message, self.code, self.more = status, message, code, more


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def handle_any(self):
        hub, line = self.hub, f"{self.command} {self.path.split('?')[0]}"
        hub.requests.append(line)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if hub.hold and re.search(hub.hold, line):
            hub.held.set()
            hub.released.wait(60)
        if hub.drop and hub.count and re.search(hub.drop, line):
            hub.count -= 1
            self.close_connection = True
            self.connection.close()
            return
        try:
            for pattern, answer in ROUTES.items():
                if match := re.fullmatch(pattern, line):
                    return self.reply(*answer(self, body, **match.groupdict()))
            raise Refused(404, f"no such endpoint: {line}", "RepoNotFound")
        except Refused as error:
            headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
            self.reply(error.status, {"error": error.message, **error.more}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def reply(self, status: int, content: Any, headers: dict[str, str] | None = None):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # --- who may what ---

    @property
    def user(self) -> tuple[str, str]:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in TOKENS:
            raise Refused(401, "Invalid username or password.")
        return TOKENS[token]

    def check_writer(self, owner: str):
        name, role = self.user
        if role != WRITE or name != owner:
            raise Refused(403, f"Forbidden: you don't have write access to the namespace {owner}.")

    def repository(self, repo_id: str) -> Repository:
        if repo_id not in self.hub.repositories:
            raise Refused(404, "Repository not found", "RepoNotFound")
        return self.hub.repositories[repo_id]

    # --- endpoints ---

    def whoami(self, body):
        return 200, {"name": self.user[0], "type": "user", "orgs": []}

    def create(self, body):
        asked = json.loads(body)
        owner = asked.get("organization") or self.user[0]
        self.check_writer(owner)
        repo_id = f"{owner}/{asked['name']}"
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.repositories:
            raise Refused(409, "You already created this model repo", url=url)
        self.hub.repositories[repo_id] = Repository()
        return 200, {"url": url}

    def info(self, body, repo_id, revision="main"):
        repository = self.repository(repo_id)
        siblings = [{"rfilename": name} for name in repository.files]
        sha = repository.commits[-1]
        return 200, {"_id": "1", "id": repo_id, "sha": sha, "siblings": siblings, "tags": [], "private": False}

    def tree(self, body, repo_id, revision):
        files = self.repository(repo_id).files.items()
        return 200, [{"type": "file", "path": name, "size": len(data), "oid": _sha(data)} for name, data in files]

    def preupload(self, body, repo_id, revision):
        self.check_writer(repo_id.split("/")[0])
        files = json.loads(body)["files"]
        modes = {True: "lfs", False: "regular"}
        return 200, {
            "files": [
                {"path": f["path"], "uploadMode": modes[f["path"].endswith(".safetensors")], "shouldIgnore": False}
                for f in files
            ]
        }

    def lfs_batch(self, body, repo_id):
        self.check_writer(repo_id.split("/")[0])
        objects = json.loads(body)["objects"]
        for item in objects:
            if item["oid"] not in self.hub.objects:
                item["actions"] = {"upload": {"href": f"{self.hub.url}/storage/{item['oid']}"}}
        return 200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}

    def store(self, body, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        return 200, b""

    def commit(self, body, repo_id, revision):
        self.check_writer(repo_id.split("/")[0])
        repository, files = self.repository(repo_id), {}
        for line in body.splitlines():
            item = json.loads(line)
            if item["key"] == "file":
                files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            elif item["key"] == "lfsFile":
                files[item["value"]["path"]] = self.hub.objects[item["value"]["oid"]]
        repository.files |= files
        repository.commits.append(hashlib.sha1(body).hexdigest())
        oid = repository.commits[-1]
        return 200, {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}", "commitOid": oid, "hookOutput": ""}

    def resolve(self, body, repo_id, revision, file):
        repository = self.repository(repo_id)
        headers = {"X-Repo-Commit": repository.commits[-1]}
        if file not in repository.files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        data = repository.files[file]
        return 200, data, headers | {"ETag": f'"{_sha(data)}"'}

    def validate(self, body):
        return 200, b"{}"


def _sha(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


REPO, REVISION = r"(?P<repo_id>[\w.-]+/[\w.-]+)", r"(?P<revision>[\w.%-]+)"
ROUTES = {
    r"GET /api/whoami-v2": Handler.whoami,
    r"POST /api/repos/create": Handler.create,
    r"POST /api/validate-yaml": Handler.validate,
    rf"GET /api/models/{REPO}": Handler.info,
    rf"GET /api/models/{REPO}/revision/{REVISION}": Handler.info,
    rf"GET /api/models/{REPO}/tree/{REVISION}(?:/.*)?": Handler.tree,
    rf"POST /api/models/{REPO}/preupload/{REVISION}": Handler.preupload,
    rf"POST /api/models/{REPO}/commit/{REVISION}": Handler.commit,
    rf"POST /{REPO}\.git/info/lfs/objects/batch": Handler.lfs_batch,
    r"PUT /storage/(?P<oid>\w+)": Handler.store,
    rf"(?:HEAD|GET) /{REPO}/resolve/{REVISION}/(?P<file>.+)": Handler.resolve,
}


@contextmanager
def serving():
    """A running stand-in."""
    hub = Hub()
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
