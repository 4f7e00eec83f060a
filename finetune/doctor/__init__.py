"""What is wrong with a run before it begins: its data, its model, its rate, this machine; one line for each ill."""
