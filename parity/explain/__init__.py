"""Where the first departure is, and why."""
