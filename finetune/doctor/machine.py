"""What this machine makes of a run: a dtype that it has no instructions for, memory, time."""

import os
import platform
import sys
import time
from collections.abc import Iterator

import torch

from finetune.doctor.patient import Finding, Patient, unchanged
from finetune.memory import plan_memory


def emulates_bf16(device: torch.device) -> bool:
    """Whether bf16 products are put together from others here."""
    if device.type == "cuda":
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return False  # nothing tells
    return not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def check_dtype(patient: Patient) -> Iterator[Finding]:
    """The computation's dtype is one of the machine's own."""
    if patient.config.dtype == "bf16" and emulates_bf16(patient.device):
        yield Finding(
            "emulated dtype",
            f"--dtype bf16: this {patient.device.type} has no instructions for it and emulates them: --dtype fp32 is "
            "faster here and more exact",
        )


def check_memory(patient: Patient) -> Iterator[Finding]:
    """The planned peak fits."""
    plan, there = plan_memory(patient.model, patient.config, patient.device), available_bytes(patient.device)
    patient.facts.append(f"memory: {plan.total / 1e6:,.0f} MB planned, {(there or 0) / 1e6:,.0f} MB there")
    if there and plan.total > there:
        yield Finding(
            "memory",
            f"the run needs {plan.total / 1e9:.1f} GB and {there / 1e9:.1f} GB are there: lower --batch_size or "
            "--seq_len, or add --activation_checkpointing, --optimizer adamw8bit or --method lora",
        )


def available_bytes(device: torch.device) -> int | None:
    """What this process may take, with what it has; None where nothing tells."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_allocated(device)
    if not sys.platform.startswith("linux"):
        return None
    with open("/proc/meminfo") as file:
        lines = dict(line.split(":", 1) for line in file)
    with open("/proc/self/statm") as file:
        own = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return int(lines["MemAvailable"].split()[0]) * 1024 + own


def time_steps(patient: Patient) -> None:
    """A fact: about how long the run will take, from one row's forward and backward pass."""
    config, batch = patient.config, patient.part()
    if not batch.valid:
        return
    with unchanged(patient):
        for _ in range(2):  # the first one pays for what libraries set up
            started = time.perf_counter()
            patient.nats(batch).backward()
            if patient.device.type == "cuda":
                torch.cuda.synchronize(patient.device)
            once_s = time.perf_counter() - started
    rows = config.batch_size * config.accumulate * config.seq_len / batch.tokens.numel()
    seconds = once_s * rows * config.max_steps
    patient.facts.append(f"time: about {seconds / 60:,.1f} minutes for {config.max_steps:,} steps")
