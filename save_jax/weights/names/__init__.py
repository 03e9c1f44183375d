"""PyTorch's names of each model's weights, and ours."""
