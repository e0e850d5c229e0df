"""A Hub of this process's memory, as far as pushing and loading need one: HF_ENDPOINT=server.url.

`python tests/hub_server.py PORT` serves one for ten minutes, to try `ola-vlm push` without an account.
"""

import base64
import hashlib
import json
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse


class Hub(BaseHTTPRequestHandler):
    repos: dict[str, dict]  # name -> {"private": bool, "files": {path: bytes}, "sha": str}

    def reply(self, status: int, body: bytes | dict | list = b"", **headers: str) -> None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), **{k.replace("_", "-"): v for k, v in headers.items()}}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body, path = self.rfile.read(int(self.headers["Content-Length"])), unquote(urlparse(self.path).path)
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            fields = json.loads(body)
            name = f"{fields.get('organization') or 'me'}/{fields['name']}"
            private = fields.get("visibility") == "private"
            self.repos.setdefault(name, {"private": private, "files": {}, "sha": "0" * 40})
            self.reply(200, {"url": f"{self.server.url}/{name}"})
        elif path == "/api/validate-yaml":
            self.reply(200, {"errors": [], "warnings": []})
        elif parts[4:5] == ["preupload"]:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self.reply(200, {"files": files})
        elif parts[4:5] == ["commit"]:
            repo = self.repos["/".join(parts[2:4])]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    repo["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            repo["sha"] = hashlib.sha1(body).hexdigest()
            url = f"{self.server.url}/{'/'.join(parts[2:4])}/commit/{repo['sha']}"
            self.reply(200, {"commitUrl": url, "commitOid": repo["sha"], "success": True})
        else:
            self.reply(404, X_Error_Code="EntryNotFound")

    def do_GET(self):
        parts = unquote(urlparse(self.path).path).strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        repo = self.repos.get("/".join(parts[2:4] if api else parts[:2]))
        if repo is None:
            return self.reply(404, X_Error_Code="RepoNotFound")
        files, sha = repo["files"], repo["sha"]
        if api and parts[4:5] == ["tree"]:
            folder = "".join(f"{part}/" for part in parts[6:])
            found = [
                {"type": "file", "path": f, "size": len(files[f]), "oid": sha} for f in files if f.startswith(folder)
            ]
            return self.reply(200, found) if found else self.reply(404, X_Error_Code="EntryNotFound")
        if api:
            return self.reply(
                200, {"id": "/".join(parts[2:4]), "sha": sha, "siblings": [{"rfilename": f} for f in files]}
            )
        body = files.get("/".join(parts[4:]))
        if parts[2:3] != ["resolve"] or body is None:
            return self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        etag = f'"{hashlib.sha1(body).hexdigest()}"'
        return self.reply(200, body, ETag=etag, X_Repo_Commit=sha)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@contextmanager
def serve(port: int = 0):
    """The running server: `.url`, `.repos`; port 0 is any that is free."""
    repos: dict[str, dict] = {}
    server = ThreadingHTTPServer(("127.0.0.1", port), type("OneHub", (Hub,), {"repos": repos}))
    server.url, server.repos = f"http://127.0.0.1:{server.server_address[1]}", repos
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    with serve(int(sys.argv[1])) as running:
        print(running.url, flush=True)
        time.sleep(600)
