"""The one protocol of everything that answers a chat, and the values that go in and out of it."""
