"""Text -> token shards: where the data comes from, a tokenizer trained on it where none is given, shards written once.

Everything lands in one cache folder, under a name made of what it was made from, and is reused by the next run.
"""
