"""How a micro-batch becomes a gradient of the trained weights: one method a file."""
