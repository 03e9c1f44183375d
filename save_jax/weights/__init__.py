"""PyTorch's parameter names and ours: one table a model, and the two ways through it.

The tables (`clip`, `ast`, `save`) are the only place that knows PyTorch's names. Arrays go in and
come out as NumPy's; nothing here imports torch.
"""
