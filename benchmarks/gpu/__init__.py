"""All figures of a GPU in one call, on a machine that has PyTorch and nothing else: `python -m benchmarks.gpu`."""
