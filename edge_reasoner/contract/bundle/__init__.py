"""The bundle: its manifest, its graphs, and opening it without trust."""
