"""Encoder-decoders whose decoder can read the output of any encoder layer."""
