"""A server that takes a wandb run, as far as wandb 0.31 asks, and can be lost in the middle of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@contextmanager
def wandb_server() -> Iterator[ThreadingHTTPServer]:
    """The server on a free port of this machine; `requests` lists the paths that were asked for."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.requests = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.requests.append(self.path)
        reply = {"data": self._answer(json.loads(content))} if self.path == "/graphql" else {}
        encoded = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)

    do_GET = do_PUT = do_POST

    def _answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        variables = asked.get("variables") or {}
        if "mutation UpsertBucket" in asked["query"]:
            project = {"id": "cA==", "name": "p", "entity": {"id": "ZQ==", "name": "me"}}
            bucket = {"id": "cg==", "name": variables["name"], "displayName": "run", "config": "{}", "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "mutation CreateRunFiles" in asked["query"]:
            url = f"http://127.0.0.1:{self.server.server_address[1]}/upload"
            files = [{"name": name, "uploadUrl": url} for name in variables["files"]]
            return {"createRunFiles": {"runID": "cg==", "uploadHeaders": [], "files": files}}
        return {}

    def log_message(self, *_: Any) -> None:
        pass
