"""The machine that a benchmark runs on: what it is, what it can do at best, and whether others are at work on it.

    python -m benchmarks.machine
    # memory reads 48.1 GB/s, products run at 0.19 (fp32) and 0.47 (bf16) TFLOP/s; others take 0.02 of 2 cores

A rate says something only beside a ceiling of the same minutes, and only where nobody else had the cores: `refuse_busy`
comes before the first round, and `Company` counts what others took within each.
"""

import mmap
import os
import platform
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanollama.cli import UsageError, run

BUSY = 0.1  # of a core in the hands of others (a hypervisor's included): from there on rounds are disturbed
STAT = Path("/proc/stat")
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def main(*, threads: int = 2) -> None:  # of each product and sum
    """Measure the machine's ceilings and its other work; some seconds."""
    import torch

    torch.set_num_threads(threads)
    others = others_share(1.0)
    rates = " and ".join(f"{matmul_rate(kind) / 1e12:.2f} ({kind})" for kind in ("fp32", "bf16"))
    print(f"memory reads {read_bandwidth() / 1e9:.1f} GB/s, products run at {rates} TFLOP/s; "
          f"others take {others:.2f} of {os.cpu_count()} cores")  # fmt: skip


def environment() -> dict[str, Any]:
    """What a result file says of the machine."""
    import torch

    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "load_average": os.getloadavg()[0],
    }


def read_bandwidth() -> float:
    """Bytes a second that a sum over 1 GiB reads, in large pages where the system has them: the best of five."""
    import torch

    memory, best = mmap.mmap(-1, 2**30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), 0.0
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    data = torch.frombuffer(memory, dtype=torch.float32).fill_(1)
    for _ in range(5):
        start = time.perf_counter()
        data.sum()
        best = max(best, data.nbytes / (time.perf_counter() - start))
    return best


def matmul_rate(kind: str) -> float:
    """Operations a second of a (512, 2048) x (2048, 2048) product in this dtype, "fp32" or "bf16": the best of five."""
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[kind]
    a, b = torch.randn(512, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * 512 * 2048 * 2048 / best


# --- Others at work --------------------------------------------------------------------------------------------------


def busy_s() -> float:
    """Processor seconds that all cores have spent, those that a hypervisor took from this machine included."""
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, STAT.read_text().split("\n", 1)[0].split()[1:])
    return (user + nice + system + irq + softirq + steal) * TICK_S


def spent_s(processes: Iterable[int]) -> float:
    """Processor seconds of these processes."""
    ticks = 0
    for process in processes:
        fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks * TICK_S


def others_share(seconds: float) -> float | None:
    """Cores that others keep busy while this process sleeps so long; None where the system does not say."""
    if not STAT.exists():
        return None
    with Company([]) as company:
        time.sleep(seconds)
    return company.cores


@dataclass
class Company:
    """Cores that processes other than these, and this one, kept busy in the meantime."""

    processes: list[int]
    cores: float | None = None

    def __enter__(self) -> "Company":
        self.began = time.perf_counter(), self._others()
        return self

    def __exit__(self, *_: object) -> None:
        began, before = self.began
        if before is not None:
            self.cores = max(0.0, (self._others() or 0.0) - before) / (time.perf_counter() - began)

    def _others(self) -> float | None:
        return busy_s() - spent_s([os.getpid(), *self.processes]) if STAT.exists() else None


def refuse_busy(anyway: bool, seconds: float = 1.0) -> None:
    """Raises UsageError where others are at work, unless `anyway`."""
    others = others_share(seconds)
    if not anyway and others is not None and others > BUSY:
        raise UsageError(
            f"others keep {others:.2f} of {os.cpu_count()} cores busy: figures would be theirs as well; "
            "wait for them, or add --anyway and quote no figure but ratios"
        )


def disturbed(rounds: list[float | None]) -> list[int]:
    """Numbers, from 1, of the rounds in which others were at work."""
    return [n for n, cores in enumerate(rounds, 1) if cores is not None and cores > BUSY]


def disturbance(rounds: list[int]) -> list[str]:
    """The word on them; no line where there were none."""
    return [f"others were at work in round {', '.join(map(str, rounds))}: quote ratios alone"] if rounds else []


if __name__ == "__main__":
    run(main)
