"""Training: data, loss, optimizer, step, checkpoints, metrics, and the loop that ties them."""
