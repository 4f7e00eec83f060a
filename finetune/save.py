"""How a run's state gets to the disk: `--save whole | sharded | async`, all with one state.json, which comes last.

    torchrun --nproc_per_node 4 -m finetune.text --data notes/ --fsdp 4 --save async

whole: model.safetensors and optimizer.safetensors, written by the main rank, to which the others give one tensor at a
time. sharded: each rank writes what it holds, by torch.distributed.checkpoint. async: the same by a thread, while
training goes on; the next update waits until the state has been copied, and the next save until this one is written.
Any of them is continued on any number of ranks and any mesh.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

from finetune.gather import gathering
from finetune.parallelize import World
from finetune.resume import SHARDS, Data, Progress, RunFolder, saved_tensors
from finetune.shards import ONE_PROCESS, disk_errors


class Saver:
    """What saves a run, every time in the way that its config says."""

    def __init__(self, folder: RunFolder, world: World, data: Data | str, saved_step: int) -> None:
        """saved_step: of the checkpoint from which the run goes on, 0 for none."""
        self.folder, self.world, self.data, self.saved_step = folder, world, data, saved_step
        self.how = folder.config.save
        self.saves = 0
        self.waited_s = 0.0  # by training
        self.last_s = 0.0  # until the last one was on the disk
        self.staged: Future[Any] | None = None
        self.written: Future[Any] | None = None
        # A group of its own: the thread that saves must not mix its messages with those of training. Who dies is
        # noticed by the peers' thread, so that a slow disk needs no limit.
        alone = world.size == 1 or self.how == "whole"
        self.group = None if alone else dist.new_group(backend="gloo", timeout=timedelta(days=7))
        if world.size == 1:  # the thread that saves warns too, and catching it here would not reach there
            warnings.filterwarnings("ignore", ONE_PROCESS)
        on_gpu = world.device.type == "cuda"
        self.stager = DefaultStager(StagingOptions(on_gpu, False, True, on_gpu)) if self.how == "async" else None

    def save(self, progress: Progress, model: nn.Module, optimizer: torch.optim.Optimizer, *, wait: bool) -> None:
        """One checkpoint; all ranks call it. wait: until it is on the disk. Raises CheckpointError."""
        began = time.perf_counter()
        with self._waiting():
            self._finish()
            if progress.step != self.saved_step:
                self._begin(progress, model, optimizer)
                self.saved_step = progress.step
                self.saves += 1
        if wait:
            self._finish()
            self.last_s = time.perf_counter() - began

    def before_update(self) -> None:
        """Weights and optimizer states may change only when they have been copied."""
        if self.staged:
            with self._waiting():
                _result(self.staged, self.folder.path)
                self.staged = None

    def text(self) -> str:
        """What saving cost, for the user."""
        waited = f"training waited {self.waited_s:.2f} s for them"
        return f"saves: {self.saves}, {waited}, then {self.last_s:.2f} s until the last was on the disk"

    def close(self) -> None:
        if self.stager:
            self.stager.close()

    def _begin(self, progress: Progress, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        folder, tensors = self.folder, saved_tensors(model, optimizer)
        if self.how == "whole":
            with gathering(tensors, self.world) as whole:
                if whole is not None:
                    folder.save(progress, model, optimizer, self.data, whole)
            self.world.wait_for_main()
            return
        finish = folder.finisher(progress, model, optimizer, self.data)
        place = folder.checkpoint(progress.step) / SHARDS
        options: dict[str, Any] = {"process_group": self.group, "no_dist": self.world.size == 1}
        options["storage_writer"] = dcp.FileSystemWriter(place, single_file_per_rank=True, overwrite=True)
        detached = {name: tensor.detach() for name, tensor in tensors.items()}
        if self.how == "sharded":
            with disk_errors(place):
                dcp.save(detached, **options)
            self.world.from_main(finish)
            return
        response = dcp.async_save(detached, async_stager=self.stager, **options)
        assert isinstance(response, AsyncSaveResponse)
        self.staged, self.written = response.staging_completion, response.upload_completion
        if self.world.is_main:
            self.written = _then(self.written, finish)

    def _finish(self) -> None:
        """Wait for the save that is under way."""
        if self.written:
            _result(self.written, self.folder.path)
            self.staged = self.written = None

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.waited_s += time.perf_counter() - began


def _then(future: "Future[Any]", act: Callable[[], None]) -> "Future[None]":
    """What is done when both are: the future, without an error, and `act` behind it."""
    both: Future[None] = Future()

    def go_on(done: "Future[Any]") -> None:
        try:
            done.result()
            act()
            both.set_result(None)
        except BaseException as error:
            both.set_exception(error)

    future.add_done_callback(go_on)
    return both


def _result(future: "Future[Any]", place: Path) -> None:
    with disk_errors(place):
        future.result()
