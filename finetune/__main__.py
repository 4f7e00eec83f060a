"""`finetune COMMAND`, or `python -m finetune COMMAND`: the commands of the finetuner."""

from nanollama import program

COMMANDS = {
    "text": "train on text of your own",
    "chat": "teach a checkpoint to chat, from dialogues",
    "tinystories": "train a small model on TinyStories",
    "tinyshakespeare": "train on tinyshakespeare",
    "prepare": "write token shards without training",
}


def main() -> int:
    return program.run("finetune", COMMANDS, needs=("matplotlib",))


if __name__ == "__main__":
    raise SystemExit(main())
