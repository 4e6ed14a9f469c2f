"""The page on which a job is drawn: a server for one person, on this machine alone."""

from __future__ import annotations

import errno
import json
import re
import secrets
import shlex
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from common.errors import UserError
from loraedit_ext.prepare.draft import Cut, Draft, Drawn
from loraedit_ext.prepare.request import Request

HOST = "127.0.0.1"
_HTML = Path(__file__).with_name("page.html")
_JPEG, _PNG = "image/jpeg", "image/png"
Reply = tuple[str, bytes]
"""Content type and body."""


class PageServer(ThreadingHTTPServer):
    """Answers under `address` and nowhere else: its path holds a secret, so that other users and web sites cannot reach it."""

    daemon_threads = True

    def __init__(self, request: Request, port: int) -> None:
        """
        Args:
            port: 0 takes any that is free.

        Raises:
            UserError: the port is taken, or as `Draft`.
        """
        self.draft = Draft(request)
        self.secret = secrets.token_urlsafe(16)
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            raise UserError(f"--page {port}: this port cannot be used ({error.strerror}). Give another, e.g. --page "
                            f"{port + 1 if port > 1023 else 8861}, or --page 0 for any that is free.") from error  # fmt: skip

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing of a browser that went away; a traceback of all else."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def address(self) -> str:
        """What to open in a browser."""
        return f"http://{HOST}:{self.server_port}/{self.secret}/"


def serve(request: Request, port: int) -> None:
    """Serve the page until the process is interrupted; then say how to come back to what was drawn.

    Raises:
        UserError: as `PageServer`.
    """
    with PageServer(request, port) as server:
        local = server.server_port
        print(f"page      {server.address}\n          open it in a browser on this machine; from another one first: "
              f"ssh -L {local}:{HOST}:{local} THIS_MACHINE. Ctrl-C ends it.", flush=True)  # fmt: skip
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print(f"\nas typed  prepare.py {shlex.join(server.draft.request.arguments())}")


def _read(part: Callable[[Draft, int], bytes], kind: str) -> Callable[[Draft, int, _Handler], Reply]:
    return lambda draft, frame, _: (kind, part(draft, frame))


def _change(part: Callable[[Draft, int, _Handler], None]) -> Callable[[Draft, int, _Handler], Reply]:
    """After a change the page is told how things stand."""

    def changed(draft: Draft, frame: int, call: _Handler) -> Reply:
        part(draft, frame, call)
        return _json(draft.facts())

    return changed


def _prepare(draft: Draft, _: int, call: _Handler) -> Reply:
    lines = draft.prepare(Drawn.read(call.body()))
    print("\n".join(lines), flush=True)
    return _json({"lines": lines, "facts": draft.facts()})


def _json(value: object) -> Reply:
    return "application/json", json.dumps(value).encode()


_ACTIONS: dict[tuple[str, str], Callable[[Draft, int, _Handler], Reply]] = {
    ("GET", ""): lambda draft, frame, call: ("text/html; charset=utf-8", _HTML.read_bytes()),
    ("GET", "facts"): lambda draft, frame, call: _json(draft.facts()),
    ("GET", "frame"): _read(Draft.frame, _JPEG),
    ("GET", "picture"): _read(Draft.picture, _PNG),
    ("GET", "edited"): _read(Draft.edited, _JPEG),
    ("GET", "painted"): _read(Draft.painted, _PNG),
    ("GET", "mask"): _read(Draft.mask, _PNG),
    ("PUT", "edited"): _change(lambda draft, frame, call: draft.put_edited(frame, call.query("name"), call.body())),
    ("PUT", "painted"): _change(lambda draft, frame, call: draft.put_painted(frame, call.body())),
    ("PUT", "mask"): _change(lambda draft, frame, call: draft.put_mask(frame, call.body())),
    ("DELETE", "edited"): _change(lambda draft, frame, call: draft.drop("edited", frame)),
    ("DELETE", "painted"): _change(lambda draft, frame, call: draft.drop("painted", frame)),
    ("DELETE", "mask"): _change(lambda draft, frame, call: draft.drop_mask(frame)),
    ("POST", "clip"): _change(lambda draft, frame, call: draft.take(Cut.read(call.body()))),
    ("POST", "outline"): lambda draft, frame, call: (_PNG, draft.outline(frame, Drawn.read(call.body()))),
    ("POST", "prepare"): _prepare,
}
"""Method and first word of the path -> what is done; a frame of the clip may stand behind the word."""


class _Handler(BaseHTTPRequestHandler):
    server: PageServer

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def query(self, name: str) -> str:
        return parse_qs(urlsplit(self.path).query).get(name, [""])[0]

    def do_GET(self) -> None:
        found = re.fullmatch(rf"/{self.server.secret}/(?:(\w+)(?:/(\d+))?)?", urlsplit(self.path).path)
        action = _ACTIONS.get((self.command, found[1] or "")) if found else None
        if action is None:
            self._reply(HTTPStatus.NOT_FOUND, ("text/plain", b"Nothing is here. Open the whole address that was printed."))
            return
        try:
            self._reply(HTTPStatus.OK, action(self.server.draft, int(found[2] or 0), self))
        except UserError as error:
            self._reply(HTTPStatus.BAD_REQUEST, ("text/plain; charset=utf-8", str(error).encode()))

    do_PUT = do_DELETE = do_POST = do_GET

    def _reply(self, status: HTTPStatus, reply: Reply) -> None:
        kind, body = reply
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Silence: the terminal is for what a person should know."""
