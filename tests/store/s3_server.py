"""An S3 server (moto's) that can kill its client at a chosen request. Prints its port; ends when its stdin does.

``POST /_plan`` with ``{"pid", "request", "moment"}``: SIGKILL that process at its so-many-th request from now on (from
1): ``before`` it is read, ``midway`` through its body, or ``after`` it was done and before it is answered. ``GET
/_count``: requests since the last plan that did not say
``keep``.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

plan: dict[str, Any] = {"pid": 0, "request": 0, "moment": "before"}
count = 0
lock = threading.Lock()
storage = DomainDispatcherApplication(create_backend_app)


def application(environ: dict[str, Any], start: Any) -> Any:
    global count
    path = environ["PATH_INFO"]
    if path == "/_plan":
        plan.update(json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))))
        count = count if plan.pop("keep", False) else 0
        return answer(start, {})
    if path == "/_count":
        return answer(start, {"count": count})
    with lock:
        count += 1
        is_chosen = count == plan["request"]
    if not is_chosen:
        return storage(environ, start)
    if plan["moment"] == "before":
        strike()
        return answer(start, {})
    if plan["moment"] == "midway":
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0) // 2)
        strike()
        return answer(start, {})
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    done = storage({**environ, "wsgi.input": io.BytesIO(body)}, start)
    strike()
    return done


def strike() -> None:
    os.kill(plan["pid"], signal.SIGKILL)


def answer(start: Any, record: dict[str, Any]) -> list[bytes]:
    start("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(record).encode()]


if __name__ == "__main__":
    server = make_server("127.0.0.1", 0, application, threaded=True)
    print(server.server_port, flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()
