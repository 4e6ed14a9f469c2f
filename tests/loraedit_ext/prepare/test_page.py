"""The page: what a browser asks of it, and that a job drawn there is the one that the command line makes."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cv2
import numpy as np
import pytest

import prepare as verb
from common.errors import UserError
from dataset.images import read_image, write_png
from dataset.job import load_job
from dataset.resize import Grid
from dataset.video_writer import write_images
from loraedit_ext.prepare.job import prepare
from loraedit_ext.prepare.page import PageServer
from loraedit_ext.prepare.request import Request
from tests.browser import document_of

ROOT = Path(__file__).parents[3]
BOX = (20, 16, 24, 20)
NOTHING = {"boxes": {}, "clicks": {}, "background": {}, "margin": 0.1, "caption": "", "edited_caption": ""}


class Browser:
    """Asks a page's server as its script does."""

    def __init__(self, server: PageServer) -> None:
        self.server = server

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, str, bytes]:
        """Status, content type and body."""
        address = urlsplit(self.server.address)
        connection = http.client.HTTPConnection(address.netloc, timeout=60)
        connection.request(method, address.path + path, body)
        reply = connection.getresponse()
        return reply.status, reply.getheader("Content-Type"), reply.read()

    def get(self, path: str) -> np.ndarray:
        """A picture as OpenCV orders its channels."""
        status, _, body = self.ask("GET", path)
        assert status == 200, body
        return cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_UNCHANGED)

    def facts(self, method: str = "GET", path: str = "facts", body: bytes | None = None) -> dict[str, Any]:
        status, _, text = self.ask(method, path, body)
        assert status == 200, text
        return json.loads(text)

    def prepare(self, **drawn: object) -> list[str]:
        return self.facts("POST", "prepare", json.dumps(NOTHING | drawn).encode())["lines"]

    def refused(self, method: str, path: str, body: bytes | None = None) -> str:
        status, _, text = self.ask(method, path, body)
        assert status == 400, text
        return text.decode()


@pytest.fixture
def folder(tmp_path) -> Path:
    """A source of nine frames whose texture moves by two pixels a frame, and its first frame, edited."""
    rng = np.random.default_rng(0)
    large = cv2.GaussianBlur(rng.integers(0, 256, (80, 120, 3)).astype(np.uint8), (0, 0), 1.5)
    video = np.stack([large[:64, 2 * frame : 2 * frame + 96] for frame in range(9)])
    write_images(tmp_path / "source", video)
    edited = video[0].copy()
    edited[20:32, 24:40] = 255 - edited[20:32, 24:40]
    write_png(tmp_path / "edited.png", edited)
    return tmp_path


@pytest.fixture
def browser(folder) -> Iterator[Browser]:
    with PageServer(Request(folder / "source", folder / "job"), 0) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield Browser(server)
        server.shutdown()


def layer(shape: np.ndarray) -> bytes:
    """What a canvas sends: white paint on nothing."""
    white = np.full((*shape.shape, 3), 255, np.uint8)
    return cv2.imencode(".png", np.dstack([white, shape.astype(np.uint8) * 255]))[1].tobytes()


def square(top: int, left: int, size: int) -> np.ndarray:
    shape = np.zeros((64, 96), bool)
    shape[top : top + size, left : left + size] = True
    return shape


def masks(job: Path) -> np.ndarray:
    return np.stack([read_image(path)[..., 0] for path in sorted((job / "mask").iterdir())])


def test_frames_are_shown_and_saved_as_they_are(browser, folder):
    status, kind, body = browser.ask("GET", "")
    assert (status, kind) == (200, "text/html; charset=utf-8")
    assert b"<canvas" in body
    assert b"http" not in body  # nothing is loaded from elsewhere
    facts = browser.facts()
    assert (facts["size"], facts["total"], facts["frames"]) == ([96, 64], 9, list(range(9)))
    truth = cv2.cvtColor(read_image(folder / "source" / "00003.png"), cv2.COLOR_RGB2BGR)
    assert np.array_equal(browser.get("picture/3"), truth)
    assert np.abs(browser.get("frame/3").astype(int) - truth).mean() < 6
    assert not (folder / "job").exists()


