"""Texts from the network: TinyStories (roneneldan/TinyStories, CDLA-Sharing-1.0) and tinyshakespeare (public domain).

TinyStories comes through huggingface_hub, with its progress bar, and stays in huggingface_hub's own cache.

    python -c "from finetune.prepare.download import tinystories; print(tinystories())"
"""

import urllib.error
import urllib.request
from pathlib import Path

from finetune.data.files import write_atomically

REPOSITORY = "roneneldan/TinyStories"
TRAIN, VALID = "TinyStories-train.txt", "TinyStories-valid.txt"  # 1.9 GB, 19 MB
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
REACH_TIMEOUT_S = 10


class Offline(ValueError):
    """The network could not be reached and the file is not in the cache."""


def tinystories(*, cached_only: bool = False) -> tuple[Path, Path]:
    """(training text, validation text). Raises Offline."""
    return fetch(TRAIN, cached_only=cached_only), fetch(VALID, cached_only=cached_only)


def fetch(name: str, *, cached_only: bool = False) -> Path:
    """A file of the TinyStories data set; downloads it with a progress bar unless it is there. Raises Offline."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    failed = f"{REPOSITORY}/{name} is not in the cache and could not be downloaded"
    try:
        return Path(hf_hub_download(REPOSITORY, name, repo_type="dataset", local_files_only=True))
    except OSError:  # huggingface_hub's LocalEntryNotFoundError is one
        if cached_only or constants.HF_HUB_OFFLINE:
            raise Offline(f"{failed} (offline)") from None
    try:
        _reach(constants.ENDPOINT)  # first, since huggingface_hub retries for half a minute
        return Path(hf_hub_download(REPOSITORY, name, repo_type="dataset"))
    except (OSError, HfHubHTTPError) as error:
        raise Offline(f"{failed} ({_reason(error)})") from None


def _reach(url: str) -> None:
    """Raises OSError when no server answers there; any answer will do."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=REACH_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return


def _reason(error: Exception) -> str:
    inner = getattr(error, "reason", error)  # URLError wraps what went wrong
    return getattr(inner, "strerror", None) or type(inner).__name__


def tinyshakespeare(cache: Path) -> Path:
    """The 1.1 MB of char-rnn's tinyshakespeare. Raises Offline."""
    path = cache / "text" / "tinyshakespeare.txt"
    if path.exists():
        return path
    try:
        with urllib.request.urlopen(SHAKESPEARE, timeout=REACH_TIMEOUT_S) as answer:
            data = answer.read()
    except OSError as error:
        raise Offline(
            f"tinyshakespeare could not be downloaded ({_reason(error)}): name a copy with --data PATH"
        ) from None
    write_atomically(path, data)
    return path
