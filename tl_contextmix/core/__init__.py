"""The mathematics: tensors in, tensors out; no model, no tokenizer, no TransformerLens."""
