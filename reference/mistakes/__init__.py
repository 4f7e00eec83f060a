"""What implementations get wrong, one at a time, put into the oracle. `python -m reference.mistakes` lists them."""
