"""Hub ids: "org/name" -> a local folder, through huggingface_hub and its cache.

python -m nanollama inspect meta-llama/Llama-3.2-1B
"""

import re
from pathlib import Path

from nanollama.checkpoint.weights import CheckpointError

# What a Hugging Face folder needs; Meta's own .pth copy under original/ would double the download.
PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "original/tokenizer.model"]


def fetch(hub_id: str) -> Path:
    """Download a model (or find it in the cache) and return its folder. Raises CheckpointError, one line."""
    hub_id = re.sub(r"^https?://(huggingface|hf)\.co/", "", hub_id)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id):
        raise CheckpointError(
            hub_id, "does not exist: give a folder, a file, or a hub id such as meta-llama/Llama-3.2-1B"
        )
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )
    except ImportError:
        raise CheckpointError(hub_id, "is no local path, and hub ids need: pip install huggingface_hub") from None
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=PATTERNS))
        if any(folder.glob("*.safetensors")) or any(folder.glob("*.gguf")):
            return folder
        problem = (
            f"came without .safetensors: choose one of its other files, `hf download {hub_id} FILE`, and give that"
        )
    except GatedRepoError:
        problem = f"is gated: accept its licence at https://huggingface.co/{hub_id}, then run `hf auth login`"
    except RepositoryNotFoundError:
        problem = "is neither a local path nor a public model on the hub: check the name, or run `hf auth login`"
    except LocalEntryNotFoundError:
        problem = "is no local path, is not in the cache, and the hub cannot be reached: download it first"
    except (HfHubHTTPError, OSError) as error:
        problem = f"is no local path, and the hub answers: {error}"
    except ValueError as error:
        problem = f"is neither a local path nor a hub id ({error})"
    raise CheckpointError(hub_id, problem)
