"""Image URLs against a web server on this machine: never fetched unless asked for."""

import http.server
import io
import json
import re
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from finecap_ray.errors import DataError
from finecap_ray.sources.found import MISSING_FILE
from finecap_ray.sources.importer import import_examples
from finecap_ray.sources.urls import NO_WEB_ADDRESS, NOT_ANSWERED, NOT_FETCHED, TOO_LARGE, Fetching, fetch


def picture(seed):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


PAGES = {"/a.png": picture(0), "/b.png": picture(1), "/page.png": b"<html>no picture</html>", "/large.png": b"x" * 5000}
PAGES["/caf%C3%A9%20(1).png?at=%C3%A9&to=%2F"] = picture(2)


@pytest.fixture
def server():
    """Its address, and the paths that were asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path == "/redirect":
                self.send_response(302)
                self.send_header("Location", "file:///etc/hostname")
            else:
                self.send_response(200 if self.path in PAGES else 404)
            self.end_headers()
            self.wfile.write(PAGES.get(self.path, b""))

        def log_message(self, *_):
            pass

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{web.server_port}", asked
    web.shutdown()
    web.server_close()


def test_fetch_says_why_there_is_no_image(server, tmp_path):
    address, _ = server
    fetching = Fetching(timeout_s=10, max_bytes=4000)
    assert fetch(f"{address}/a.png", fetching) == (PAGES["/a.png"], None)
    assert fetch(f"{address}/gone.png", fetching) == (b"", NOT_ANSWERED)
    assert fetch(f"{address}/large.png", fetching) == (b"", TOO_LARGE)
    assert fetch(f"{address}/redirect", fetching) == (b"", NOT_ANSWERED)  # no way to a local file
    assert fetch("http://127.0.0.1:1/a.png", fetching) == (b"", NOT_ANSWERED)
    assert fetch("http://[/", fetching) == (b"", NOT_ANSWERED)
    assert fetch(f"{address}/\ud800.png", fetching) == (b"", NOT_ANSWERED)  # half of a character
    secret = tmp_path / "secret"
    secret.write_bytes(b"local")
    assert fetch(f"file://{secret}", fetching) == (b"", NO_WEB_ADDRESS)


@pytest.mark.parametrize("name", ["café (1).png?at=é&to=%2F", "caf%C3%A9%20(1).png?at=%C3%A9&to=%2F#part"])
def test_an_address_is_quoted_as_far_as_it_is_not_yet(server, name):
    address, _ = server
    fetching = Fetching(timeout_s=10, max_bytes=4000)
    assert fetch(f"{address}/{name}", fetching) == (picture(2), None)


def test_urls_are_fetched_when_asked_for_and_never_otherwise(ray_session, server, tmp_path):
    address, asked = server
    names = ["a", "b", "page", "gone"]
    rows = {"image_id": [*names, None], "url": [f"{address}/{name}.png" for name in [*names, "a"]]}
    pq.write_table(pa.table(rows), tmp_path / "in.parquet")
    entries = [
        {"id": 1, "file_name": "here.png", "coco_url": f"{address}/a.png"},
        {"id": 2, "file_name": "gone.png", "coco_url": f"{address}/b.png"},
    ]
    (tmp_path / "here.png").write_bytes(picture(7))
    (tmp_path / "coco.json").write_text(json.dumps({"images": entries, "annotations": []}))

    def run(source, out, fetching):
        options = {"format": "auto", "longest_side": None, "jpeg_quality": 90, "split": "train", "max_bad_fraction": 1}
        return import_examples(str(tmp_path / source), str(tmp_path / out), **options, fetching=fetching)

    fetching = Fetching(timeout_s=10, max_bytes=4000)
    assert run("coco.json", "1", None).left_out == {MISSING_FILE: 1}
    assert not asked
    assert run("coco.json", "2", fetching).examples == 2
    assert asked == ["/b.png"]  # the other one lies here
    with pytest.raises(DataError, match=rf"'{re.escape(NOT_FETCHED)}': 4, 'row without an image_id': 1"):
        run("in.parquet", "3", None)
    report = run("in.parquet", "4", fetching)
    assert report.examples == 2
    assert report.left_out == {NOT_ANSWERED: 1, "can't be opened as an image": 1, "row without an image_id": 1}
