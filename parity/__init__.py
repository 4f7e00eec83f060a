"""parity: prove, number by number, that an implementation computes what the Llama reference implementations compute."""
