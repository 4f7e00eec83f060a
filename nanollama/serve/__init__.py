"""A server with OpenAI's completions interface whose numbers are those that `parity.check` proves."""
