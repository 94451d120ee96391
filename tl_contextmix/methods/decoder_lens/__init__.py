"""Every encoder layer through the decoder at once: the engine of the decoder lens."""
