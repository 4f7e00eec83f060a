"""`finetune COMMAND`, or `python -m finetune COMMAND`: the commands of the finetuner."""

from nanollama import program

COMMANDS = {
    "text": "train on text of your own",
    "chat": "teach a checkpoint to chat, from dialogues",
    "preference": "teach a checkpoint which of two answers is better, from pairs",
    "evaluate": "bits per byte, perplexity and tasks of several checkpoints in one table",
    "tinystories": "train a small model on TinyStories",
    "tinyshakespeare": "train on tinyshakespeare",
    "plan": "memory, largest batch and traffic of a run, without a GPU",
    "preference": "learn from pairs of a better and a worse answer: DPO and its kin",
    "evaluate": "bits per byte and perplexity of checkpoints on a text, and tasks of lm-eval",
    "doctor": "look for ills of a run before it starts",
    "compare": "runs side by side, in one page",
    "plan": "memory of each rank and bytes on the wire, before a GPU is rented",
    "prepare": "write token shards without training",
    "doctor": "look for ills of a run before it begins",
    "report": "write a run's page anew",
    "compare": "show runs side by side",
}


def main() -> int:
    return program.run("finetune", COMMANDS, needs=("matplotlib",))


if __name__ == "__main__":
    raise SystemExit(main())
