"""KerasHub's Llama3Backbone on torch, by its own converter of Hugging Face folders: `load`, and `eps`, put right."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

os.environ.setdefault("KERAS_BACKEND", "torch")  # read when keras is imported
import keras
import keras_hub

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class Port:
    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, tokens: Tensor) -> Tensor:
        states = self.model({"token_ids": tokens, "padding_mask": keras.ops.ones_like(tokens)})
        return self.model.token_embedding(states, reverse=True)


def load(checkpoint: str, dtype: torch.dtype, device: str) -> Port:
    return Port(keras_hub.models.Llama3Backbone.from_preset(checkpoint, dtype=NAMES[dtype]))


def eps(checkpoint: str, dtype: torch.dtype, device: str) -> Port:
    """The checkpoint's rms_norm_eps in place of the one that the converter leaves."""
    port = load(checkpoint, dtype, device)
    for layer in port.model._flatten_layers():
        if hasattr(layer, "epsilon"):
            layer.epsilon = json.loads((Path(checkpoint) / "config.json").read_text())["rms_norm_eps"]
    return port
