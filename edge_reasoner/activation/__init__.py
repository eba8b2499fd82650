"""The choice of a variant by a self-test on this machine."""
