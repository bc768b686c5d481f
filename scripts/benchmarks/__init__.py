"""What scripts/bench.py measures: train, ops, generate, imports; peers.py is the same GPT in PyTorch.

Each module has `report(options)`, which runs in the parent and returns what goes into the JSON line, and the functions
that do the measuring in processes of their own (see runner.py).
"""
