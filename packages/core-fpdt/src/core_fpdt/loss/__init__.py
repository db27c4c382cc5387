"""The output head and the loss, without logits of the whole sequence; modules run in tiles."""
