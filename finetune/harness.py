"""A model of ours as EleutherAI's lm-eval asks for one: log-probabilities of continuations, and greedy text.

    python -m finetune.evaluate --ckpt out/RUN/final --tasks lambada_openai,my_task.yaml --limit 100

Needs the extra `eval`. The ids are those of the checkpoint's tokenizer, with BOS where it puts one; an empty context is
its BOS, else its EOS: lm-eval's own wrapper of transformers does the same, so both reach the same scores.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from finetune.errors import UserError
from nanollama.generation.llama import Llama, Sampling
from nanollama.tokenizer import Tokenizer

MAX_NEW_TOKENS = 256  # of an answer, where the task does not say
Pair = tuple[Any, list[int], list[int]]  # texts, ids of the context, ids of the continuation


def run_tasks(
    llama: Llama, names: Sequence[str], batch_size: int = 4, limit: int = 0, num_fewshot: int = -1
) -> dict[str, float]:
    """{"task metric": value} of every task. Raises UserError for a task that is not there or cannot be had."""
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("--tasks needs the package lm-eval: pip install 'llama-parity[eval]'") from None
    files = [Path(name) for name in names if name.endswith((".yaml", ".yml"))]
    for file in files:
        if not file.is_file():
            raise UserError(f"--tasks {file}: no such file")
    manager = TaskManager(include_path=[str(file.parent) for file in files] or None)
    wanted = [name if Path(name) not in files else _task_of(Path(name)) for name in names]
    if unknown := [name for name in wanted if name not in manager.all_tasks]:
        raise UserError(f"--tasks {unknown[0]}: lm-eval has no such task; python -m lm_eval ls tasks lists them")
    try:
        found = lm_eval.simple_evaluate(
            wrapped(llama, batch_size),
            tasks=wanted,
            limit=limit or None,
            num_fewshot=None if num_fewshot < 0 else num_fewshot,
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=False,
        )
    except (ConnectionError, FileNotFoundError) as error:  # the data of a task, offline
        raise UserError(
            f"--tasks {','.join(names)}: its data could not be had: {' '.join(str(error).split())}"
        ) from None
    return {
        f"{task} {metric.removesuffix(',none')}": float(value)
        for task, values in found["results"].items()
        for metric, value in values.items()
        if isinstance(value, float | int) and "stderr" not in metric and metric not in ("alias", "sample_len")
    }


def _task_of(file: Path) -> str:
    """The name that a task's file gives it. Raises UserError."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("task:"):
            return line.removeprefix("task:").strip().strip("\"'")
    raise UserError(f'--tasks {file}: has no line "task: NAME"')


def wrapped(llama: Llama, batch_size: int) -> Any:
    """The model as an lm_eval LM: a subclass, since lm-eval accepts nothing else."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    longest = llama.config.max_seq_len
    if llama.tokenizer is None:
        raise UserError("--tasks need a tokenizer: name one with --tokenizer")
    tokenizer: Tokenizer = llama.tokenizer

    class Wrapped(TemplateLM):
        tokenizer_name = "nanollama"

        @property
        def eot_token_id(self) -> int:
            return tokenizer.eos_id if tokenizer.eos_id is not None else 0

        @property
        def prefix_token_id(self) -> int:
            return tokenizer.bos_id if tokenizer.bos_id is not None else self.eot_token_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            return tokenizer.encode(string, bos=add_special_tokens is not False)

        def _loglikelihood_tokens(self, requests: list[Pair], **kwargs: Any) -> list[tuple[float, bool]]:
            return score_pairs(llama, requests, batch_size)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            totals = []
            for request in requests:
                ids = self.tok_encode(request.args[0])
                windows = get_rolling_token_windows(ids, self.prefix_token_id, longest, 1)
                pairs = [(None, *make_disjoint_window(w)) for w in windows]
                totals.append(sum(value for value, _ in score_pairs(llama, pairs, batch_size)))
            return totals

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return [answer(llama, *request.args) for request in requests]

    return Wrapped()


@torch.no_grad()
def score_pairs(llama: Llama, pairs: Sequence[Pair], batch_size: int) -> list[tuple[float, bool]]:
    """(log-probability of the continuation in nats, whether it is the greedy one) of each; the longest first."""
    found: dict[int, tuple[float, bool]] = {}
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][1]) - len(pairs[i][2]))
    model, device, longest = llama.model, llama.model.tok_embeddings.weight.device, llama.config.max_seq_len
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows = [(pairs[i][1] + pairs[i][2])[-(longest + 1) :] for i in chosen]
        tokens = torch.zeros(len(rows), max(map(len, rows)) - 1, dtype=torch.int64)
        for row, ids in zip(tokens, rows, strict=True):
            row[: len(ids) - 1] = torch.tensor(ids[:-1])
        hidden = model.hidden(tokens.to(device))  # (B, T, C)
        for i, ids, states in zip(chosen, rows, hidden, strict=True):
            wanted = torch.tensor(pairs[i][2], device=device)
            end = len(ids) - 1
            logps = F.log_softmax(model.logits(states[end - len(wanted) : end]), dim=-1)  # (n, V)
            picked = logps.gather(1, wanted.unsqueeze(1)).sum()
            found[i] = (float(picked), bool((logps.argmax(-1) == wanted).all()))
    return [found[i] for i in range(len(pairs))]


def answer(llama: Llama, context: str, settings: dict[str, Any]) -> str:
    """The text that follows, up to the first of settings["until"]."""
    until = settings.get("until") or []
    stops = [until] if isinstance(until, str) else list(until)
    new = int(settings.get("max_gen_toks", MAX_NEW_TOKENS))
    temperature = float(settings.get("temperature", 0.0)) if settings.get("do_sample") else 0.0
    ids = llama.encode(context)[-max(1, llama.config.max_seq_len - new) :]
    text = ""
    for event in llama.generate([ids], Sampling(max_new_tokens=new, temperature=temperature)):
        text += event.text
        if places := [place for stop in stops if (place := text.find(stop)) >= 0]:
            return text[: min(places)]
    return text
