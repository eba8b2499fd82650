"""What measures and checks a bundle on this machine."""
