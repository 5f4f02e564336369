"""The benchmark of a GPU: `python -m bench.gpu`."""
