"""The quantity that is optimised: weighted terms, the reward protocol, and pixel losses."""
