"""Published weights: each URL is fetched once, checked, and kept under its whole name.

A file of the Hugging Face hub is kept where that library keeps it, by repository and revision, and
must have the SHA-256 that the hub states. Other files lie in the cache folder, in folders named as
their URL, and must begin with the hash that their name carries, as in resnet152-394f9c45.pth.
"""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen
from uuid import uuid4

from features.datasets.sample import cache_folder
from features.errors import BackboneError
from features.files import filename

HUB = re.compile(r"(https?://[^/]+)/([^/]+/[^/]+)/resolve/([^/]+)/([^?]+)")
# Hexadecimal digits before the suffix: of the SHA-256, or the MD5 (segment-anything's files).
NAMED = re.compile(r"[-_]([0-9a-f]{6,64})\.\w+$")


def fetch(url: str, name: str) -> Path:
    """Return the file of a URL, after fetching it the first time.

    Raises BackboneError where it can't be fetched or is not the file that was published, saying
    which file to get, from where, and which option takes it.
    """
    try:
        if hub := HUB.fullmatch(url):
            return _from_hub(*hub.groups())
        return _from_server(url)
    except OSError as error:
        last = url.rsplit("/", 1)[1]
        raise BackboneError(
            f"{name}'s published weights can't be fetched ({error}). Get {last} from {url} "
            f"and give it with --weights FILE"
        ) from None


def cached(url: str) -> Path:
    """Return where the file of a URL is kept: every part of the URL is in it."""
    parts = urlsplit(url)
    names = [parts.netloc, *parts.path.strip("/").split("/")]
    if parts.query:
        names[-1] = f"{parts.query}-{names[-1]}"
    return Path(cache_folder(), "weights", *map(filename, names))


def _from_server(url: str) -> Path:
    import torch

    file = cached(url)
    if file.is_file():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{uuid4().hex}.part")
    try:
        torch.hub.download_url_to_file(url, str(part), progress=sys.stderr.isatty())
        with urlopen(Request(url, method="HEAD")) as answer:  # half a file is no error above
            size = int(answer.headers.get("Content-Length") or part.stat().st_size)
        if part.stat().st_size != size:
            raise OSError(f"{part.stat().st_size} of {size} bytes came")
        if named := NAMED.search(file.name):
            _check(part, url, named[1])
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    return file


def _from_hub(endpoint: str, repository: str, revision: str, path: str) -> Path:
    from huggingface_hub import hf_hub_download

    file = Path(hf_hub_download(repository, path, revision=unquote(revision), endpoint=endpoint))
    blob = file.resolve()  # named by what the hub states: for large files the SHA-256
    if len(blob.name) == 64 and not (checked := blob.with_name(f"{blob.name}.checked")).exists():
        _check(blob, f"{endpoint}/{repository}", blob.name)
        checked.touch()
    return file


def _check(file: Path, source: str, wanted: str) -> None:
    """Raise BackboneError, and remove the file, unless a hash of it begins as it should."""
    digests = []
    for algorithm in ("sha256", "md5"):
        with file.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, algorithm).hexdigest())
    if not any(digest.startswith(wanted) for digest in digests):
        file.unlink()
        raise BackboneError(
            f"{source} sent another file than was published (SHA-256 {digests[0]}, "
            f"MD5 {digests[1]}; wanted {wanted}): nothing was kept. Try again, or give a file with "
            "--weights FILE"
        )
