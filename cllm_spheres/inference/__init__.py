"""A trained model that writes: loading, logits, gradients, sampling."""
