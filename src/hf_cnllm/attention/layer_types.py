"""What transformers calls the kinds of layers in a configuration's `layer_types`."""

FULL = "full_attention"
SLIDING = "sliding_attention"
