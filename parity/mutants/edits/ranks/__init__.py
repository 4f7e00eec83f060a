"""Ways in which training over several processes has been wrong: each edit is made inside every rank."""
