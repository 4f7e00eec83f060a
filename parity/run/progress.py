"""One progress bar for all processes of a run."""

from tqdm import tqdm


class Bar:
    """One progress bar over all jobs; each job counts as one unit."""

    def __init__(self, jobs: int, enabled: bool) -> None:
        style = "{desc:44.44} {percentage:3.0f}%|{bar:24}| {elapsed}, {remaining} left"
        self.tqdm = tqdm(total=jobs, disable=not enabled, bar_format=style, leave=False)
        self.done: dict[str, float] = {}

    def __call__(self, label: str, stage: str, done: float) -> None:
        self.done[label] = max(self.done.get(label, 0.0), min(done, 1.0))
        self.tqdm.set_description_str(f"{label}: {stage}", refresh=False)
        self.tqdm.n = sum(self.done.values())
        self.tqdm.refresh()

    def close(self) -> None:
        self.tqdm.close()
