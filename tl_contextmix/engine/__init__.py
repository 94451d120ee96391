"""What several methods share: parts of a block, log-probability scores, memories, citations."""