def test_a_drawn_job_is_that_of_the_command_line(browser, folder):
    data = (folder / "edited.png").read_bytes()
    facts = browser.facts("PUT", "edited/0?name=my%20edit.png", data)
    assert facts["edited"] == {"0": "edited_00000_my_edit.png"}
    assert np.abs(browser.get("edited/0")[..., ::-1].astype(int) - read_image(folder / "edited.png")).mean() < 8
    lines = browser.prepare(boxes={0: BOX, 4: (30, 16, 24, 20)}, margin=0.2, caption=" a wall ", edited_caption="a 'hole'")
    typed = re.fullmatch(r"as typed  prepare\.py (.*)", lines[-1])[1]
    asked = Request(
        folder / "source", folder / "again", edited={0: folder / "job" / "edited_00000_my_edit.png"},
        boxes={0: BOX, 4: (30, 16, 24, 20)}, margin=0.2, caption="a wall", edited_caption="a 'hole'",
    )  # fmt: skip
    prepare(asked)
    assert np.array_equal(masks(folder / "job"), masks(folder / "again"))
    drawn, called = (load_job(folder / name / "job.toml", Grid()) for name in ("job", "again"))
    for job in (drawn, called):
        assert (job.caption, job.first_edit.caption) == ("a wall", "a 'hole'")
    assert np.array_equal(drawn.first_edit.image, called.first_edit.image)
    words = subprocess.run(["sh", "-c", f"printf '%s\\n' {typed}"], capture_output=True, text=True, check=True).stdout
    assert words.splitlines() == replace(asked, out=folder / "job").arguments()


def test_the_call_as_typed_is_the_request(folder):
    """Every field, each with another value than its default."""
    request = Request(
        Path("a clip.mp4"), Path("job"), edited={0: Path("e.png"), 8: Path("f:1.png")}, pictures=(4, 8),
        boxes={4: (1, 2, 3, 4)}, painted={8: Path("p.png")}, sam=Path("sam"), clicks={0: ((1, 2), (3, 4)), 4: ((5, 6),)},
        background={0: ((7, 8),)}, margin=0.25, start=3, every=2, frames=13, caption="a b", edited_caption="c",
        captioner=Path("vlm"), model="hunyuan-video", ckpt=Path("weights"), overwrite=True,
    )  # fmt: skip
    plain = Request(request.source, request.out)
    assert {name for name in vars(plain) if getattr(plain, name) == getattr(request, name)} == {"source", "out"}
    for asked in (request, plain):
        read = verb._request(verb._parser().parse_args(asked.arguments()))
        assert replace(read, pictures=tuple(read.pictures)) == asked


def test_masks_are_mended_frame_by_frame(browser, folder):
    browser.prepare(boxes={0: BOX})
    made = masks(folder / "job")
    assert np.array_equal(browser.get("mask/5")[..., 3], made[5])
    assert browser.facts()["by_hand"] == []
    mended = (made[5] > 0) | square(40, 60, 12)
    assert browser.facts("PUT", "mask/5", layer(mended))["by_hand"] == [5]
    browser.prepare(boxes={0: BOX}, margin=0.5)
    kept = masks(folder / "job")
    assert np.array_equal(kept[5] > 0, mended)
    assert (kept[4] > 0).sum() > (made[4] > 0).sum()
    assert not browser.facts("DELETE", "mask/5")["masks"]
    browser.prepare(boxes={0: BOX})
    assert np.array_equal(masks(folder / "job"), made)
    assert browser.facts()["masks"]


def test_a_painted_shape_is_a_region_until_it_is_erased(browser, folder):
    shape = square(16, 20, 22)
    assert browser.facts("PUT", "painted/0", layer(shape))["painted"] == [0]
    assert np.array_equal(browser.get("painted/0")[..., 3] > 0, shape)
    browser.prepare()
    assert (masks(folder / "job")[0][shape] == 255).all()
    assert browser.facts("PUT", "painted/0", layer(shape & False))["painted"] == []
    assert any(line.startswith("next      edit ") for line in browser.prepare())
    browser.facts("PUT", "painted/4", layer(np.ones_like(shape)))
    assert browser.facts("DELETE", "painted/4")["painted"] == []


def test_an_edited_picture_can_be_replaced_and_removed(browser, folder):
    data = (folder / "edited.png").read_bytes()
    browser.facts("PUT", "edited/0?name=one.png", data)
    facts = browser.facts("PUT", "edited/0?name=../../two.PNG", data)
    assert facts["edited"] == {"0": "edited_00000_two.png"}
    assert {path.name for path in (folder / "job").iterdir()} == {"edited_00000_one.png", "edited_00000_two.png"}
    assert browser.facts("DELETE", "edited/0")["edited"] == {}


