"""The encoders, the fusion and SAVE itself, as Flax NNX modules."""
