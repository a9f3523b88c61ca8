"""The report of runs that are still training, as a page on this machine that refreshes itself."""

from __future__ import annotations

import html
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

from marval_rl.reporting.page import render_page
from marval_rl.reporting.run_folder import load_runs

HOST = "127.0.0.1"  # not reachable from the network


def make_server(runs: list[Path], port: int) -> ThreadingHTTPServer:
    """A server of / (the page, rendered when its runs have changed) and /version (which the page asks for).

    Args:
        port: 0 takes a free one.

    Raises:
        ValueError: Where a folder is not a run, or the port is taken.
    """
    load_runs(runs)
    lock = Lock()
    rendered: dict[str, str] = {}  # version -> page, the last one only

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # A foreign site whose name was pointed at this machine must not read the page through the reader's browser.
            if self.headers.get("Host", "").rsplit(":", 1)[0] not in (HOST, "localhost"):
                return self.answer(403, "only 127.0.0.1 and localhost are answered")
            version = version_of(runs)
            if self.path == "/version":
                return self.answer(200, version)
            if self.path != "/":
                return self.answer(404, "there is / only")
            try:
                with lock:
                    if version not in rendered:
                        page = render_page(load_runs(runs), version)
                        rendered.clear()
                        rendered[version] = page
                    page = rendered[version]
            except (ValueError, OSError) as error:  # a file that is being written: the browser tries again
                page = f'<meta http-equiv="refresh" content="3"><p>{html.escape(str(error))}</p>'
            self.answer(200, page, "text/html")

        def answer(self, code: int, text: str, kind: str = "text/plain") -> None:
            data = text.encode("utf-8")
            self.send_response(code)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Cache-Control", "no-store")
            with suppress(ConnectionError):  # the reader has left
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Requests are not logged."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise ValueError(f"port {port} cannot be used ({error.strerror}): choose another with --port") from error


def version_of(runs: list[Path]) -> str:
    """Changes whenever a file that the report reads does."""
    files = [path for run in runs for path in sorted(run.glob("*.*")) + sorted(run.glob("samples/*"))]
    known = [path.stat() for path in files if path.suffix in (".jsonl", ".json", ".yaml", ".png")]
    newest = max((stat.st_mtime_ns for stat in known), default=0)
    return f"{len(known)}-{sum(stat.st_size for stat in known)}-{newest}"
