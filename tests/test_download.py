"""common/download against a hub of this machine: what the library asks, answered as the hub answers it."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants, file_download

from common.download import check_digest, obtain
from common.errors import UserError

URL = "https://huggingface.co/datasets/owner/name/resolve/main/folder/file.bin"
CONTENT = bytes(range(256)) * 100


class Hub(BaseHTTPRequestHandler):
    """One file; the connection drops after so many bytes."""

    asked: list[tuple[str, str, str | None]]
    sent_at_once = len(CONTENT)

    def do_HEAD(self) -> None:
        self.answer(b"")

    def do_GET(self) -> None:
        self.answer(CONTENT)

    def answer(self, body: bytes) -> None:
        wanted = self.headers.get("Range")
        self.asked.append((self.command, self.path, wanted))
        if self.path != "/datasets/owner/name/resolve/main/folder/file.bin":
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        self.send_response(206 if start else 200)
        self.send_header("ETag", '"' + hashlib.sha256(CONTENT).hexdigest() + '"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        self.wfile.write(body[start : start + self.sent_at_once])

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    handler = type("OneHub", (Hub,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", place)
    template = place + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield handler
    server.shutdown()
    server.server_close()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_obtain_downloads_once_and_notices_changes(tmp_path: Path, hub: type[Hub]) -> None:
    path = tmp_path / "cache" / "mine.bin"
    assert obtain(path, URL, "do without") == path and path.read_bytes() == CONTENT
    asked = len(hub.asked)
    assert obtain(path, URL, "do without") == path and len(hub.asked) == asked
    assert names(path.parent) == {"mine.bin", "mine.bin.sha256"}
    path.write_bytes(CONTENT + b"x")
    with pytest.raises(UserError, match=r"has changed since its first use; delete it and mine.bin.sha256"):
        obtain(path, URL, "do without")


def test_obtain_takes_up_a_dropped_connection(tmp_path: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.sent_at_once = 10_000
    assert obtain(tmp_path / "mine.bin", URL, "do without").read_bytes() == CONTENT
    starts = [wanted for command, _, wanted in hub.asked if command == "GET"]
    assert starts == [None, "bytes=10000-", "bytes=20000-"]
    assert names(tmp_path) == {"mine.bin", "mine.bin.sha256"}


def test_obtain_leaves_nothing_of_a_download_that_fails(
    tmp_path: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    hub.sent_at_once = 0
    with pytest.raises(UserError, match="cannot download"):
        obtain(tmp_path / "mine.bin", URL, "do without")
    assert not names(tmp_path)


def test_obtain_takes_a_file_placed_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "mine.bin"
    path.write_bytes(b"by hand")
    digest = hashlib.sha256(b"by hand").hexdigest()
    assert obtain(path, URL, "do without", digest) == path and names(tmp_path) == {"mine.bin"}
    with pytest.raises(UserError, match=r"not 000000000000\.\.\.: it is damaged; delete it to download it again"):
        obtain(path, URL, "do without", "0" * 64)


def test_obtain_refuses_a_file_with_another_digest(tmp_path: Path, hub: type[Hub]) -> None:
    with pytest.raises(UserError, match=r"its sha256 is not the expected one\); put the file \(sha256 0000"):
        obtain(tmp_path / "mine.bin", URL, "do without", "0" * 64)
    assert not names(tmp_path)
    assert obtain(tmp_path / "mine.bin", URL, "", hashlib.sha256(CONTENT).hexdigest()).read_bytes() == CONTENT


def test_obtain_says_what_to_do_where_nothing_is_to_be_had(
    tmp_path: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(url: str) -> str:
        with pytest.raises(UserError, match=rf"cannot download {url} \(.*\); put the file at .*/x by hand") as caught:
            obtain(tmp_path / "x", url, "do without")
        assert "\n" not in str(caught.value) and str(caught.value).endswith("or do without")
        return str(caught.value)

    assert "404" in refusal(URL + "2")
    monkeypatch.setattr(
        huggingface_hub, "get_hf_file_metadata", lambda url: (_ for _ in ()).throw(OSError("no such host"))
    )
    assert "no such host" in refusal(URL)
    assert not names(tmp_path)


def test_check_digest_records_the_first_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.bin"
    path.write_bytes(b"a")
    assert check_digest(path) == check_digest(path) == path
    assert (tmp_path / "mine.bin.sha256").read_text() == f"{hashlib.sha256(b'a').hexdigest()}  mine.bin\n"
    path.write_bytes(b"b")
    with pytest.raises(UserError, match="has changed since its first use"):
        check_digest(path)


def test_a_file_of_any_address_is_fetched_once_and_checked(hub: type[Hub], tmp_path: Path) -> None:
    digest, path = hashlib.sha256(CONTENT).hexdigest(), tmp_path / "new" / "file.bin"
    url = f"{constants.ENDPOINT}/datasets/owner/name/resolve/main/folder/file.bin"
    assert obtain(path, url, "give it up", digest).read_bytes() == CONTENT
    asked = len(hub.asked)
    assert obtain(path, url, "give it up", digest) == path and len(hub.asked) == asked
    for wrong, known in ((url, "0" * 64), (url + "x", digest)):
        with pytest.raises(UserError, match="by hand, or give it up"):
            obtain(tmp_path / "other" / "file.bin", wrong, "give it up", known)
        assert not [p for p in (tmp_path / "other").rglob("*") if p.is_file()]
