"""Files of the official MAR code (LTH14/mar): its checkpoints and the KL-16 VAE, to our models and back."""
