"""What must not leave the device: how it is found in whatever is about to be sent."""
