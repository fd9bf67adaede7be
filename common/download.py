"""Large downloads, in pieces and with a progress bar."""

import urllib.request
from typing import BinaryIO

from tqdm import tqdm


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
