"""What a run reads: rows in files, documents of tokens, dialogues, and the packed rows made of them."""
