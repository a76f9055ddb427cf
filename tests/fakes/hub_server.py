"""A fake Hugging Face hub on this machine, for the real huggingface_hub client.

It speaks the part of the hub's HTTP interface that a download of a model needs, and answers anything else with 501
and a line in `unexpected`:

    GET       /api/models/ID/revision/REVISION[?blobs=true]   what a revision holds: commit, files, sizes, hashes
    HEAD, GET /ID/resolve/REVISION/FILE                       a file, with ETag and X-Repo-Commit; large files (LFS)
                                                              are redirected, with X-Linked-Etag and X-Linked-Size
    GET       /content/SHA256                                 at a second port, as the hub's content network: no login
    Range requests, relative 307 redirects of renamed repositories, and 401, 403 and 404 with X-Error-Code and
    X-Error-Message as the hub sends them.

Not spoken: Xet, the tree and refs interfaces, commits abbreviated to a prefix, uploads.

    with HubServer() as hub:
        commit = hub.add("org/name", model_files())
        ...HF_ENDPOINT=hub.url...
        hub.requests
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".model", ".gguf", ".onnx", ".msgpack", ".h5", ".pth")
CHUNK_BYTES = 256 * 1024


@dataclass
class Repository:
    """`revisions` maps branches, tags and commits to commits; `commits` maps commits to their files."""

    id: str
    revisions: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    readers: set[str] = field(default_factory=set)  # tokens that may read it although it is gated or private
    lists_sizes: bool = True  # some mirrors list names only


@dataclass
class Request:
    """Recorded before it is answered, so that a client that has its answer finds it here."""

    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    port: int
    status: int = 0  # of the answer
    sent_bytes: int = 0  # of the body, as far as it was handed to the connection

    @property
    def file(self) -> str:
        """The file that is asked for by name, or "" for other requests."""
        return unquote(self.path.rpartition("/")[2]) if "/resolve/" in self.path else ""


@dataclass
class Fault:
    """What goes wrong with the next `times` requests of `method` whose path contains `part`."""

    part: str
    method: str = "GET"
    times: int = 1_000_000
    status: int | None = None  # answer with this status and nothing else
    error_message: str = ""  # X-Error-Message with that status
    page: bytes | None = None  # answer 200 with this HTML page, as a login page in between does
    drop_after: int | None = None  # close the connection after so many bytes of the body
    stall_after: int | None = None  # send so many bytes of the body, then nothing until `HubServer.release` is set
    corrupt: bool = False  # send other bytes, as many
    before: Callable[[], object] | None = None  # call this before answering


class HubServer:
    """`url` is the hub; `content_url` is where it redirects to for large files."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.renamed: dict[str, str] = {}
        self.tokens: set[str] = set()  # accounts that exist; any other token is refused
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.unexpected: list[str] = []
        self.release = threading.Event()
        self.lock = threading.Lock()
        self.servers = [self._listen(), self._listen()]
        self.url, self.content_url = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)

    def _listen(self) -> ThreadingHTTPServer:
        return _Server(("127.0.0.1", 0), type("BoundHandler", (_Handler,), {"hub": self}))

    def __enter__(self) -> HubServer:
        for server in self.servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.005}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def add(self, repo_id: str, files: dict[str, bytes], *, revision: str = "main", **settings: object) -> str:
        """Commit `files` as the whole content of `revision`; returns the commit. `settings` go to the Repository."""
        repository = self.repositories.setdefault(repo_id, Repository(repo_id))
        for name, value in settings.items():
            if not hasattr(repository, name):
                raise AttributeError(name)
            setattr(repository, name, value)
        commit = hashlib.sha1(repr((repo_id, len(repository.commits), sorted(files))).encode()).hexdigest()
        repository.commits[commit] = dict(files)
        repository.revisions |= {revision: commit, commit: commit}
        return commit

    def fail(self, part: str, **what: object) -> Fault:
        fault = Fault(part, **what)  # type: ignore[arg-type]
        self.faults.append(fault)
        return fault

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and fault.part in path:
                    fault.times -= 1
                    return fault
        return None

    def asked(self, method: str, part: str = "") -> list[Request]:
        with self.lock:
            return [request for request in self.requests if request.method == method and part in request.path]


def safetensors(num_bytes: int = 64, fill: bytes = b"w") -> bytes:
    """A well-formed safetensors file with one tensor of `num_bytes` bytes."""
    tensor = {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "weight": tensor}).encode()
    return len(header).to_bytes(8, "little") + header + fill * num_bytes


def model_files(**changes: bytes | None) -> dict[str, bytes]:
    """The files of a small complete checkpoint; `changes` (with "__" for ".") replace, add or, with None, remove."""
    files: dict[str, bytes | None] = {
        "config.json": b'{"model_type": "gpt2"}',
        "generation_config.json": b"{}",
        "tokenizer.json": b'{"model": {}}',
        "tokenizer_config.json": b'{"model_max_length": 64}',
        "model.safetensors": safetensors(),
    }
    files |= {name.replace("__", "."): content for name, content in changes.items()}
    return {name: content for name, content in files.items() if content is not None}


