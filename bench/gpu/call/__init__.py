"""The first call to a machine with a GPU: parts in the order of what they tell a second; see docs/gpu-notes.md."""
