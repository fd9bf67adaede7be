"""Files of the Hugging Face hub, or of any address: downloaded once, and checked on every use."""

import os
import re
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import huggingface_hub
import torch

from common.errors import UserError, first_line, reading
from common.files import locked, sha256, write_atomic

ADDRESS = re.compile(r"https://huggingface\.co/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
RUN = re.compile(r"hf://(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?")
RUN_FILES = ("args.json", "checkpoint.pt", "cloned.pt")  # of a run on the hub nothing else is read


def obtain(path: Path, url: str, otherwise: str, known: str | None = None) -> Path:
    """`path`, downloaded from `url` if it is missing, and checked as `check_digest` does.

    From the hub a dropped connection is taken up again; what fails leaves nothing. Raises UserError without a network,
    with `otherwise` as the remedy besides placing the file by hand.
    """
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=path.parent, prefix=path.name) as folder:
                file = _download(url, Path(folder))
                if known and sha256(file) != known:
                    raise OSError("its sha256 is not the expected one")
                os.replace(file, path)
        except Exception as error:  # hub, network and disk each have exceptions of their own
            file = f"the file (sha256 {known[:12]}...)" if known else "the file"
            raise UserError(
                f"cannot download {url} ({first_line(error)}); put {file} at {path} by hand, or {otherwise}"
            ) from error
    return check_digest(path, known)


def _download(url: str, folder: Path) -> Path:
    """The file of `url`, in a folder. Raises what hub and network do."""
    if not (hub := ADDRESS.fullmatch(url)):
        torch.hub.download_url_to_file(url, str(folder / "file"), progress=False)
        return folder / "file"
    dataset, repository, revision, name = hub.groups()
    where = {"repo_type": "dataset" if dataset else "model", "revision": revision}
    # Without a network this fails at once, where the download tries for long.
    huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repository, name, **where))
    return Path(huggingface_hub.hf_hub_download(repository, name, local_dir=folder, **where))


def obtain_run(name: str, data_dir: Path) -> Path:
    """The folder of a run: `name`, or the copy of hf://owner/name[@revision] in data_dir/hub, downloaded once.

    Raises UserError on another address, a repository without a run, and where the hub gives nothing.
    """
    if not name.startswith("hf://"):
        return Path(name)
    if not (found := RUN.fullmatch(name)):
        raise UserError(f"{name} is no address of a run on the hub; give hf://owner/name or hf://owner/name@revision")
    repository, revision = found.groups()
    folder = data_dir / "hub" / (repository + (f"@{revision.replace('/', '-')}" if revision else ""))
    if folder.is_dir():
        return folder
    try:
        with (
            locked(folder.with_name(f".{folder.name}.lock")),  # several processes of one command
            TemporaryDirectory(dir=folder.parent, prefix=".") as temp,
        ):
            if not folder.is_dir():
                new = Path(temp) / "run"
                huggingface_hub.snapshot_download(
                    repository, revision=revision, local_dir=new, allow_patterns=list(RUN_FILES)
                )
                if missing := [file for file in RUN_FILES[:2] if not (new / file).is_file()]:
                    raise UserError(f"{name} is no run: it has no {missing[0]}; share one with python -m tools.share")
                os.replace(new, folder)
                print(f"{name} is now in {folder}; delete that to download it again", flush=True)
    except UserError:
        raise
    except Exception as error:  # hub, network and disk each have exceptions of their own
        raise UserError(
            f"cannot download {name} ({first_line(error)}); check the name, the network and, for a private one, the "
            "token (hf auth login), or give a folder"
        ) from error
    return folder


def digest_file(path: Path) -> Path:
    """Where the sha256 of `path` stands."""
    return path.with_name(path.name + ".sha256")


def check_digest(path: Path, known: str | None = None) -> Path:
    """`path`, if its sha256 is `known`.

    Where that is None, the file's own is written beside it (NAME.sha256) on first use and compared later: damage
    and change after the download are noticed, the download itself is trusted. A folder that cannot be written is left
    as it is. Raises UserError if it differs.
    """
    with reading(path, "check its permissions"):
        digest, manifest = sha256(path), digest_file(path)
        if known is None and not manifest.exists():
            with suppress(OSError):
                write_atomic(manifest, f"{digest}  {path.name}\n".encode())
            known = digest
        expected = known or (manifest.read_text(errors="replace").split() or ["nothing"])[0]
    if digest != expected:
        why = "it is damaged" if known else "it has changed since its first use"
        also = "" if known else f" and {manifest.name}"
        raise UserError(
            f"{path} has sha256 {digest[:12]}..., not {expected[:12]}...: {why}; delete it{also} to download it again"
        )
    return path
