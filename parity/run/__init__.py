"""A case is run: by references, oracle and candidate, each in a process of its own, into traces."""
