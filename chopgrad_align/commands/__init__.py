"""Commands of `chopgrad-align`, one a module: each parses its arguments and calls the package."""
