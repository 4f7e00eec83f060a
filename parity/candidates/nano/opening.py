"""The checkpoint as nanollama reads it, for candidates that are given its sizes or its weights in another form."""

from typing import Any

import torch

from nanollama import checkpoint as files
from nanollama.checkpoint import Checkpoint
from nanollama.model import ModelConfig, Transformer
from parity.contract import UsageError

__all__ = ["Checkpoint", "ModelConfig", "build_model", "open_checkpoint"]


def open_checkpoint(path: str) -> Checkpoint:
    """Raises UsageError for one that cannot be read."""
    try:
        return files.open_checkpoint(path)
    except files.CheckpointError as error:
        raise UsageError(str(error)) from error


def build_model(opened: Checkpoint, dtype: torch.dtype, device: str) -> Any:
    """nanollama's own model of these weights: what a candidate's module is told apart by."""
    return Transformer.from_weights(opened.config, opened.weights, dtype=dtype, device=device).eval()
