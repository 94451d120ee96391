"""Encoder-decoders whose decoder reads the output of any encoder layer."""
