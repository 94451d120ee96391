"""Log-probability contributions of layers, heads, positions and neurons (Yu and Ananiadou)."""
