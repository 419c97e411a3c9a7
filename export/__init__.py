"""Turns an AudioLDM 2 checkpoint in diffusers' layout into the weights of the Triton model repository."""
