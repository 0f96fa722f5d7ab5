"""A small Hub on a loopback port: the calls that `huggingface_hub` makes to create, fill and read repositories.

Files are kept in memory; every commit replaces the state of `main` and is kept in `commits`. Safetensors and Parquet go
the way of large files (batch, upload, verify; a redirect when they are read), the rest inside the commit. `faults` says
which requests go wrong, and how.
"""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse


@dataclass
class Fault:
    """What happens to requests whose "METHOD path" the pattern is found in.

    Attributes:
        pattern: regular expression.
        times: requests it happens to.
        status, headers: answered instead of what was asked for; 0 for no answer of its own.
        hang: seconds before anything is done (until the server closes, at most).
        drop_after: bytes of the request's body that are read before the connection is closed; no effect if None.
        lose_answer: do what was asked for, then close the connection without an answer.
    """

    pattern: str
    times: int = 10**9
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    hang: float = 0.0
    drop_after: int | None = None
    lose_answer: bool = False


@dataclass
class Request:
    """A request that has come in; `status` is 0 where the connection was closed instead of an answer."""

    method: str
    path: str
    time: float
    body_bytes: int = 0
    status: int = 0

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


class HubServer:
    """Use as a context manager.

    Attributes:
        url, storage: the endpoint, and where large files are kept.
        repositories: (type, name) -> path -> content on `main`.
        commits: of all repositories: (name, summary, files after it).
        objects: large files by sha256.
        read_only: names of repositories that the token may read only.
        squashed: (name, message) whenever a repository's history was made one commit.
        part_size: large files are asked for in parts of so many bytes; None for whole ones.
        requests, log: all, in order, as "METHOD path" and with what became of them.
        port: to listen on; 0 for any.
    """

    def __init__(self, port: int = 0) -> None:
        self.repositories: dict[tuple[str, str], dict[str, bytes]] = {}
        self.large: dict[tuple[str, str], set[str]] = defaultdict(set)
        self.commits: list[tuple[str, str, dict[str, bytes]]] = []
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.verified: list[str] = []
        self.read_only: set[str] = set()
        self.squashed: list[tuple[str, str]] = []
        self.part_size: int | None = None
        self.requests: list[str] = []
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self.closing = threading.Event()
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args) -> None:
                pass

            def handle_any(self) -> None:
                try:
                    server.handle(self)
                except OSError:  # the client has gone
                    self.close_connection = True

            do_GET = do_POST = do_HEAD = do_PUT = handle_any

        ThreadingHTTPServer.allow_reuse_address = True
        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self.storage = f"http://localhost:{self.port}"  # another host, as far as the client can tell

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def asked(self, pattern: str) -> list[Request]:
        return [request for request in self.log if re.search(pattern, str(request))]

    # ------------------------------------------------------------------------------------------------ a request

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        request = Request(handler.command, handler.path, time.monotonic())
        with self.lock:
            self.requests.append(str(request))
            self.log.append(request)
            fault = next((f for f in self.faults if f.times > 0 and re.search(f.pattern, str(request))), None)
            if fault is not None:
                fault.times -= 1
        if fault is not None and fault.hang:
            self.closing.wait(fault.hang)
        body = self.read_body(handler, fault.drop_after if fault else None, request)
        if body is None:
            self.drop(handler)
            return
        if fault is not None and fault.status:
            status, headers, content = self.error(fault.status, "as the test asks", fault.headers)
        else:
            with self.lock:
                status, headers, content = self.answer(request.method, request.path, handler.headers, body)
        if fault is not None and fault.lose_answer:
            self.drop(handler)
            return
        request.status = status
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        if "Content-Length" not in headers:
            handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        if request.method != "HEAD":
            handler.wfile.write(content)

    @staticmethod
    def drop(handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        handler.connection.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def read_body(handler: BaseHTTPRequestHandler, drop_after: int | None, request: Request) -> bytes | None:
        """The request's body; None if the connection is to be closed in the middle of it."""
        pieces, length, chunked = [], handler.headers.get("Content-Length"), handler.headers.get("Transfer-Encoding")
        left = int(length or 0)
        while left or chunked:
            if chunked:
                left = int(handler.rfile.readline(), 16)
                if not left:
                    handler.rfile.readline()
                    break
            while left:
                piece = handler.rfile.read1(min(left, 4096))
                if not piece:
                    return None
                left -= len(piece)
                pieces.append(piece)
                request.body_bytes += len(piece)
                if drop_after is not None and request.body_bytes >= drop_after:
                    return None
            if chunked:
                handler.rfile.readline()
        return None if drop_after is not None else b"".join(pieces)

    def answer(self, method: str, target: str, headers, body: bytes) -> tuple[int, dict, bytes]:
        parsed = urlparse(target)
        path, query = unquote(parsed.path), parse_qs(parsed.query)
        # As signed addresses, these two come without a token.
        if path == "/objects/complete":
            return self.large_files("complete", json.loads(body))
        if match := re.fullmatch(r"/objects/(\w+)(?:/(\d+))?", path):
            return self.object(method, match[1], match[2], body, headers)
        if method in ("POST", "PUT") and not headers.get("Authorization"):
            return self.error(401, "Invalid username or password.")
        if path == "/api/whoami-v2":
            return self.json({"name": "tester", "type": "user", "orgs": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/(datasets/|spaces/)?([^/]+/[^/]+)\.git/info/lfs/objects/(batch|verify)", path):
            return self.large_files(match[3], json.loads(body))
        if match := re.fullmatch(
            r"/api/(models|datasets|spaces)/([^/]+/[^/]+)(?:/(\w[\w-]*)(?:/([^/]+))?(?:/(.*))?)?", path
        ):
            kind, name, call, _, rest = match.groups()
            files = self.repositories.get((kind[:-1], name))
            if files is None:
                return self.error(404, "Repository not found", {"X-Error-Code": "RepoNotFound"})
            return self.api(method, kind, name, call, rest or "", files, query, body)
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path):
            kind, name, _, file = match.groups()
            key = ("dataset" if kind else "model", name)
            if key not in self.repositories:
                return self.error(404, "Repository not found", {"X-Error-Code": "RepoNotFound"})
            return self.resolve(key, file, headers)
        return self.error(404, f"no such call: {method} {path}")

    # ------------------------------------------------------------------------------------------------ the calls

    def create(self, wanted: dict) -> tuple[int, dict, bytes]:
        organization = wanted.get("organization")
        name = f"{organization}/{wanted['name']}" if organization else wanted["name"]
        if name in self.read_only:
            return self.error(403, "You don't have the rights to create a model under this namespace")
        key = (wanted.get("type") or "model", name)
        if key in self.repositories:
            status, headers, _ = self.error(409, "You already created this model repo")
            return status, headers, json.dumps({"error": "exists", "url": f"{self.url}/{name}"}).encode()
        self.repositories[key] = {}
        return self.json({"url": f"{self.url}/{name}", "name": name})

    def api(self, method, kind, name, call, path, files, query, body) -> tuple[int, dict, bytes]:
        large = self.large[(kind[:-1], name)]
        if call == "auth-check":
            return self.error(403, "Forbidden") if name in self.read_only else self.json({})
        if call == "preupload":
            return self.json({"files": [self.upload_mode(f["path"], files, large) for f in json.loads(body)["files"]]})
        if call == "super-squash":
            self.squashed.append((name, json.loads(body)["message"]))
            return self.json({})
        if call == "commit":
            return self.commit(name, files, large, body)
        if call == "tree":
            recursive = query.get("recursive", ["false"])[0].lower() == "true"
            return self.json(self.tree(files, large, path, recursive))
        if call == "paths-info":
            values = parse_qs(body.decode()) if body[:1] != b"{" else json.loads(body)
            found = {e["path"]: e for e in self.tree(files, large, "", True)}
            return self.json([found[p] for p in values["paths"] if p in found])
        if call in (None, "revision"):
            siblings = [{"rfilename": f} for f in files]
            info = {"id": name, "sha": self.commit_of(files), "private": False, "tags": [], "siblings": siblings}
            return self.json({**info, "modelId": name, "downloads": 0, "likes": 0, "gated": False, "disabled": False})
        return self.error(404, f"no such call: {method} {kind} {call}")

    def upload_mode(self, path: str, files: dict[str, bytes], large: set[str]) -> dict:
        is_large = path.endswith((".safetensors", ".parquet"))
        mode = {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
        return mode | ({"oid": self.object_id(files[path], path in large)} if path in files else {})

    def commit(self, name: str, files: dict[str, bytes], large: set[str], body: bytes) -> tuple[int, dict, bytes]:
        changed, summary = dict(files), ""
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                summary = value["summary"]
                if value.get("parentCommit", self.commit_of(files)) != self.commit_of(files):
                    return self.error(412, "A commit has happened since. Please refresh and try again.")
            elif entry["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    return self.error(400, f"no object {value['oid']} was uploaded")
                changed[value["path"]] = self.objects[value["oid"]]
                large.add(value["path"])
            elif entry["key"] == "deletedFile":
                changed.pop(value["path"], None)
        files.clear()
        files.update(changed)
        self.commits.append((name, summary, changed))
        commit = self.commit_of(files)
        return self.json({"commitUrl": f"{self.url}/{name}/commit/{commit}", "commitOid": commit})

    def large_files(self, call: str, wanted: dict) -> tuple[int, dict, bytes]:
        if call == "verify":
            content = self.objects.get(wanted["oid"])
            if content is None or len(content) != wanted["size"]:
                return self.error(422, "the object's size is another")
            self.verified.append(wanted["oid"])
            return self.json({})
        if call == "complete":
            parts = self.parts.pop(wanted["oid"])
            content = b"".join(parts[part["partNumber"]] for part in wanted["parts"])
            if hashlib.sha256(content).hexdigest() != wanted["oid"]:
                return self.error(422, "the object's sha256 is another")
            self.objects[wanted["oid"]] = content
            return self.json({})
        objects = []
        for entry in wanted["objects"]:
            oid, upload = entry["oid"], {"href": f"{self.storage}/objects/{entry['oid']}"}
            if self.part_size is not None:
                numbers = range(1, -(-entry["size"] // self.part_size) + 1)
                header = {str(n): f"{self.storage}/objects/{oid}/{n}" for n in numbers}
                upload = {
                    "href": f"{self.storage}/objects/complete",
                    "header": header | {"chunk_size": str(self.part_size)},
                }
            verify = {"href": f"{self.url}/org/any.git/info/lfs/objects/verify"}
            actions = {} if oid in self.objects else {"actions": {"upload": upload, "verify": verify}}
            objects.append({**entry, **actions})
        transfer = "multipart" if self.part_size is not None else "basic"
        return self.json({"transfer": transfer, "objects": objects})

    def object(self, method: str, oid: str, part: str | None, body: bytes, headers) -> tuple[int, dict, bytes]:
        if method in ("GET", "HEAD"):
            return self.content(self.objects[oid], headers, {"ETag": f'"{oid}"'})
        if part is not None:
            self.parts.setdefault(oid, {})[int(part)] = body
        elif hashlib.sha256(body).hexdigest() != oid:
            return self.error(400, "the object's sha256 is another")
        else:
            self.objects[oid] = body
        return 200, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}, b""

    def tree(self, files: dict[str, bytes], large: set[str], folder: str, recursive: bool) -> list[dict]:
        prefix = folder.strip("/") + "/" if folder.strip("/") else ""
        entries: dict[str, dict] = {}
        for path, content in files.items():
            if not path.startswith(prefix):
                continue
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts)):
                if depth == 1 or recursive:
                    directory = prefix + "/".join(parts[:depth])
                    entries[directory] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": directory}
            if len(parts) == 1 or recursive:
                entry = {"type": "file", "oid": self.object_id(content, False), "size": len(content), "path": path}
                if path in large:
                    oid = self.object_id(content, True)
                    entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 134}
                entries[path] = entry
        return list(entries.values())

    def resolve(self, key: tuple[str, str], file: str, headers) -> tuple[int, dict, bytes]:
        files = self.repositories[key]
        commit = {"X-Repo-Commit": self.commit_of(files)}
        if file not in files:
            return self.error(404, "Entry not found", {"X-Error-Code": "EntryNotFound", **commit})
        content, is_large = files[file], file in self.large[key]
        oid = self.object_id(content, is_large)
        linked = {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{oid}"', **commit}
        if is_large:
            return 302, {**linked, "Location": f"{self.storage}/objects/{oid}"}, b""
        return self.content(content, headers, {**linked, "ETag": f'"{oid}"'})

    @staticmethod
    def content(content: bytes, headers, more: dict[str, str]) -> tuple[int, dict, bytes]:
        status, sent = 200, {**more, "Accept-Ranges": "bytes", "Content-Type": "binary/octet-stream"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("Range") or ""):
            first, last = int(match[1]), int(match[2] or len(content) - 1)
            sent["Content-Range"] = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
            content, status = content[first : last + 1], 206
        return status, {**sent, "Content-Length": str(len(content))}, content

    @staticmethod
    def object_id(content: bytes, is_large: bool) -> str:
        """As Git names it: sha256 of a large file, SHA-1 of a blob."""
        if is_large:
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @staticmethod
    def commit_of(files: dict[str, bytes]) -> str:
        state = hashlib.sha1()
        for path in sorted(files):
            state.update(path.encode() + hashlib.sha1(files[path]).digest())
        return state.hexdigest()

    @staticmethod
    def json(value) -> tuple[int, dict, bytes]:
        return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()

    @staticmethod
    def error(status: int, message: str, headers: dict | None = None) -> tuple[int, dict, bytes]:
        content = json.dumps({"error": message}).encode()
        return status, {"Content-Type": "application/json", "X-Error-Message": message, **(headers or {})}, content