def git_blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(name: str) -> bool:
    return name.endswith(LFS_SUFFIXES)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that are killed or give up reset their connections; anything else is a defect of this file."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    """One request. `hub` is set in a subclass, as the server makes the handlers."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two packets, and the second would wait 40 ms for an answer
    hub: HubServer

    def log_message(self, *_: object) -> None:
        """Write nothing; the requests are recorded."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.request_record = Request(self.command, self.path, headers, self.server.server_address[1])
        with self.hub.lock:
            self.hub.requests.append(self.request_record)
        self.fault = self.hub.take_fault(self.command, self.path)
        try:
            if self.fault and self.fault.before:
                self.fault.before()
            if self.fault and self.fault.status:
                self.refuse(self.fault.status, "", self.fault.error_message)
            elif self.fault and self.fault.page is not None:
                self.send(200, self.fault.page, {"Content-Type": "text/html"})
            else:
                self.route()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def route(self) -> None:
        path = urlsplit(self.path).path
        if self.server is self.hub.servers[1]:
            if match := re.fullmatch(r"/content/([0-9a-f]{64})", path):
                self.content(match[1])
                return
        elif match := re.fullmatch(r"/api/models/([^/]+(?:/[^/]+)?)/revision/([^/]+)", path):
            if self.may_pass(match[1], gate=False):
                self.info(self.hub.repositories[match[1]], unquote(match[2]))
            return
        elif match := re.fullmatch(r"/([^/]+(?:/[^/]+)?)/resolve/([^/]+)/(.+)", path):
            if self.may_pass(match[1], gate=True):
                self.file(self.hub.repositories[match[1]], unquote(match[2]), unquote(match[3]))
            return
        self.hub.unexpected.append(f"{self.command} {self.path}")
        self.send(501, b"this fake hub does not speak that")

    def may_pass(self, repo_id: str, *, gate: bool) -> bool:
        """Redirect, or refuse as the hub does; a gated repository shows what it holds, but gives out no file."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            self.refuse(401, "", "Invalid credentials in Authorization header")
            return False
        if repo_id in self.hub.renamed:
            location = self.path.replace(f"/{repo_id}/", f"/{self.hub.renamed[repo_id]}/", 1)
            self.send(307, b"Temporary Redirect", {"Location": location})
            return False
        repository = self.hub.repositories.get(repo_id)
        reads = repository is not None and token in repository.readers
        if repository is None or (repository.private and not reads):
            if token:
                self.refuse(404, "RepoNotFound", "Repository not found")
            else:
                self.refuse(401, "", "Invalid username or password.")
            return False
        if gate and repository.gated and not reads:
            if token:
                why = f"Access to model {repo_id} is restricted and you are not in the authorized list."
                self.refuse(403, "GatedRepo", why)
            else:
                why = f"Access to model {repo_id} is restricted. You must have access to it and be authenticated."
                self.refuse(401, "GatedRepo", why)
            return False
        return True

    def info(self, repository: Repository, revision: str) -> None:
        commit = repository.revisions.get(revision)
        if commit is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        siblings = []
        for name, content in sorted(repository.commits[commit].items()):
            sibling: dict[str, object] = {"rfilename": name}
            if repository.lists_sizes and "blobs=" in self.path:
                sibling |= {"size": len(content), "blobId": git_blob_id(content)}
                if is_lfs(name):
                    pointer = f"version https://git-lfs\nsha256:{hashlib.sha256(content).hexdigest()}\n".encode()
                    sibling["blobId"] = git_blob_id(pointer)
                    lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
                    sibling["lfs"] = lfs | {"pointerSize": len(pointer)}
            siblings.append(sibling)
        answer = {"id": repository.id, "modelId": repository.id, "sha": commit, "siblings": siblings}
        answer |= {"private": repository.private, "gated": "manual" if repository.gated else False, "tags": []}
        self.send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def file(self, repository: Repository, revision: str, name: str) -> None:
        commit = repository.revisions.get(revision)
        if commit is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        content = repository.commits[commit].get(name)
        headers = {"X-Repo-Commit": commit}
        if content is None:
            self.refuse(404, "EntryNotFound", "Entry not found", headers)
        elif is_lfs(name):
            sha256 = hashlib.sha256(content).hexdigest()
            headers |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
            location = f"{self.hub.content_url}/content/{sha256}?signature=secret"
            self.send(302, b"Found", headers | {"Location": location})
        else:
            self.send(200, content, headers | {"ETag": f'"{git_blob_id(content)}"'}, ranges=True)

    def content(self, sha256: str) -> None:
        for repository in self.hub.repositories.values():
            for files in repository.commits.values():
                for name, content in files.items():
                    if is_lfs(name) and hashlib.sha256(content).hexdigest() == sha256:
                        self.send(200, content, {"ETag": f'"{sha256}"'}, ranges=True)
                        return
        self.send(404, b"no such content")

    def refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        said = {"X-Error-Code": code} if code else {}
        said |= {"X-Error-Message": message} if message else {}
        self.send(status, json.dumps({"error": message}).encode(), {**said, **(headers or {})})

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None, *, ranges: bool = False) -> None:
        headers = dict(headers or {})
        if ranges:
            headers["Accept-Ranges"] = "bytes"
            if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
                start, whole = int(match[1]), len(body)
                if start >= whole:
                    status, body, headers["Content-Range"] = 416, b"", f"bytes */{whole}"
                else:
                    status, body = 206, body[start:]
                    headers["Content-Range"] = f"bytes {start}-{whole - 1}/{whole}"
        if self.fault and self.fault.corrupt:
            body = bytes(byte ^ 1 for byte in body)
        self.request_record.status = status
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        stall_after = self.fault.stall_after if self.fault else None
        drop_after = self.fault.drop_after if self.fault else None
        body = body[: min(n for n in (len(body), stall_after, drop_after) if n is not None)]
        for offset in range(0, len(body), CHUNK_BYTES):
            chunk = body[offset : offset + CHUNK_BYTES]
            self.request_record.sent_bytes += len(chunk)
            self.wfile.write(chunk)
        if stall_after is not None:
            self.wfile.flush()
            self.hub.release.wait()
        if stall_after is not None or drop_after is not None:
            self.close_connection = True
