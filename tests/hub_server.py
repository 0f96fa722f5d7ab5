"""A small Hub on a loopback port: the calls that `huggingface_hub` makes to create, fill and read repositories.

Files are kept in memory, every commit replaces the state of `main`, and every upload is answered as "regular", so that
the client sends file contents inside the commit.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse


class HubServer:
    """Use as a context manager; `url` is the endpoint, `repositories[(type, name)]` maps paths to bytes."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], dict[str, bytes]] = {}
        self.requests: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args) -> None:
                pass

            def handle_any(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length) if length else b""
                server.requests.append(f"{self.command} {self.path}")
                status, headers, content = server.answer(self.command, self.path, self.headers, body)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if self.command != "HEAD":
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_POST = do_HEAD = do_PUT = handle_any

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, target: str, headers, body: bytes) -> tuple[int, dict, bytes]:
        parsed = urlparse(target)
        path, query = unquote(parsed.path), parse_qs(parsed.query)
        if method in ("POST", "PUT") and not headers.get("Authorization"):
            return self.error(401, "Invalid username or password.")
        if path == "/api/whoami-v2":
            return self.json({"name": "tester", "type": "user", "orgs": []})
        if path == "/api/repos/create":
            wanted = json.loads(body)
            organization = wanted.get("organization")
            name = f"{organization}/{wanted['name']}" if organization else wanted["name"]
            self.repositories.setdefault((wanted.get("type") or "model", name), {})
            return self.json({"url": f"{self.url}/{name}", "name": name})
        if path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(\w[\w-]*)(?:/([^/]+))?(?:/(.*))?)?", path):
            kind, name, call, _, rest = match.groups()
            files = self.repositories.get((kind[:-1], name))
            if files is None:
                return self.error(404, "Repository not found", {"X-Error-Code": "RepoNotFound"})
            return self.api(method, kind, name, call, rest or "", files, query, body)
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path):
            kind, name, _, file = match.groups()
            files = self.repositories.get(("dataset" if kind else "model", name))
            if files is None:
                return self.error(404, "Repository not found", {"X-Error-Code": "RepoNotFound"})
            return self.resolve(files, file, headers)
        return self.error(404, f"no such call: {method} {path}")

    def api(self, method, kind, name, call, path, files, query, body) -> tuple[int, dict, bytes]:
        if call == "preupload":
            wanted = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in wanted]
            return self.json({"files": modes})
        if call == "commit":
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "deletedFile":
                    files.pop(value["path"], None)
            commit = self.commit_of(files)
            return self.json({"commitUrl": f"{self.url}/{name}/commit/{commit}", "commitOid": commit})
        if call == "tree":
            return self.json(self.tree(files, path, query.get("recursive", ["false"])[0].lower() == "true"))
        if call == "paths-info":
            values = parse_qs(body.decode()) if body[:1] != b"{" else json.loads(body)
            wanted = values["paths"]
            found = {e["path"]: e for e in self.tree(files, "", True)}
            return self.json([found[p] for p in wanted if p in found])
        if call in (None, "revision"):
            commit = self.commit_of(files)
            info = {
                "id": name,
                "sha": commit,
                "private": False,
                "tags": [],
                "siblings": [{"rfilename": f} for f in files],
            }
            return self.json({**info, "modelId": name, "downloads": 0, "likes": 0, "gated": False, "disabled": False})
        return self.error(404, f"no such call: {method} {kind} {call}")

    def tree(self, files: dict[str, bytes], folder: str, recursive: bool) -> list[dict]:
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
                oid = hashlib.sha1(content).hexdigest()
                entries[path] = {"type": "file", "oid": oid, "size": len(content), "path": path}
        return list(entries.values())

    def resolve(self, files: dict[str, bytes], file: str, headers) -> tuple[int, dict, bytes]:
        commit = {"X-Repo-Commit": self.commit_of(files)}
        if file not in files:
            return self.error(404, "Entry not found", {"X-Error-Code": "EntryNotFound", **commit})
        content, status = files[file], 200
        etag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept-Ranges": "bytes", **commit}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("Range") or ""):
            first, last = int(match[1]), int(match[2] or len(content) - 1)
            etag["Content-Range"] = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
            content, status = content[first : last + 1], 206
        return status, {**etag, "X-Linked-Size": str(len(files[file])), "Content-Type": "binary/octet-stream"}, content

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
