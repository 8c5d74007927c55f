"""Every speed figure that the documents quote, as ratios of things measured in one run (`mono-internvl benchmark`)."""
