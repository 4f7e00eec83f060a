"""How long a run is, where its data decide: steps of so many epochs, and what follows from the number of steps.

settle(config, packer, rows)         # the config with max_steps, warmup_steps and eval_tokens filled in
"""

import math
from dataclasses import replace

from finetune.config import EVAL_TOKENS, TrainConfig, warmup_steps
from finetune.data.packing import Packing

# Of a checkpoint, where neither --epochs nor --max_steps is given.
USUAL_EPOCHS, LEAST_STEPS, MOST_STEPS = 3, 50, 1000
LEAST_EVAL_TOKENS = 2000


def settle(config: TrainConfig, packer: Packing, rows: int) -> TrainConfig:
    """The config with everything that follows from the amount of data; what is there already stays.

    rows: of a step, on all ranks together.
    """
    steps = config.max_steps
    if not steps:
        one = packer.rows_an_epoch() / rows
        steps = max(1, math.ceil(config.epochs * one - 1e-9))
        if not config.epochs:
            steps = min(MOST_STEPS, max(LEAST_STEPS, math.ceil(USUAL_EPOCHS * one)))
    tokens = config.eval_tokens or min(EVAL_TOKENS, max(LEAST_EVAL_TOKENS, steps * rows * config.seq_len))
    return replace(config, max_steps=steps, warmup_steps=warmup_steps(config, steps), eval_tokens=tokens)
