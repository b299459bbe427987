"""Inputs to features: the trained pair, the frozen third towers, and the heads between them."""
