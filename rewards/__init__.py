"""Rewards, one a file; installed as the import package `chopgrad_rewards`."""
