"""Ids to ids: drawing tokens, the decode loop, speculation, the facade `llama.Llama`, the chat at a terminal."""
