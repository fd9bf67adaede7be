"""Large files: downloaded once, in pieces and with a progress bar, and checked on every use."""

import http.client
import urllib.request
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from common.errors import UserError, first_line
from common.files import replacing, sha256, write_atomic


def obtain(path: Path, url: str, otherwise: str, known: str | None = None) -> Path:
    """`path`, downloaded from `url` if it is missing, and checked as `check_digest` does.

    Raises UserError without a network, with `otherwise` as the remedy besides placing the file by hand.
    """
    if not path.is_file():
        _download(url, path, otherwise, known)
    return check_digest(path, known)


def check_digest(path: Path, known: str | None = None) -> Path:
    """`path`, if its sha256 is `known`.

    Where that is None, the file's own is written beside it (NAME.sha256) on first use and compared later: damage
    and change after the download are noticed, the download itself is trusted. Raises UserError if it differs.
    """
    digest = sha256(path)
    manifest = path.with_name(path.name + ".sha256")
    if known is None and not manifest.exists():
        write_atomic(manifest, f"{digest}  {path.name}\n".encode())
    expected = known or (manifest.read_text().split() or ["nothing"])[0]
    if digest != expected:
        why = "it is damaged" if known else "it has changed since its first use"
        also = "" if known else f" and {manifest.name}"
        raise UserError(
            f"{path} has sha256 {digest[:12]}..., not {expected[:12]}...: {why}; delete it{also} to download it again"
        )
    return path


def _download(url: str, path: Path, otherwise: str, known: str | None) -> None:
    """Downloads `url` to `path`, whole and as its sha256 says, or not at all."""
    try:
        with replacing(path) as temp:
            with open(temp, "wb") as file:
                stream(url, file, path.name)
            if known and sha256(temp) != known:
                raise OSError("its sha256 is not the expected one")
    except (OSError, http.client.HTTPException) as error:
        file = f"the file (sha256 {known[:12]}...)" if known else "the file"
        raise UserError(
            f"cannot download {url} ({first_line(error)}); put {file} at {path} by hand, or {otherwise}"
        ) from error


def stream(url: str, file: BinaryIO, name: str) -> None:
    """Copies `url` to `file`; `name` labels the bar. Raises OSError or HTTPException, also if less than all arrived."""
    with urllib.request.urlopen(url, timeout=60) as response:
        size = int(response.headers.get("Content-Length", 0))
        with tqdm(total=size or None, unit="B", unit_scale=True, desc=name, leave=False) as bar:
            while block := response.read(1 << 20):
                file.write(block)
                bar.update(len(block))
        if size and file.tell() != size:
            raise OSError(f"{file.tell()} of {size} bytes arrived")
