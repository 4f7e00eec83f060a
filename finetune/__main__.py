"""`finetune COMMAND`, or `python -m finetune COMMAND`: the commands of the finetuner."""

from nanollama import program

COMMANDS = {
    "text": "train on text of your own",
    "chat": "teach a checkpoint to chat, from dialogues",
    "preference": "learn from pairs of a better and a worse answer: DPO and its kin",
    "tinystories": "train a small model on TinyStories",
    "tinyshakespeare": "train on tinyshakespeare",
    "prepare": "write token shards without training",
    "doctor": "look for ills of a run before it starts",
    "plan": "memory, largest batch and traffic of a run, without a GPU",
    "report": "write a run's page anew",
    "compare": "show runs side by side",
    "evaluate": "bits per byte and perplexity of checkpoints on a text, and tasks of lm-eval",
}


def main() -> int:
    return program.run("finetune", COMMANDS, needs=("matplotlib",))


if __name__ == "__main__":
    raise SystemExit(main())
