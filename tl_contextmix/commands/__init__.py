"""The commands of `tl-contextmix`: each adds itself to the parser and calls one function."""
