"""`python -m reference.mistakes`: the names of the table."""

from reference.mistakes.table import LLAMA31, mistakes

SHAPE = {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "head_dim": 128, "tied": False}
NUMBERS = {"norm_eps": 1e-5, "rope_theta": 5e5, "rope_scaling": LLAMA31}

if __name__ == "__main__":
    print("\n".join(mistake.name for alike in mistakes(SHAPE | NUMBERS, 1024) for mistake in alike))
