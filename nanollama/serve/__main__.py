"""python -m nanollama.serve --ckpt Meta-Llama-3.1-8B-Instruct"""

from nanollama.cli import run
from nanollama.serve.command import serve

if __name__ == "__main__":
    run(serve, prog="python -m nanollama.serve")
