"""The download against a real HTTP server that misbehaves."""

import hashlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from qdense.data.download import download, git_blob_id
from qdense.errors import DataError

CONTENT = bytes(range(256)) * 2000
BLOB = hashlib.sha1(b"blob %d\0" % len(CONTENT) + CONTENT).hexdigest()


class _Server:
    """Serves CONTENT; `faults` holds one fault for each request to come."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.ranges: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.ranges.append(self.headers.get("Range"))
                fault = outer.faults.pop(0) if outer.faults else ""
                if fault.isdigit():
                    self.send_error(int(fault))
                    return
                if fault.startswith("to "):
                    self.send_response(302)
                    self.send_header("Location", fault[3:])
                    self.end_headers()
                    return
                start = int(self.headers["Range"][6:-1]) if self.headers.get("Range") and fault != "no-ranges" else 0
                body = CONTENT[start:]
                if fault == "corrupt":
                    body = body[:-1] + b"!"
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if fault in ("truncate", "stall"):
                    self.wfile.write(body[: len(body) // 2])
                    self.wfile.flush()
                    if fault == "stall":
                        time.sleep(1.5)
                    return
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/file.json"


@pytest.fixture
def server():
    server = _Server()
    yield server
    server.server.shutdown()
    server.server.server_close()


def fetch(server, target, **options):
    download(server.url, target, BLOB, **({"pause_seconds": 0.01, "timeout_seconds": 0.5} | options))


def test_a_good_file_arrives_with_progress(server, tmp_path):
    seen = []
    fetch(server, tmp_path / "x", progress=lambda done, total: seen.append((done, total)))
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert git_blob_id(tmp_path / "x") == BLOB
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert len(seen) > 3
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("fault", ["truncate", "stall"])
def test_a_broken_connection_goes_on_where_it_stopped(server, tmp_path, fault):
    server.faults = [fault]
    fetch(server, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert server.ranges == [None, f"bytes={len(CONTENT) // 2}-"]


def test_a_later_call_goes_on_too(server, tmp_path):
    server.faults = ["truncate"]
    with pytest.raises(DataError, match="ended after 256,000 of 512,000 bytes"):
        fetch(server, tmp_path / "x", num_attempts=1)
    assert not (tmp_path / "x").exists()
    fetch(server, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == CONTENT


def test_a_server_without_ranges_starts_over(server, tmp_path):
    server.faults = ["truncate", "no-ranges"]
    fetch(server, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == CONTENT


def test_corruption_is_thrown_away_and_fetched_once_more(server, tmp_path):
    server.faults = ["corrupt"]
    fetch(server, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == CONTENT
    server.faults = ["corrupt"] * 9
    with pytest.raises(DataError, match="its bytes are not the expected ones"):
        fetch(server, tmp_path / "y")
    assert not list(tmp_path.glob("y*"))
    assert len(server.faults) == 7  # twice, no more


def test_a_404_is_final_and_a_500_is_tried_again(server, tmp_path):
    server.faults = ["404", "404"]
    with pytest.raises(DataError, match=r"HTTP status 404.*put it at"):
        fetch(server, tmp_path / "x")
    assert server.faults == ["404"]
    server.faults = ["500", "503"]
    fetch(server, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == CONTENT


def test_a_server_that_always_stalls_is_given_up(server, tmp_path):
    server.faults = ["stall"] * 9
    with pytest.raises(DataError, match=r"no data for 0.2 s"):
        fetch(server, tmp_path / "x", timeout_seconds=0.2, num_attempts=2)


def test_nobody_there(tmp_path):
    with pytest.raises(DataError, match=r"refused|failed"):
        download("http://127.0.0.1:9/x", tmp_path / "x", BLOB, pause_seconds=0.01)


def test_a_full_disk_is_reported_before_it_is_full(server, tmp_path, monkeypatch):
    from qdense.errors import QDenseError

    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(QDenseError, match="not enough disk space"):
        fetch(server, tmp_path / "x")


def test_a_redirection_is_followed_and_one_without_end_is_given_up(server, tmp_path):
    server.faults = [f"to {server.url}?moved"]
    fetch(server, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == CONTENT
    server.faults = [f"to {server.url}"] * 100
    with pytest.raises(DataError, match=r"302"):
        fetch(server, tmp_path / "y")
    assert not (tmp_path / "y").exists()


def test_a_redirection_out_of_http_is_refused(server, tmp_path):
    (tmp_path / "secret").write_bytes(CONTENT)
    server.faults = [f"to file://{tmp_path / 'secret'}"] * 9
    with pytest.raises(DataError, match=r"failed: "):
        fetch(server, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_disk_that_fills_up_meanwhile_leaves_no_bad_file(server, tmp_path, monkeypatch):
    """What has arrived is kept as a part, and a later call continues it."""
    from pathlib import Path

    opened = Path.open

    class Full:
        def __init__(self, stream):
            self.stream, self.room = stream, 100_000

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            self.stream.close()

        def write(self, block):
            self.room -= len(block)
            if self.room < 0:
                raise OSError(28, "No space left on device")
            return self.stream.write(block)

    def open_(self, mode="r", *args, **kwargs):
        stream = opened(self, mode, *args, **kwargs)
        return Full(stream) if self.suffix == ".part" and mode in ("ab", "wb") else stream

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_)
        with pytest.raises(OSError, match="No space left"):
            fetch(server, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    assert 0 < (tmp_path / "x.part").stat().st_size < len(CONTENT)
    fetch(server, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert server.ranges[-1] is not None
