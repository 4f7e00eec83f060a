"""Reference implementations, each launched by name in its own process: `python -m reference.meta|hf|oracle`.

meta.py drives Meta's `llama_models`, hf.py drives `transformers`, oracle/ is a float64 forward pass written from
the papers. Nothing here imports the implementations that are judged against them, so no bug can be shared.
"""
