"""What is asked of the machine: where made files are kept, and how much memory the process took.

NANOLLAMA_CACHE=/data/cache python -c "from nanollama.machine import cache_folder; print(cache_folder())"
# /data/cache
"""

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """$NANOLLAMA_CACHE, else nanollama/ in the user's cache folder ($XDG_CACHE_HOME, ~/.cache on Linux)."""
    own = os.environ.get("NANOLLAMA_CACHE")
    if own:
        return Path(own).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("nanollama", appauthor=False))


def peak_memory_bytes() -> int | None:
    """Most memory that the process held, mapped weights that were touched included; None where it cannot be known."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
