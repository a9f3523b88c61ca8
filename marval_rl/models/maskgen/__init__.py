"""MaskGen-KL (arXiv 2501.07730): a masked autoregressive model of 1-D tokens that is conditioned on text."""
