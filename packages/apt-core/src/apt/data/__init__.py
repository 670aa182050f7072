"""From files to batches: sources yield text, tokenizers number it, a store keeps the numbers, a loader deals out."""
