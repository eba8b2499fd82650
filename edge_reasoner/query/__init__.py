"""One query's way: routing, and what an answer says."""
