"""From texts to rows of tokens, within limits."""
