"""Small files, written whole or not at all; and one download."""

import hashlib
import http.client
import os
import urllib.request
from pathlib import Path

from common.errors import UserError, first_line


def write_atomic(path: Path, content: bytes) -> None:
    """Writes `content` to `path`: a kill at any instant leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temp, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(url: str, digest: str, path: Path) -> None:
    """Downloads `url` to `path`, whole or not at all.

    Raises UserError without a network, or if the content's sha256 is not `digest`; nothing is written then.
    """
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            content = response.read()
        if hashlib.sha256(content).hexdigest() != digest:
            raise OSError("its sha256 is not the expected one")
        write_atomic(path, content)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"cannot download {url} ({first_line(error)}); get this file (sha256 {digest[:12]}...) "
            f"by other means and put it at {path}, or give its place with --tokenizer-path"
        ) from error
