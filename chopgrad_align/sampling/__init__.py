"""Gradients through samplers: the differentiable rollout, which steps carry gradient, and kinds of prediction."""