def test_another_part_of_the_source_can_be_taken(browser, folder):
    """What was drawn in and brought for the one before is gone, its files are not."""
    browser.facts("PUT", "edited/0?name=one.png", (folder / "edited.png").read_bytes())
    browser.facts("PUT", "painted/0", layer(square(16, 20, 22)))
    browser.prepare(boxes={4: BOX})
    for cut, frames in (({"start": 4, "every": 1, "frames": None}, [4, 5, 6, 7, 8]),
                        ({"start": 0, "every": 2, "frames": 5}, [0, 2, 4, 6, 8])):  # fmt: skip
        facts = browser.facts("POST", "clip", json.dumps(cut).encode())
        assert (facts["frames"], facts["every"], facts["length"]) == (frames, cut["every"], cut["frames"])
        assert not any(facts[given] for given in ("edited", "painted", "boxes"))
    assert np.array_equal(browser.get("picture/3")[..., ::-1], read_image(folder / "source" / "00006.png"))
    assert {"edited_00000_one.png", "painted_00000.png"} <= {path.name for path in (folder / "job").iterdir()}
    assert "expected at least 9" in browser.refused("POST", "clip", b'{"start": 4, "every": 1, "frames": 9}')
    assert "--every 0: must be 1 or more" in browser.refused("POST", "clip", b'{"start": 0, "every": 0, "frames": 5}')
    assert browser.facts() == facts
    browser.prepare(boxes={0: BOX})
    assert "every = 2" in (folder / "job" / "job.toml").read_text()


def test_what_cannot_be_is_told_and_changes_nothing(browser, folder):
    before = browser.facts()
    write_png(folder / "tall.png", np.zeros((96, 64, 3), np.uint8))
    tall = (folder / "tall.png").read_bytes()
    assert "edited_00000_tall.png: is 64x96, expected 96x64" in browser.refused("PUT", "edited/0?name=tall.png", tall)
    assert "is not a picture" in browser.refused("PUT", "edited/0?name=words.txt", b"words")
    assert "unreadable or truncated" in browser.refused("PUT", "edited/0?name=half.png", tall[:40])
    assert "the clip has frames 0 to 8" in browser.refused("PUT", "edited/9?name=a.png", tall)
    assert "the clip has frames 0 to 8" in browser.refused("GET", "frame/9")
    assert "64x96" in browser.refused("PUT", "painted/0", layer(np.ones((96, 64), bool)))
    assert "64x96" in browser.refused("PUT", "mask/0", layer(np.ones((96, 64), bool)))
    assert "has no edited picture" in browser.refused("GET", "edited/0")
    assert "mask" in browser.refused("GET", "mask/0")
    assert "Reload it" in browser.refused("POST", "prepare", b"{}")
    outside = json.dumps(NOTHING | {"boxes": {0: [500, 500, 5, 5]}}).encode()
    assert "marks nothing inside the picture" in browser.refused("POST", "prepare", outside)
    clicks = json.dumps(NOTHING | {"clicks": {0: [[5, 5]]}}).encode()
    assert "there is no --sam" in browser.refused("POST", "prepare", clicks)
    assert browser.facts() | {"boxes": {}, "clicks": {}} == before
    assert not (folder / "job").exists()


def test_nobody_else_gets_in(browser):
    """Neither without the secret, nor from another machine."""
    secret, address = browser.server.secret, urlsplit(browser.server.address)
    assert len(secret) >= 20
    assert browser.server.server_address[0] == "127.0.0.1"
    for path in ("/", "/facts", f"/{secret}x/facts", f"/{secret}/../facts", f"/{secret}/facts/x", f"/{secret}/nothing"):
        connection = http.client.HTTPConnection(address.netloc, timeout=60)
        connection.request("GET", path)
        reply = connection.getresponse()
        assert reply.status == 404, path
        assert secret.encode() not in reply.read()


def test_a_port_that_is_taken_is_told(browser, folder):
    port = browser.server.server_port
    with pytest.raises(UserError, match=rf"--page {port}: this port cannot be used .* --page 0"):
        PageServer(Request(folder / "source", folder / "other"), port)


def test_the_verb_serves_until_it_is_interrupted(folder):
    words = ["prepare.py", "--source", str(folder / "source"), "--out", str(folder / "job"), "--caption", "a wall"]
    process = subprocess.Popen([sys.executable, *words, "--page", "0"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        address = re.fullmatch(r"page +(http://127\.0\.0\.1:\d+/\S+/)\n", process.stdout.readline())[1]
        place = urlsplit(address)
        connection = http.client.HTTPConnection(place.netloc, timeout=60)
        connection.request("GET", place.path + "facts")
        assert json.loads(connection.getresponse().read())["caption"] == "a wall"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[0].endswith(f"as typed  {' '.join(words[:-1])} 'a wall'\n")
        assert process.returncode == 0
    finally:
        process.kill()


def test_the_script_draws_in_a_browser(browser, tmp_path):
    shown = document_of(browser.server.address, tmp_path / "profile", "--virtual-time-budget=5000")
    assert "9 of 9 frames, 16 a second, 96×64" in shown
    assert 'width="96" height="64"' in shown
