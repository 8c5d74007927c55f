"""Every speed figure that the documents quote, as ratios of things measured in one run (`mono-internvl benchmark`)."""

# In the order in which they run; `train` changes the weights and `load` needs the disk.
PARTS = (
    *("preprocess", "routing", "head", "attention", "prefill", "ttft", "decode", "generate", "serve", "scaling"),
    *("train", "packing", "memory", "loading", "load"),
)
