"""Files of the Hugging Face hub: downloaded once, and checked on every use."""

import os
import re
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import huggingface_hub

from common.errors import UserError, first_line
from common.files import sha256, write_atomic

ADDRESS = re.compile(r"https://huggingface\.co/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


def obtain(path: Path, url: str, otherwise: str, known: str | None = None) -> Path:
    """`path`, downloaded from the hub's `url` if it is missing, and checked as `check_digest` does.

    Raises UserError without a network, with `otherwise` as the remedy besides placing the file by hand.
    """
    if not path.is_file():
        try:
            _download(path, url, known)
        except Exception as error:  # hub, network and disk each have exceptions of their own
            file = f"the file (sha256 {known[:12]}...)" if known else "the file"
            raise UserError(
                f"cannot download {url} ({first_line(error)}); put {file} at {path} by hand, or {otherwise}"
            ) from error
    return check_digest(path, known)


def check_digest(path: Path, known: str | None = None) -> Path:
    """`path`, if its sha256 is `known`.

    Where that is None, the file's own is written beside it (NAME.sha256) on first use and compared later: damage
    and change after the download are noticed, the download itself is trusted. Raises UserError if it differs.
    """
    digest = sha256(path)
    manifest = path.with_name(path.name + ".sha256")
    if known is None and not manifest.exists():
        with suppress(OSError):  # a folder that cannot be written: each use is the first
            write_atomic(manifest, f"{digest}  {path.name}\n".encode())
        return path
    expected = known or (manifest.read_text().split() or ["nothing"])[0]
    if digest != expected:
        why = "it is damaged" if known else "it has changed since its first use"
        also = "" if known else f" and {manifest.name}"
        raise UserError(
            f"{path} has sha256 {digest[:12]}..., not {expected[:12]}...: {why}; delete it{also} to download it again"
        )
    return path


def _download(path: Path, url: str, known: str | None) -> None:
    """The file at `path`, whole and as its sha256 says, or nothing. A dropped connection is taken up again."""
    dataset, repository, revision, name = ADDRESS.fullmatch(url).groups()
    where = {"repo_type": "dataset" if dataset else "model", "revision": revision}
    # Without a network this fails at once, where the download tries for long.
    huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repository, name, **where))
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=path.name) as folder:
        file = Path(huggingface_hub.hf_hub_download(repository, name, local_dir=folder, **where))
        if known and sha256(file) != known:
            raise OSError("its sha256 is not the expected one")
        os.replace(file, path)
