"""Large files of the judges: downloaded once, checked on every use."""

import http.client
import os
from pathlib import Path

from common.download import stream
from common.errors import UserError, first_line
from common.text.files import sha256, write_atomic


def obtain(path: Path, url: str, known: str | None) -> Path:
    """`path`, downloaded from `url` if it is missing, and checked against the sha256 `known`.

    Where that is None, the file's own is written beside it (NAME.sha256) on first use and compared later: damage
    and change after the download are noticed, the download itself is trusted.

    Raises UserError without a network or if the checksum differs.
    """
    if not path.is_file():
        _download(url, path)
    digest = sha256(path)
    manifest = path.with_name(path.name + ".sha256")
    if known is None and not manifest.exists():
        write_atomic(manifest, f"{digest}  {path.name}\n".encode())
    expected = known or (manifest.read_text().split() or ["nothing"])[0]
    if digest != expected:
        raise UserError(f"{path} has sha256 {digest[:12]}..., not {expected[:12]}...; delete it to download it again")
    return path


def _download(url: str, path: Path) -> None:
    """Downloads `url` to `path` in pieces, whole or not at all."""
    temp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temp, "wb") as file:
            stream(url, file, path.name)
        os.replace(temp, path)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"cannot download {url} ({first_line(error)}); put the file at {path} by hand, "
            "or choose the judge ngram or smollm2"
        ) from error
    finally:
        temp.unlink(missing_ok=True)
