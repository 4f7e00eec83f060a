"""The bundled sample: short stories from a seeded grammar, for machines with no network.

A story has a hero, a friend, a place, a thing and one of a dozen plots; names, pronouns and things stay the same from
its first sentence to its last, so there is something to learn beyond which word follows which. The grammar is
stories.txt.

    python -m finetune.prepare.stories 2      # prints two stories
"""

import random
import re
import sys
from functools import cache
from pathlib import Path

Grammar = dict[str, list[str]]
GRAMMAR = Path(__file__).with_name("stories.txt")
SLOT = re.compile(r"\{(\^?)(\w+)(!?)\}")
PRONOUNS = {"girl": {"he": "she", "him": "her", "his": "her"}, "boy": {"he": "he", "him": "him", "his": "his"}}


@cache
def read_grammar(path: Path = GRAMMAR) -> Grammar:
    """Rules by name: a `[rule]` line, then one expansion a line; `#` begins a comment line."""
    rules: Grammar = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            current = rules.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            current.append(line)
    return rules


def expand(template: str, rules: Grammar, slots: dict[str, str], rng: random.Random) -> str:
    """`template` with its slots filled; what a slot became is remembered in a copy shared by nested slots."""

    def fill(match: re.Match[str]) -> str:
        capital, name, fresh = match.groups()
        text = slots.get(name, "")
        if fresh or not text:
            text = slots[name] = SLOT.sub(fill, rng.choice(rules[name]))
        return text[0].upper() + text[1:] if capital else text

    return SLOT.sub(fill, template)


def story(rng: random.Random) -> str:
    """One story of about 100 to 200 words."""
    rules = read_grammar()
    plots = sorted({name.split(".")[0] for name in rules if "." in name})
    hero, friend = rng.choice(["girl", "boy"]), rng.choice(["girl", "boy"])
    slots = {**PRONOUNS[hero], "hero": rng.choice(rules[hero]), "kind": rng.choice(rules[f"{hero}_kind"])}
    slots["friend"] = rng.choice([name for name in rules[friend] if name != slots["hero"]])
    plot = rng.choice(plots)
    beats = sorted(name for name in rules if name.startswith(f"{plot}."))
    templates = [rng.choice(rules["opening"]), *rng.sample(rules["habit"], rng.randint(1, 3))]
    templates += [sentence for beat in beats for sentence in rng.sample(rules[beat], rng.choice([1, 1, 1, 2]))]
    templates += rng.sample(rules["ending"], rng.randint(1, 2))
    return " ".join(expand(template, rules, slots, rng) for template in templates)


def stories(count: int, seed: int = 0) -> list[str]:
    """`count` stories, the same ones for the same seed."""
    rng = random.Random(seed)
    return [story(rng) for _ in range(count)]


def main() -> None:
    print("\n\n".join(stories(int(sys.argv[1]) if sys.argv[1:] else 1)))


if __name__ == "__main__":
    main()
